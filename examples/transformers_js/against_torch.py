"""Show that transformers.js answers as torch does, token for token, from folders of `onnx --layout transformers.js`.

    python examples/transformers_js/against_torch.py --write docs/transformers-js.md          (make js-test)
    python examples/transformers_js/against_torch.py --model FOLDER --questions FILE          a trained model of yours
    python examples/transformers_js/against_torch.py --types llava --preset serve-fast        rows with a budget only

It installs the pinned client into build/transformers-js, makes a tiny random checkpoint of each type, exports it and
the trained reference model, and asks both sides the same questions on the same pictures, greedily: the client in Node,
with nothing but the folder, and torch with the checkpoint. Torch is given the pixels that the client made, since the
two resize by different methods; how far the client's pixels are from the checkpoint's own is in the table. Where the
client shows a picture as one square, the checkpoint's processor is given it as a square too. Prompts are tokenized by
each side itself. At the end the page of examples/web is asked in a browser, where one is installed.
Exit code 1: an answer or a prompt differs where the weights are the same.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
HERE, BUILD = ROOT / "examples" / "transformers_js", ROOT / "build" / "transformers-js"
DIGITS = ROOT / "examples" / "digits"
sys.path.insert(0, str(ROOT / "tests"))  # tiny_models

NEW_TOKENS = 12
ALL = ("fp32", "fp16", "q8", "q4", "q4f16")


@dataclass(frozen=True)
class Row:
    """A checkpoint and what is asked of it."""

    name: str
    size: tuple[int, int] = (0, 0)  # width and height of the pictures of a tiny model
    questions: int = 25
    dtypes: tuple[str, ...] = ("fp32",)
    layers: int = 2
    external: bool = False  # weights in files of their own, however few they are
    trained: Path | None = None  # a checkpoint of its own, and the file with its questions
    asked: Path | None = None
    preset: str | None = None  # budget of a serving router: that of the checkpoint, or a random one for a tiny model

    @property
    def title(self) -> str:
        external = ", weights in files of their own" if self.external else ""
        return self.name + external + (f", {self.preset}" if self.preset else "")


ROWS = (
    Row("llava", (40, 40), questions=100, dtypes=ALL),
    Row("llava", (40, 40), external=True),
    Row("llava", (90, 61)),
    Row("llava", (40, 40), preset="serve-fast"),
    Row("llava", (40, 40), preset="serve-balanced"),
    Row("llava_onevision", (24, 24)),
    Row("llava_onevision", (50, 30)),
    Row("idefics3", (48, 24)),
    Row("smolvlm", (48, 48)),
    Row("qwen2_vl", (50, 60)),
    Row("qwen2_5_vl", (60, 50)),
    Row("paligemma", (40, 40)),
    Row("gemma3", (64, 64), layers=3),
    Row("mistral3", (60, 40)),
)
REFERENCE = Row("llava_next", questions=100, dtypes=ALL, trained=DIGITS / "model", asked=DIGITS / "data" / "test.jsonl")


@dataclass(frozen=True)
class Question:
    """A question on one picture, and the file that the client reads the picture from."""

    image: Image.Image
    chat: list[dict[str, Any]]
    path: Path
    sample: Any = None  # of a trained model's data, with the right answers


@dataclass
class Result:
    """What was found for a row and a precision."""

    row: Row
    dtype: str
    questions: int = 0
    prompts: int = 0  # token ids of both sides are the same
    equal: int = 0  # answers of both sides are the same
    pixels: float = 0.0  # largest difference of the client's pixels from the checkpoint's processor's
    runner: int = 0  # answers equal to those of the same graphs in Python
    right: int = 0  # of the client's answers
    right_in_torch: int = 0  # with the pictures as the checkpoint's own processor makes them, tiles and all

    @property
    def holds(self) -> bool:
        return self.prompts == self.questions and (self.equal == self.questions or self.dtype != "fp32")


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, env=os.environ | environment)


def install_client() -> str:
    """Install the pinned packages, without what the client's runtime would fetch for GPUs. Returns: its version."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "answer.mjs"):
        shutil.copy(HERE / name, BUILD / name)
    package = json.loads((HERE / "package.json").read_text())
    pinned: dict[str, str] = package["dependencies"] | package["devDependencies"]
    if pinned != {name: installed_version(name) for name in pinned}:
        if shutil.which("npm") is None:
            raise SystemExit("npm is not on the path: it comes with Node, of which version 20 or newer is needed.")
        skip = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
        try:
            call("npm", "install", "--no-audit", "--no-fund", cwd=BUILD, **skip)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"npm could not install the client into {BUILD}: its own words stand above.") from error
    return pinned["@huggingface/transformers"]


def installed_version(name: str) -> str | None:
    file = BUILD / "node_modules" / name / "package.json"
    return json.loads(file.read_text())["version"] if file.is_file() else None


# --- one row ----------------------------------------------------------------------------------------------------------


