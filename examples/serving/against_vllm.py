"""Show that vLLM answers as transformers does, token for token: plain checkpoints, and those with a serving router.

    python examples/serving/against_vllm.py --write docs/serving-vllm.md          (make serve-test)
    python examples/serving/against_vllm.py --only llava,qwen3_vl                 some types alone
    python examples/serving/against_vllm.py --folder DIR --task FILE.jsonl        a trained model of yours

It makes an environment with the real vLLM for the CPU in build/serving (`environment.py`), compresses a tiny random
checkpoint of each type and the trained reference model, and asks both sides greedily in float32: transformers here,
vLLM there, with files between them. Folders with a serving router are asked under budgets of all kinds, several
pictures and none, mixed in one batch, and all of it again, which vLLM then has in its caches; and what has to be
refused is asked for. A serving router is trained on the reference model, and what vLLM answers under its presets is
rated beside `evaluate`. Exit code 1: an answer differs (those of `rows.CAUSAL` have to be the ones of
causal attention), or something was answered that had to be refused.
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
from environment import BUILD, ROOT, call, make_environment, run_in
from in_transformers import prompts
from rows import Row, shown
from tiny_folders import SIZES, add_router, asked, build_wide, change_config
from trained import Questions, trained_rows

DIGITS = ROOT / "examples" / "digits"
KINDS = ("plain", "served", "trained", "refused")
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
# Layers of a type, and the one that goes: Gemma 3's sixth has no window, Qwen3-VL's first three take more of a picture.
LAYERS = {"gemma3": (6, 1), "qwen3_vl": (6, 4)}
COUNTS = (1, 2, 1, 0)  # of pictures, three questions each in turn
START = {"hf_overrides": {"serving_router": {"default": "serve-fast"}}}
# --- what is asked ----------------------------------------------------------------------------------------------------


def plain_row(name: str, work: Path, number: int) -> Row:
    """Return a compressed tiny checkpoint of a type with questions."""
    folder = work / "plain" / name
    small = folder / "small"
    if not small.exists():  # made once: remove build/serving/work to make all anew
        layers, drop = LAYERS.get(name, (4, 1))
        source = build_wide(name, fresh(folder) / "source", layers=layers)
        compressed(source, small, layers=(drop,))
    return Row("plain", name, small, list(asked(name, number, work / "images" / "plain")))


def reference_rows(work: Path, number: int) -> list[Row]:
    """Return the trained reference model, whole and without three of its layers, with questions of its test set."""
    from exporter.clean_room import load_processor
    from exporter.evaluation.metrics.task import measured_task
    from exporter.recipe import TaskData

    task = measured_task(TaskData(str(DIGITS / "data" / "test.jsonl")), number, seed=0)
    put = Questions(task, load_processor(DIGITS / "model"), work / "images" / "digits")
    questions = [put.under(i, {}, tell=False) for i in range(number)]
    small = work / "plain" / "digits" / "small"
    if not small.exists():
        compressed(DIGITS / "model", fresh(small.parent) / "small", layers=(3, 5, 7))
    return [
        Row("plain", "reference model", DIGITS / "model", questions),
        Row("plain", "reference model, 3 layers fewer", small, questions),
    ]


def reference_router(work: Path) -> Path:
    """Return the reference model with a serving router, trained by the command that a user gives."""
    folder = work / "trained" / "digits"
    if not folder.exists():  # made once
        data = DIGITS / "data" / "calibration.jsonl"
        flags = ("--serve", "--question-aware", "--samples", "512", "--steps", "100", "--quiet")
        call(
            sys.executable, "-m", "exporter", "route", DIGITS / "model", "--calibration", data, *flags, "--out", folder
        )
    return folder


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
    twice: dict[str, Any] = {"served": True, "times": 2}
    started = f"{name}, started with serve-fast"
    return [
        Row("served", name, folder, questions, options={"block_size": 32}, refused=refused, **twice),
        Row("served", started, folder, at_start, options=START, default={"preset": "serve-fast"}, **twice),
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
    change_config(other_shape, {"serving_router": {"bottleneck": 32, "num_heads": 4, "pooled": True}})

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
    """Keep a table of each kind, with the lines of earlier runs that this one has not made anew, and print it."""
    head = {
        "plain": "| checkpoint | prompts equal | answers equal |\n|---|---:|---:|",
        "served": "| checkpoint with a router | equal | again, from caches | cached tokens |\n|---|---:|---:|---:|",
        "trained": "| trained model | equal | again, from caches | right by vLLM | right by `evaluate` |"
        "\n|---|---:|---:|---:|---:|",
        "refused": "| what vLLM is asked | what it says |\n|---|---|",
    }
    lines = {kind: [line for row in rows if row.kind == kind for line in row.lines()] for kind in KINDS}
    lines["refused"] = [f"| {one.engine['name']} | {shown(one.said)} |" for one in refused]
    for kind, found in lines.items():
        if found:
            file = parts / f"{kind}.md"
            new = {name_of(line): line for line in found}
            before = file.read_text().splitlines()[2:] if file.exists() and kind in ("plain", "served") else []
            kept = {name_of(line): line for line in before}
            file.write_text("\n".join([head[kind], *(kept | new).values()]))
            print("\n".join([head[kind], *found]))


def name_of(line: str) -> str:
    """Return the first cell of a table's line."""
    return line.split("|")[1].strip()


def asked_rows(options: argparse.Namespace, work: Path) -> list[Row]:
    """Return the rows that the command line asks for."""
    if options.folder:
        return list(trained_rows(options.folder.name, options.folder, options.task, options.questions, work, BUDGETS))
    names, kinds = options.only.split(",") if options.only else [*SIZES, "reference"], options.kinds.split(",")
    rows: list[Row] = []
    if "plain" in kinds:
        rows += [plain_row(name, work, 12) for name in names if name in SIZES]
        rows += reference_rows(work, 25) if "reference" in names else []
    if "served" in kinds:
        rows += [row for name in names if name in SERVED for row in served_rows(name, work, options.questions)]
    if "trained" in kinds and not options.only:
        task = DIGITS / "data" / "validation.jsonl"
        rows += trained_rows("reference model", reference_router(work), task, options.questions, work, BUDGETS)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TYPES", help="llava,qwen3_vl,reference: these types, and no refusals")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"of rows ({','.join(KINDS)}); the last line of each row is kept"
    )
    parser.add_argument(
        "--questions", type=int, default=100, metavar="N", help="for each served or trained model (100)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write, of the last tables of all kinds")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="only this trained checkpoint, with a router or not")
    parser.add_argument("--task", type=Path, metavar="FILE", help="its questions with answers")
    options = parser.parse_args()
    if (options.folder is None) != (options.task is None):
        parser.error("--folder and --task belong together: a checkpoint and the file of its questions.")
    if options.folder and (options.only or options.write):
        parser.error("--folder asks one checkpoint and writes no document: leave --only and --write out.")
    python, work = make_environment(), BUILD / ("own" if options.folder else "work")
    (work / "images").mkdir(parents=True, exist_ok=True)
    rows = asked_rows(options, work)
    refused = refusals(work) if "refused" in options.kinds.split(",") and not (options.only or options.folder) else []
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
