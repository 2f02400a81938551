"""Compare onnxruntime-genai with torch: the same prompts, pixels and greedy tokens, for each type that it has.

    pip install onnxruntime-genai
    python examples/genai/genai_against_torch.py --write docs/genai.md         # tiny random models
    python examples/genai/genai_against_torch.py --types gemma3                # some of them
    python examples/genai/genai_against_torch.py --model DIR --questions FILE  # a trained model of yours

Each checkpoint is exported, and the library answers twice: with what transformers' processor made of a question, and
with the question's text and picture alone, which its own tokenizer and image processor prepare. Lines of the document's
table are kept type by type in build/genai, and --write writes the last of each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
HERE, BUILD = ROOT / "examples" / "genai", ROOT / "build" / "genai"
LINES = BUILD / "lines"
sys.path.insert(0, str(ROOT / "tests"))  # tiny models

NEW_TOKENS = 12
ALL = ("fp32", "fp16", "q8", "q4", "q4f16")
PICTURE = ("pixel_values", "image_grid_thw", "image_sizes")


@dataclass(frozen=True)
class Row:
    """A checkpoint and what is asked of it."""

    name: str
    sizes: tuple[tuple[int, int], ...] = ((0, 0),)  # width and height of the pictures of a tiny model, a line each
    questions: int = 25  # about pictures of each size
    dtypes: tuple[str, ...] = ("fp32",)
    trained: Path | None = None  # a checkpoint of its own, and the file with its questions
    asked: Path | None = None


ROWS = (
    Row("mistral3", ((60, 40), (90, 61))),
    Row("qwen3_vl", ((60, 50), (90, 61))),
    Row("gemma3", ((64, 64), (90, 61))),
    Row("qwen2_5_vl", ((60, 50), (90, 61), (45, 61)), dtypes=ALL),
    Row("qwen2_vl", ((60, 50), (90, 61))),
)


@dataclass(frozen=True)
class Question:
    """A question on one picture, and the file that the library reads the picture from."""

    image: Image.Image
    chat: list[dict[str, Any]]
    path: Path


@dataclass
class Result:
    """What was found for a row and a precision."""

    row: Row
    size: tuple[int, int]
    dtype: str
    reads: bool  # the library's own processor can put questions to the model
    questions: int = 0
    given: int = 0  # answers as torch's, with what transformers' processor made
    runner: int = 0  # of these, as the same graphs' in our runner
    prompts: int = 0  # prompts of the library's own processor as transformers'
    pixels: float = 0.0  # largest difference of its pixels, where a picture has the same size
    own: int = 0  # answers as torch's, torch with transformers' pixels, the library with its own

    @property
    def holds(self) -> bool:
        return self.runner == self.questions and (self.given == self.questions or self.dtype != "fp32")


class Library:
    """onnxruntime-genai on a folder."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        self.og, self.model = og, og.Model(str(folder))
        self.image_token_id = json.loads((folder / "genai_config.json").read_text())["model"]["image_token_id"]
        self.reads = not json.loads((folder / "onnx.json").read_text())["client"]["limits"]
        if self.reads:
            self.tokenizer, self.processor = og.Tokenizer(self.model), self.model.create_multimodal_processor()

    def answer(self, tensors: Any, length: int) -> list[int]:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=length + NEW_TOKENS, do_sample=False)
        generator = self.og.Generator(self.model, params)
        generator.set_inputs(tensors)
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens

    def given(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Return what transformers' processor made, as the library takes it."""
        tensors = self.og.NamedTensors()
        for name in PICTURE:
            if name in inputs:
                tensors[name] = np.ascontiguousarray(inputs[name].numpy())
        tensors["num_image_tokens"] = np.array([int((inputs["input_ids"] == self.image_token_id).sum())])
        tensors["input_ids"] = inputs["input_ids"].numpy().astype(np.int32)
        return tensors

    def prepared(self, question: Question) -> Any:
        """Return what the library's own tokenizer and processor make of a question."""
        text = self.tokenizer.apply_chat_template(json.dumps(question.chat), add_generation_prompt=True)
        return self.processor(text, images=self.og.Images.open(str(question.path)))


class Torch:
    """The checkpoint in torch. What it has answered once it does not compute again, in whatever precision."""

    def __init__(self, source: Path) -> None:
        from transformers import AutoModelForImageTextToText

        from exporter.clean_room import load_processor

        self.model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
        self.processor = load_processor(source)
        self.answers: dict[Path, list[int]] = {}

    def prepared(self, question: Question) -> dict[str, torch.Tensor]:
        from exporter.clean_room import encode

        return encode(self.processor, [question.chat], [[question.image]])

    def answer(self, question: Question, inputs: dict[str, torch.Tensor]) -> list[int]:
        if question.path not in self.answers:
            sequences = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            self.answers[question.path] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return self.answers[question.path]


def questions(row: Row, size: tuple[int, int], folder: Path) -> list[Question]:
    """Return questions on pictures, saved for the library: of a trained model's data, else on blocks of color."""
    from tiny_models import QUESTIONS, random_image

    from exporter.data.calibration import load_calibration

    asked = []
    prefix = f"{size[0]}x{size[1]}"
    if row.asked is not None:
        for number, sample in enumerate(load_calibration(row.asked, samples=row.questions).samples):
            (image,) = sample.open_images()
            asked.append(Question(image, sample.chat(), folder / f"{prefix}-{number}.png"))
    else:
        random = np.random.default_rng(0)
        for number in range(row.questions):
            content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
            chat = [{"role": "user", "content": content}]
            asked.append(Question(random_image(random, size), chat, folder / f"{prefix}-{number}.png"))
    for question in asked:
        question.image.save(question.path)
    return asked


def exported(source: Path, place: Path, dtype: str) -> Path:
    """Return a checkpoint's folder in a precision. Graphs in float32 are traced once, for all of them."""
    from exporter.onnx import ExportOptions, export
    from exporter.onnx.layouts import genai

    def copied(model: Any, support: Any, folder: Path, opset: int) -> None:
        for path in (*(place / "fp32").glob("*.onnx"), *(place / "fp32").glob("*.data")):
            shutil.copy(path, folder)

    if dtype == "fp32":
        return export(source, place / dtype, ExportOptions(layout="genai"))
    traced, genai.write_graphs = genai.write_graphs, copied
    try:
        return export(source, place / dtype, ExportOptions(layout="genai", quantize=dtype))
    finally:
        genai.write_graphs = traced


def compare(row: Row, folder: Path) -> list[Result]:
    """Ask both sides, in each precision."""
    from fixtures.byte_pairs import build_with_byte_pairs

    import exporter

    source = row.trained or build_with_byte_pairs(row.name, folder / "checkpoint")
    asked, reference = {size: questions(row, size, folder) for size in row.sizes}, Torch(source)
    results = []
    for dtype in row.dtypes:
        made = exported(source, folder, dtype)
        library, runner = Library(made), exporter.onnx.load(made)
        for size in row.sizes:
            results.append(compared(Result(row, size, dtype, library.reads), asked[size], reference, library, runner))
            print(line(results[-1]), flush=True)
    return results


def compared(result: Result, asked: list[Question], reference: Torch, library: Library, runner: Any) -> Result:
    """Put questions to all three."""
    for question in asked:
        inputs = reference.prepared(question)
        expected, length = reference.answer(question, inputs), inputs["input_ids"].shape[1]
        answer = library.answer(library.given(inputs), length)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        ran = runner.generate(**arrays, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
        result.questions += 1
        result.given += answer == expected
        result.runner += answer == ran
        if library.reads:
            add_own(result, library, question, inputs=inputs, expected=expected)
    return result


def add_own(
    result: Result, library: Library, question: Question, inputs: dict[str, torch.Tensor], expected: list[int]
) -> None:
    """Compare what the library makes of a question's text and picture."""
    made = library.prepared(question)
    ids, pixels = made["input_ids"].as_numpy()[0].tolist(), made["pixel_values"].as_numpy()
    result.prompts += ids == inputs["input_ids"][0].tolist()
    if pixels.shape == tuple(inputs["pixel_values"].shape):
        result.pixels = max(result.pixels, float(np.abs(pixels - inputs["pixel_values"].numpy()).max()))
    result.own += library.answer(made, len(ids)) == expected


# --- the tables -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "type", "pictures", "precision", "answers as torch's", "as our runner's", "own processor: prompts equal",
    "pixels differ by at most", "answers as torch's, own processor",
)  # fmt: skip


def head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * 3}{'---:|' * 5}"