def exported(row: Row, folder: Path) -> tuple[Path, Path]:
    """Return a checkpoint and its folder for the client."""
    from tiny_models import build

    from exporter.onnx import ExportOptions, export
    from exporter.onnx.layouts import precisions

    source = row.trained or build(row.name, folder / "checkpoint", layers=row.layers)
    if row.preset and not row.trained:
        sys.path.insert(0, str(ROOT / "examples" / "serving"))
        from tiny_folders import add_router

        add_router(source, pooled=True)
    before = precisions.EXTERNAL_FROM
    try:
        precisions.EXTERNAL_FROM = 1 if row.external else before
        quantize = ",".join(row.dtypes[1:]) or None
        options = ExportOptions(layout="transformers.js", quantize=quantize, preset=row.preset)
        return source, export(source, folder / "client", options)
    finally:
        precisions.EXTERNAL_FROM = before


def questions(row: Row, folder: Path) -> list[Question]:
    """Return questions on pictures, saved for the client: of a trained model's data, else on blocks of color."""
    from tiny_models import QUESTIONS, random_image

    from exporter.data.calibration import load_calibration

    asked = []
    if row.asked is not None:
        for number, sample in enumerate(load_calibration(row.asked, samples=row.questions).samples):
            (image,) = sample.open_images()
            asked.append(Question(image, sample.chat(), folder / f"{number}.png", sample))
    else:
        random = np.random.default_rng(0)
        for number in range(row.questions):
            content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
            chat = [{"role": "user", "content": content}]
            asked.append(Question(random_image(random, row.size), chat, folder / f"{number}.png"))
    for question in asked:
        question.image.save(question.path)
    return asked


def ask_client(folder: Path, dtype: str, asked: list[Question]) -> list[dict[str, Any]]:
    """Return what the client made of each question: prompt, pixels, the tokens of its answer and its text."""
    messages = [{"image": str(question.path), "messages": question.chat} for question in asked]
    job = {"folders": str(folder), "model": "client", "dtype": dtype, "new_tokens": NEW_TOKENS, "questions": messages}
    (folder / "job.json").write_text(json.dumps(job))
    call("node", "answer.mjs", folder / "job.json", folder / "answers.json", cwd=BUILD)
    answers: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text())
    return answers


