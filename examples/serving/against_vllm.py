"""Show that vLLM answers as transformers does, token for token: plain checkpoints, and those with a serving router.

    python examples/serving/against_vllm.py --write docs/serving-vllm.md          (make serve-test)
    python examples/serving/against_vllm.py --only llava,qwen3_vl                 some types alone

It makes an environment with the real vLLM for the CPU in build/serving (`environment.py`), compresses a tiny random
checkpoint of each type and the trained reference model, and asks both sides greedily in float32: transformers here,
vLLM there, with files between them. Folders with a serving router are asked under budgets of all kinds, several
pictures and none, mixed in one batch, and all of it again, which vLLM then has in its caches; and what has to be
refused is asked for. Exit code 1: an answer differs (those of CAUSAL have to differ), or something was answered that
had to be refused.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from environment import BUILD, ROOT, make_environment, run_in
from in_transformers import ask_transformers, prompts
from tiny_folders import SIZES, Asked, add_router, asked, build_wide, change_config

DIGITS = ROOT / "examples" / "digits"
KINDS = ("plain", "served", "refused")
SERVED = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
BUDGETS: tuple[dict[str, Any], ...] = (
    {"preset": "serve-fast"},
    {},
    {"keep_visual_tokens": 0.5},
    {"keep_visual_tokens": 5, "question_ids": [40, 41, 60]},
    {"preset": "off"},
    {"preset": "serve-accurate", "question_ids": [33, 52]},
    {"keep_visual_tokens": 1.0},
    {"keep_visual_tokens": 10},
    {"preset": "serve-balanced"},
)
COUNTS = (1, 2, 1, 0)  # of pictures, three questions each in turn
CAUSAL = ("paligemma",)  # both ways in transformers, causal on vLLM's CPU: answers differ
START = {"hf_overrides": {"serving_router": {"default": "serve-fast"}}}


@dataclass
class Row:
    """One engine and what both sides answered."""

    kind: str  # plain, served
    name: str
    folder: Path
    questions: list[Asked]
    options: dict[str, Any] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)  # the budget that the engine was started with
    refused: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # part of the sentence, request
    texts: list[str] = field(default_factory=list)
    torch: list[dict[str, Any]] = field(default_factory=list)
    vllm: dict[str, Any] = field(default_factory=dict)

    def engine(self) -> dict[str, Any]:
        """Return what vLLM is to do: all questions at once, all again, and what has to be refused, one by one."""
        self.texts = prompts(self.folder, self.questions)
        requests = [
            {"prompt": text, "images": question.files, "kwargs": question.budget}
            for text, question in zip(self.texts, self.questions, strict=True)
        ]
        limit = {"limit_mm_per_prompt": {"image": max((len(q.files) for q in self.questions), default=1) or 1}}
        rounds = [requests] * (2 if self.kind == "served" else 1)
        return {
            "name": self.name,
            "folder": str(self.folder),
            "options": {**limit, **self.options},
            "rounds": rounds + [[request] for _, request in self.refused],
        }

    def ask_transformers(self) -> None:
        served = self.kind == "served"
        questions = [
            Asked(q.chat, q.images, q.files, q.budget or self.default) if served else q for q in self.questions
        ]
        self.torch = ask_transformers(self.folder, questions, served)

    def equal(self, round_number: int, part: str) -> int:
        """Count the prompts or the answers that are the same on both sides."""
        if "start" in self.vllm:
            return 0
        theirs = self.vllm["rounds"][round_number]
        return sum(a.get(part) == b.get(part) for a, b in zip(theirs, self.torch, strict=False))

    def answered(self) -> list[str]:
        """Return what had to be refused and was not, or by another sentence."""
        if not self.refused or "start" in self.vllm:
            return []
        rounds = self.vllm["rounds"][-len(self.refused) :]
        wrong = []
        for (sentence, _), (answer, *_) in zip(self.refused, rounds, strict=True):
            if sentence not in answer.get("error", ""):
                wrong.append(f"{self.name}: {sentence!r} was wanted, and it said {answer}")
        return wrong

    @property
    def holds(self) -> bool:
        number = len(self.questions)
        if "start" in self.vllm or self.answered():
            return False
        if self.name in CAUSAL:  # once it holds, the document need not say so
            return self.equal(0, "prompt") == number > self.equal(0, "tokens")
        rounds = 2 if self.kind == "served" else 1
        return all(self.equal(i, "tokens") == number for i in range(rounds))


# --- what is asked ----------------------------------------------------------------------------------------------------


def plain_row(name: str, work: Path, number: int) -> Row:
    """Return a compressed tiny checkpoint of a type with questions."""
    folder = work / "plain" / name
    small = folder / "small"
    if not small.exists():  # made once: remove build/serving/work to make all anew
        source = build_wide(name, fresh(folder) / "source", layers=6 if name == "gemma3" else 4)
        compressed(source, small, layers=(1,))
    return Row("plain", name, small, list(asked(name, number, work / "images" / "plain")))


def reference_rows(work: Path, number: int) -> list[Row]:
    """Return the trained reference model, whole and without three of its layers, with questions of its test set."""
    from exporter.data.calibration import load_calibration

    samples = load_calibration(DIGITS / "data" / "test.jsonl", samples=number).samples
    questions: list[Asked] = []
    for sample in samples:
        images = sample.open_images()
        files = [str(work / "images" / f"digits-{len(questions)}-{i}.png") for i in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        questions.append(Asked(sample.chat(), images, files))
    small = work / "plain" / "digits" / "small"
    if not small.exists():
        compressed(DIGITS / "model", fresh(small.parent) / "small", layers=(3, 5, 7))
    return [
        Row("plain", "reference model", DIGITS / "model", questions),
        Row("plain", "reference model, 3 layers fewer", small, questions),
    ]


def compressed(source: Path, out: Path, layers: tuple[int, ...]) -> Path:
    from exporter import Recipe, compress
    from exporter.plan import LayerBudget
    from exporter.recipe import CalibrationData, Method

    recipe = Recipe(
        model=str(source), calibration=CalibrationData(""), budget=LayerBudget(layers=layers), fold=Method("none")
    )
    return compress(recipe, out)


def served_rows(name: str, work: Path, number: int) -> list[Row]:
    """Return a tiny checkpoint with a serving router, with budgets by request and by the engine's start."""
    folder = add_router(build_wide(name, fresh(work / "served" / name)))
    questions = list(asked(name, number, work / "images", BUDGETS, COUNTS))
    picture = next(question for question in questions if len(question.files) == 1)
    (text,) = prompts(folder, [picture])
    request = {"prompt": text, "images": picture.files}
    refused = [
        ("preset 'fastest' is not known", {**request, "kwargs": {"preset": "fastest"}}),
        ("keep_visual_tokens=1.5 is no share", {**request, "kwargs": {"keep_visual_tokens": 1.5}}),
        ("not both", {**request, "kwargs": {"keep_visual_tokens": 5, "preset": "serve-fast"}}),
        ("question_ids has 99999", {**request, "kwargs": {"preset": "serve-fast", "question_ids": [99999]}}),
    ]
    mixed: tuple[dict[str, Any], ...] = ({}, {}, {"preset": "off"}, {"keep_visual_tokens": 0.5})
    if name == "qwen2_5_vl":
        frames = work / "frames.npy"
        np.save(frames, np.zeros((2, 50, 60, 3), np.uint8))
        video = {"prompt": text.replace("image_pad", "video_pad"), "videos": [str(frames)]}
        refused.append(("this request has 1 video(s)", {**video, "kwargs": {"preset": "serve-fast"}}))
    at_start = list(asked(name, 18, work / "images" / "start", mixed, (1, 2)))
    return [
        Row("served", name, folder, questions, options={"block_size": 32}, refused=refused),
        Row("served", f"{name}, started with serve-fast", folder, at_start, START, {"preset": "serve-fast"}),
    ]