def line(result: Result) -> str:
    row, of = result.row, f"of {result.questions}"
    pictures = "its own" if row.trained else f"{result.size[0]} x {result.size[1]}"
    cells = [row.name, pictures, result.dtype, f"{result.given} {of}", f"{result.runner} {of}"]
    pixels = "0" if result.pixels < 1e-6 else f"{result.pixels:.1g}"
    cells += [f"{result.prompts} {of}", pixels, f"{result.own} {of}"] if result.reads else ["–"] * 3
    return f"| {' | '.join(cells)} |"


def document() -> str:
    """Return the document with the last lines of each type."""
    import onnxruntime
    import onnxruntime_genai as og
    import transformers

    versions = {
        "onnxruntime-genai": og.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    missing = "| {} | not run yet |" + " |" * (len(COLUMNS) - 2)
    files = {row.name: LINES / f"{row.name}.md" for row in ROWS}
    lines = [file.read_text() if file.exists() else missing.format(name) for name, file in files.items()]
    parts = {
        "TABLE": "\n".join([head(), *lines]),
        "VERSIONS": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    template = (HERE / "document.template").read_text()
    for name, part in parts.items():
        template = template.replace(name, part)
    return template


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Return what is compared: everything, some types, or one trained model."""
    if options.model is not None:
        name = json.loads((options.model / "config.json").read_text())["model_type"]
        dtypes = tuple(name for name in ALL if name in options.dtypes.split(","))
        return [Row(name, questions=options.count, dtypes=dtypes, trained=options.model, asked=options.questions)]
    return [row for row in ROWS if options.types is None or row.name in options.types.split(",")]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write the table into")
    parser.add_argument("--types", metavar="TYPES", help="only these, with commas between them")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="only this trained checkpoint")
    parser.add_argument("--dtypes", default=",".join(ALL), help=f"its precisions, fp32 among them ({','.join(ALL)})")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="its questions, with one picture each")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="how many of them (100)")
    options = parser.parse_args()
    if (options.model is None) != (options.questions is None):
        parser.error("--model and --questions belong together: a checkpoint and the file of its questions.")
    if unknown := [name for name in options.dtypes.split(",") if name not in ALL]:
        parser.error(f"--dtypes {unknown[0]}: there are {', '.join(ALL)}.")
    if "fp32" not in options.dtypes.split(","):
        parser.error("--dtypes: the graphs in fp32 are what the others are made of; name it, too.")
    if options.write and options.model:
        parser.error("--write writes what tiny models showed: leave --model out.")
    return options


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    print(head(), flush=True)
    results: list[Result] = []
    for number, row in enumerate(rows_of(options)):
        folder = BUILD / f"row-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        these = compare(row, folder)
        results += these
        if row.trained is None:
            LINES.mkdir(parents=True, exist_ok=True)
            (LINES / f"{row.name}.md").write_text("\n".join(map(line, these)))
        if options.write:
            options.write.write_text(document())
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
