"""Show that transformers.js answers as torch does, token for token, from folders of `onnx --layout transformers.js`.

    python examples/transformers_js/against_torch.py --write docs/transformers-js.md          (or: make js-test)

It installs the pinned client into build/transformers-js, makes a tiny random checkpoint of each type, exports it, and
asks both sides the same questions on the same pictures, greedily: the client in Node, with nothing but the folder, and
torch with the checkpoint. Torch is given the pixels that the client made, since the two resize by different methods;
how far the client's pixels are from the checkpoint's own is in the table. Prompts are tokenized by each side itself.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
HERE, BUILD = ROOT / "examples" / "transformers_js", ROOT / "build" / "transformers-js"
sys.path.insert(0, str(ROOT / "tests"))  # tiny_models

NEW_TOKENS = 12


@dataclass(frozen=True)
class Row:
    """A checkpoint and what is asked of it."""

    name: str
    size: tuple[int, int]  # width and height of the pictures
    questions: int = 25
    dtypes: tuple[str, ...] = ("fp32",)
    layers: int = 2
    external: bool = False  # weights in files of their own, however few they are


ROWS = (
    Row("llava", (40, 40), questions=100, dtypes=("fp32", "fp16", "q8", "q4", "q4f16")),
    Row("llava", (40, 40), external=True),
    Row("llava", (90, 61)),
    Row("idefics3", (48, 24)),
    Row("smolvlm", (48, 48)),
    Row("qwen2_vl", (50, 60)),
    Row("qwen2_5_vl", (60, 50)),
    Row("paligemma", (40, 40)),
    Row("gemma3", (64, 64), layers=3),
    Row("mistral3", (60, 40)),
)


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
    differing: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.prompts == self.questions and (self.equal == self.questions or self.dtype != "fp32")


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, env=os.environ | environment)


def install_client() -> str:
    """Install the client, without what its runtime would fetch for GPUs. Returns: its version."""
    package = BUILD / "node_modules" / "@huggingface" / "transformers" / "package.json"
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "answer.mjs"):
        shutil.copy(HERE / name, BUILD / name)
    pinned = json.loads((HERE / "package.json").read_text())["dependencies"]["@huggingface/transformers"]
    if not package.is_file() or json.loads(package.read_text())["version"] != pinned:
        skip = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
        call("npm", "install", "--no-audit", "--no-fund", cwd=BUILD, **skip)
    return str(json.loads(package.read_text())["version"])


# --- one row ----------------------------------------------------------------------------------------------------------


def exported(row: Row, folder: Path) -> tuple[Path, Path]:
    """Return a checkpoint and its folder for the client."""
    from tiny_models import build

    from exporter.onnx import ExportOptions, export
    from exporter.onnx.layouts import precisions

    source = build(row.name, folder / "checkpoint", layers=row.layers)
    before = precisions.EXTERNAL_FROM
    try:
        precisions.EXTERNAL_FROM = 1 if row.external else before
        quantize = ",".join(row.dtypes[1:]) or None
        return source, export(source, folder / "client", ExportOptions(layout="transformers.js", quantize=quantize))
    finally:
        precisions.EXTERNAL_FROM = before


def questions(row: Row, folder: Path) -> list[tuple[Image.Image, str, Path]]:
    """Return pictures, questions and the files that the pictures are in."""
    from tiny_models import QUESTIONS, random_image

    random = np.random.default_rng(0)
    asked = []
    for number in range(row.questions):
        image, path = random_image(random, row.size), folder / f"{number}.png"
        image.save(path)
        asked.append((image, QUESTIONS[number % len(QUESTIONS)], path))
    return asked


def ask_client(folder: Path, dtype: str, asked: list[tuple[Image.Image, str, Path]]) -> list[dict[str, Any]]:
    """Return what the client made of each question: prompt, pixels and the tokens of its answer."""
    messages = [
        {
            "image": str(path),
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}],
        }
        for _, q, path in asked
    ]
    job = {"folders": str(folder), "model": "client", "dtype": dtype, "new_tokens": NEW_TOKENS, "questions": messages}
    (folder / "job.json").write_text(json.dumps(job))
    call("node", "answer.mjs", folder / "job.json", folder / "answers.json", cwd=BUILD)
    answers: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text())
    return answers


def prepared(processor: Any, image: Image.Image, question: str) -> dict[str, torch.Tensor]:
    from tiny_models import conversation

    if processor.chat_template is None:
        inputs = processor(images=[image], text=["<image>" + question], return_tensors="pt")
    else:
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([conversation([image], question)], **options)
    return {name: value for name, value in inputs.items() if name != "labels"}


def compare(row: Row, folder: Path) -> list[Result]:
    """Ask both sides. Raises: CalledProcessError where the client fails."""
    import exporter
    from exporter.clean_room import load_processor

    source, client = exported(row, folder)
    asked, processor = questions(row, folder), load_processor(source)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    results = []
    for dtype in row.dtypes:
        result = Result(row, dtype)
        runner = exporter.onnx.load(client, precision=dtype)
        for (image, question, _), answer in zip(asked, ask_client(folder, dtype, asked), strict=True):
            add(result, model, runner, prepared(processor, image, question), answer)
        results.append(result)
        print(line(result), flush=True)
    return results


def add(result: Result, model: Any, runner: Any, inputs: dict[str, torch.Tensor], answer: dict[str, Any]) -> None:
    """Compare one answer, torch and our runner given the client's pixels."""
    result.questions += 1
    result.prompts += inputs["input_ids"][0].tolist() == answer["input_ids"]
    pixels = torch.from_numpy(np.frombuffer(base64.b64decode(answer["pixels"]), np.float32).copy())
    pixels = pixels.reshape(answer["dims"])
    result.pixels = max(result.pixels, float((pixels - inputs["pixel_values"]).abs().max()))
    inputs["pixel_values"] = pixels
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
    result.equal += expected == answer["tokens"]
    arrays = {name: value.numpy() for name, value in inputs.items()}
    ran = runner.generate(**arrays, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
    result.runner += ran == answer["tokens"]


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = ("type", "pictures", "precision", "prompts equal", "answers as torch's", "answers as our runner's",
           "pixels differ by at most")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|---|---|---|---:|---:|---:|---:|"


def line(result: Result) -> str:
    row, of = result.row, f"of {result.questions}"
    name = f"{row.name}{', weights in files of their own' if row.external else ''}"
    pixels = "0" if result.pixels == 0 else f"{result.pixels:.1g}"
    return (
        f"| {name} | {row.size[0]} x {row.size[1]} | {result.dtype} | {result.prompts} {of} | {result.equal} {of} | "
        f"{result.runner} {of} | {pixels} |"
    )


def document(results: list[Result], versions: dict[str, str]) -> str:
    template = (HERE / "document.template").read_text()
    table = "\n".join([HEAD, *map(line, results)])
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return template.replace("TABLE", table).replace("VERSIONS", made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write the table into")
    parser.add_argument("--types", metavar="TYPES", help="only these, with commas between them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    versions = {
        "@huggingface/transformers": install_client(),
        "Node": subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = [row for row in ROWS if options.types is None or row.name in options.types.split(",")]
    print(HEAD, flush=True)
    results = []
    for number, row in enumerate(rows):
        folder = BUILD / f"row-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        results += compare(row, folder)
    if options.write:
        options.write.write_text(document(results, versions))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