@dataclass
class Refusal:
    """An engine that must not start, or a plain one whose request must be refused: part of the sentence, job."""

    sentence: str
    engine: dict[str, Any]
    vllm: dict[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> str:
        if "start" in self.vllm:
            return str(self.vllm["start"])
        return str(self.vllm["rounds"][-1][0].get("error", "it answered"))


def refusals(work: Path) -> list[Refusal]:
    """Return what the plain model would answer in silence, and folders that are not what they say."""

    def copy(change: Callable[[Path], Any], source: Path) -> Path:
        folder = fresh(work / "refused" / f"{len(list((work / 'refused').glob('*')))}") / "folder"
        shutil.copytree(source, folder)
        change(folder)
        return folder

    plain = build_wide("llava", fresh(work / "refused" / "plain"))
    served = add_router(build_wide("llava", fresh(work / "refused" / "served")))
    gemma = build_wide("gemma3", fresh(work / "refused" / "gemma3"))
    entry = {"serving_router": {"bottleneck": 32, "num_heads": 4, "default": "serve-fast"}}
    budget = [{"prompt": "USER: <image>\nwhat ? ASSISTANT:", "images": [], "kwargs": {"keep_visual_tokens": 0.5}}]
    picture = next(iter(asked("llava", 1, work / "images" / "refused"))).files
    budget[0]["images"] = picture
    from_another = copy(lambda folder: add_router(folder, trained_for={"num_hidden_layers": 24}), served)
    other_shape = copy(lambda folder: add_router(folder, bottleneck=16), served)
    change_config(other_shape, {"serving_router": {"bottleneck": 32, "num_heads": 4}})

    def without(folder: Path) -> None:
        shutil.rmtree(folder / "serving_router")

    def engine(name: str, folder: Path, rounds: Sequence[Any] = (), **options: Any) -> dict[str, Any]:
        return {"name": name, "folder": str(folder), "options": options, "rounds": list(rounds)}

    return [
        Refusal("has no serving router", engine("a budget of a plain folder", plain, [budget])),
        Refusal("has no serving router", engine("a start budget of a plain folder", plain, **START)),
        Refusal("not here (Gemma3", engine("another architecture", copy(lambda f: change_config(f, entry), gemma))),
        Refusal("trained for another base model", engine("another base model", from_another)),
        Refusal("fetch the serving router", engine("no weights of a router", copy(without, served))),
        Refusal("is not the serving router that", engine("weights of another router", other_shape)),
        Refusal(
            "--hf-overrides",
            engine("a budget among the processor's arguments", served, mm_processor_kwargs={"keep_visual_tokens": 0.5}),
        ),
    ]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# --- what is said -----------------------------------------------------------------------------------------------------


def keep_tables(rows: Sequence[Row], refused: Sequence[Refusal], parts: Path) -> None:
    """Keep a table of each kind, and print it."""
    head = {
        "plain": "| checkpoint | prompts equal | answers equal |\n|---|---:|---:|",
        "served": "| checkpoint with a router | equal | again, from caches | cached tokens |\n|---|---:|---:|---:|",
        "refused": "| what vLLM is asked | what it says |\n|---|---|",
    }
    lines: dict[str, list[str]] = {
        "plain": [line_of(row) for row in rows if row.kind == "plain"],
        "served": [line_of(row) for row in rows if row.kind == "served"],
        "refused": [f"| {one.engine['name']} | {shown(one.said)} |" for one in refused],
    }
    for kind, found in lines.items():
        if found:
            (parts / f"{kind}.md").write_text("\n".join([head[kind], *found]))
            print((parts / f"{kind}.md").read_text())


def line_of(row: Row) -> str:
    number = len(row.questions)
    if "start" in row.vllm:
        return f"| {row.name} | does not start: {shown(row.vllm['start'])} | – |"
    if row.kind == "plain":
        counts = [f"{row.equal(0, part)} of {number}" for part in ("prompt", "tokens")]
    else:
        counts = [f"{row.equal(i, 'tokens')} of {number}" for i in (0, 1)]
        counts.append(str(sum(answer.get("cached", 0) for answer in row.vllm["rounds"][1])))
    return f"| {row.name} | {' | '.join(counts)} |"


def shown(sentence: str) -> str:
    """Return a sentence without the paths of this run."""
    words = sentence.partition(": ")[2] or sentence
    return " ".join("DIR" if word.startswith(str(BUILD)) else word for word in words.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TYPES", help="llava,qwen3_vl: these types, and no refusals")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"of rows ({','.join(KINDS)}); the last table of each is kept"
    )
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="for each served type (100)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write, of the last tables of all kinds")
    options = parser.parse_args()
    names, kinds = options.only.split(",") if options.only else list(SIZES), options.kinds.split(",")
    python, work = make_environment(), BUILD / "work"
    (work / "images").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if "plain" in kinds:
        rows += [plain_row(name, work, 12) for name in names]
        rows += [] if options.only else reference_rows(work, 25)
    if "served" in kinds:
        rows += [row for name in names if name in SERVED for row in served_rows(name, work, options.questions)]
    refused = refusals(work) if "refused" in kinds and not options.only else []
    engines = [*(row.engine() for row in rows), *(one.engine for one in refused)]
    answers = run_in(python, "ask_vllm.py", engines, work)
    everything: list[Row | Refusal] = [*rows, *refused]
    for one, answer in zip(everything, answers, strict=True):
        one.vllm = answer
    for row in rows:
        row.ask_transformers()
    keep_tables(rows, refused, work)
    wrong = [line for row in rows for line in row.answered()]
    wrong += [f"{one.engine['name']}: {one.said}" for one in refused if one.sentence not in one.said]
    print("\n".join(wrong))
    if options.write:
        kept = {kind: work / f"{kind}.md" for kind in KINDS}
        tables = "\n\n".join(
            file.read_text() if file.exists() else f"The table of `--kinds {kind}` was not made yet."
            for kind, file in kept.items()
        )
        template = (ROOT / "examples" / "serving" / "document.template").read_text()
        options.write.write_text(template.replace("TABLES", tables))
    return 0 if all(row.holds for row in rows) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