class Torch:
    """The checkpoint in torch. What it has answered once it does not compute again: precisions share their pixels."""

    def __init__(self, source: Path, client: Path, preset: str | None) -> None:
        from transformers import AutoModelForImageTextToText

        from exporter.checkpoints.source import open_source
        from exporter.clean_room import load_processor
        from exporter.routing.serving.folder import load_served

        if preset:
            self.model = load_served(open_source(str(source)), "cpu", torch.float32)
            self.model.set_budget(preset)
        else:
            self.model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
        self.served = bool(preset)
        self.processor = load_processor(source)
        vision = json.loads((client / "onnx.json").read_text())["vision"]
        self.side = vision["tile"] if vision["kind"] == "square" else None  # of the square that the client shows
        self.answers: dict[Any, list[int]] = {}

    def prepared(self, question: Question, as_the_client: bool = True) -> dict[str, torch.Tensor]:
        from exporter.clean_room import encode

        image = question.image
        if as_the_client and self.side:
            image = image.resize((self.side, self.side))
        return encode(self.processor, [question.chat], [[image]])

    def seen(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the ids that the decoder is given: in the served form, without the placeholders of rows that left."""
        if not self.served:
            return inputs["input_ids"]
        shorter = self.model._compacted(inputs, self.model.budget, None)
        assert shorter is not None
        return shorter[0]["input_ids"]

    def answer(self, inputs: dict[str, torch.Tensor]) -> list[int]:
        key = tuple(inputs[name].numpy().tobytes() for name in ("input_ids", "pixel_values"))
        if key not in self.answers:
            length = inputs["input_ids"].shape[1]
            sequences = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            self.answers[key] = sequences[0, length:].tolist()
        return self.answers[key]


def compare(row: Row, folder: Path) -> list[Result]:
    """Ask both sides. Raises: CalledProcessError where the client fails."""
    import exporter

    source, client = exported(row, folder)
    asked, reference = questions(row, folder), Torch(source, client, row.preset)
    results = []
    for dtype in row.dtypes:
        result = Result(row, dtype)
        runner = exporter.onnx.load(client, precision=dtype)
        for question, answer in zip(asked, ask_client(folder, dtype, asked), strict=True):
            add(result, reference, runner, question, answer)
            if question.sample is not None:
                add_right(result, reference, question, answer["text"])
        results.append(result)
        print(line(result), flush=True)
    return results


def add(result: Result, reference: Torch, runner: Any, question: Question, answer: dict[str, Any]) -> None:
    """Compare one answer, torch and our runner given the client's pixels."""
    inputs = reference.prepared(question)
    result.questions += 1
    seen = reference.seen(inputs)
    result.prompts += seen[0].tolist() == answer["input_ids"]
    pixels = torch.from_numpy(np.frombuffer(base64.b64decode(answer["pixels"]), np.float32).copy())
    pixels = pixels.reshape(answer["dims"])
    if reference.side:  # the overview, and the same as its one tile
        pixels = torch.stack([pixels, pixels], 1)
    result.pixels = max(result.pixels, float((pixels - inputs["pixel_values"]).abs().max()))
    inputs["pixel_values"] = pixels
    result.equal += reference.answer(inputs) == answer["tokens"]
    inputs |= {"input_ids": seen, "attention_mask": torch.ones_like(seen)}
    arrays = {name: value.numpy() for name, value in inputs.items()}
    length = seen.shape[1]
    ran = runner.generate(**arrays, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
    result.runner += ran == answer["tokens"]


def add_right(result: Result, reference: Torch, question: Question, text: str) -> None:
    """Count what both sides got right, torch with what the checkpoint's own processor makes of the picture."""
    from exporter.evaluation.metrics.table import exact

    tokens = reference.answer(reference.prepared(question, as_the_client=False))
    own = reference.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    result.right += int(exact(question.sample, text))
    result.right_in_torch += int(exact(question.sample, own))


# --- the tables -------------------------------------------------------------------------------------------------------

COMPARED = ("precision", "prompts equal", "answers as torch's", "answers as our runner's", "pixels differ by at most")
TINY, TRAINED = ("type", "pictures", *COMPARED), ("type", *COMPARED, "right in torch", "right in the client")


def head(row: Row) -> str:
    columns = TRAINED if row.trained else TINY
    texts = 1 if row.trained else 2
    return f"| {' | '.join(columns)} |\n|{'---|' * (texts + 1)}{'---:|' * (len(columns) - texts - 1)}"


def line(result: Result) -> str:
    row, of = result.row, f"of {result.questions}"
    name = row.title
    pixels = "0" if result.pixels == 0 else f"{result.pixels:.1g}"
    cells = [name] if row.trained else [name, f"{row.size[0]} x {row.size[1]}"]
    cells += [result.dtype, f"{result.prompts} {of}", f"{result.equal} {of}", f"{result.runner} {of}", pixels]
    if row.trained:
        cells += [f"{result.right_in_torch} {of}", f"{result.right} {of}"]
    return f"| {' | '.join(cells)} |"


def table(results: list[Result]) -> str:
    return "\n".join([head(results[0].row), *map(line, results)])


def document(results: list[Result], versions: dict[str, str], page: str) -> str:
    template = (HERE / "document.template").read_text()
    tiny, trained = ([r for r in results if bool(r.row.trained) is wanted] for wanted in (False, True))
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = {"TRAINED": table(trained), "TABLE": table(tiny), "VERSIONS": made, "PAGE": page}
    for name, part in parts.items():
        template = template.replace(name, part)
    return template


def versions_here() -> dict[str, str]:
    import transformers

    return {
        "@huggingface/transformers": install_client(),
        "Node": subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def page_asked(folder: Path) -> tuple[str, bool]:
    """Return what was found where a browser showed the page, in a sentence, and whether it is as it should be."""
    sys.path.insert(0, str(ROOT / "examples" / "web"))
    from in_a_browser import asked

    return asked(folder)


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Return what is compared: everything, some types, or one trained model."""
    if options.model is not None:
        name = json.loads((options.model / "config.json").read_text())["model_type"]
        model = {"trained": options.model, "asked": options.questions, "preset": options.preset}
        return [Row(name, questions=options.count, dtypes=ALL, **model)]
    rows = [row for row in (*ROWS, REFERENCE) if options.types is None or row.name in options.types.split(",")]
    return [row for row in rows if options.preset is None or row.preset == options.preset]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write the tables into")
    parser.add_argument("--types", metavar="TYPES", help="only these, with commas between them")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="only this trained checkpoint, in all precisions")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="its questions, with one picture each")
    parser.add_argument(
        "--preset", metavar="NAME", help="with the budget of its serving router; only rows that have it"
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="how many of them (100)")
    options = parser.parse_args()
    if (options.model is None) != (options.questions is None):
        parser.error("--model and --questions belong together: a checkpoint and the file of its questions.")
    if options.write and (options.model or options.types or options.preset):
        parser.error("--write takes the whole of it: leave --model, --types and --preset out.")
    return options


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    versions, rows = versions_here(), rows_of(options)
    results: list[Result] = []
    for number, row in enumerate(rows):
        folder = BUILD / f"row-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if not results or bool(row.trained) is not bool(results[-1].row.trained):
            print(head(row), flush=True)
        results += compare(row, folder)
    page, page_holds = page_asked(folder / "client") if rows[-1] is REFERENCE else ("", True)
    if page:
        print(page)
    if options.write:
        options.write.write_text(document(results, versions, page))
    return 0 if page_holds and all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
