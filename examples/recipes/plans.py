"""Print what the recipes beside this file would take, by `--dry-run`'s estimator, as a table. No weights are needed.

    python examples/recipes/plans.py [NAME ...] [--tflops 989 --utilisation 0.4 --gb-per-second 3]

For each recipe a checkpoint is written whose weights are holes (hollow.py), from what is public of the real one. It is
opened and checked as any other, and `exporter/compression/estimate.py` says what the recipe costs. Questions stand in
for `my-questions.jsonl`: as many as the recipe draws, without answers, each about a picture of `--picture` pixels.

No GPU is asked. `--tflops` is the published peak of an H100 SXM in bfloat16 without sparsity (989 TFLOPS, NVIDIA's data
sheet). `--utilisation` and `--gb-per-second` are assumptions: which part of the peak products of matrices reach, and
what a local disk reads and writes. Name those of your own machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hollow import QUESTION, published, write_hollow
from PIL import Image

from exporter.compression.estimate import Estimate, Rates, estimate
from exporter.compression.job import CompressionJob, prepare
from exporter.models.flops import active_parameters
from exporter.recipe import Recipe, RunOptions, load_recipe

HERE = Path(__file__).resolve().parent
GPU_BYTES = 80e9
SHARE = "72GB"  # that --memory allows on such a GPU


@dataclass(frozen=True)
class Row:
    """A recipe by its file, and what is published of its model."""

    name: str
    published: str  # parameters, to three digits
    memory: str | None = None  # what --memory allows; None: all layers fit
    batch_size: int | None = None  # questions at a time; None: the default


# Parameters are those of the safetensors files, as the hub shows them on each model's page.
ROWS = {
    row.name: row
    for row in (
        Row("smolvlm2-2.2b", "2.25B"),
        Row("llava-1.5-7b", "7.06B"),
        Row("llava-1.5-13b", "13.4B"),
        Row("qwen2.5-vl-7b", "8.29B"),
        Row("qwen3-vl-8b", "8.77B"),
        Row("gemma-3-27b", "27.4B"),
        Row("qwen3-vl-32b", "33.4B"),
        Row("qwen2.5-vl-72b", "73.4B", SHARE),
        Row("internvl3-78b", "78.4B", "70GB", batch_size=4),
        Row("qwen3-vl-235b-a22b", "236B", SHARE),
    )
}
HEAD = (
    "| recipe | parameters | of these run | after | weights, GB | after, GB | tokens a question | PFLOPs | memory, GB "
    "| reads of layers | read, GB | minutes |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all of them if none is named")
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of the GPU, in 10^12 a second (989)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of the peak that is reached (0.4)")
    parser.add_argument("--gb-per-second", type=float, default=3.0, help="of the disk (3)")
    parser.add_argument("--picture", default="1024x768", help="width and height of the pictures (1024x768)")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in ROWS]:
        parser.error(f"there is no recipe {unknown[0]}: {', '.join(ROWS)}.")
    rates = Rates(options.tflops * 1e12 * options.utilisation, options.gb_per_second * 1e9)
    width, height = map(int, options.picture.split("x"))
    print(HEAD)
    print("|---|" + "---:|" * (HEAD.count("|") - 2))
    for name in options.names or ROWS:
        with tempfile.TemporaryDirectory() as work:
            job = hollow_job(ROWS[name], Path(work), (width, height))
            print(line(name, job, estimate(job, rates)), flush=True)


def hollow_job(row: Row, work: Path, picture: tuple[int, int]) -> CompressionJob:
    """Return a recipe with everything opened and checked, for a model without weights and questions all alike.

    Args:
        work: a folder for both; picture: width and height.
    """
    recipe = load_recipe(HERE / f"{row.name}.yaml")
    folder = write_hollow(published(row.name), work / row.name)
    data = questions_like(recipe, work, picture)
    recipe = dataclasses.replace(
        recipe, model=str(folder), calibration=dataclasses.replace(recipe.calibration, data=str(data))
    )
    options = RunOptions(device="cpu", dtype="bfloat16", memory=row.memory)
    if row.batch_size is not None:
        options = dataclasses.replace(options, batch_size=row.batch_size)
    return dataclasses.replace(prepare(recipe, options), device="cuda")  # where it is to run; here nothing does


def questions_like(recipe: Recipe, work: Path, picture: tuple[int, int]) -> Path:
    """Write as many questions as a recipe draws, all about one picture."""
    Image.new("RGB", picture, (90, 120, 150)).save(work / "picture.png")
    path = work / "questions.jsonl"
    one = json.dumps({"image": "picture.png", "question": QUESTION})
    path.write_text(f"{one}\n" * (recipe.calibration.samples or 1))
    return path


def line(name: str, job: CompressionJob, guess: Estimate) -> str:
    """Return a row of the table."""
    inside = sum(job.source.parameters_per_layer)
    active = guess.parameters - inside + sum(active_parameters(job.source))
    reads = "-" if guess.bytes_to_read is None else f"{guess.sweeps}"
    read = "-" if guess.bytes_to_read is None else f"{guess.bytes_to_read / 1e9:,.0f}"
    return (
        f"| [{name}]({name}.yaml) | {guess.parameters / 1e9:,.2f}B | {active / 1e9:,.2f}B "
        f"| {guess.parameters_after / 1e9:,.2f}B | {guess.bytes / 1e9:,.1f} | {guess.bytes_after / 1e9:,.1f} "
        f"| {guess.tokens / len(job.calibration.samples):,.0f} | {guess.flops / 1e15:,.1f} "
        f"| {guess.memory_bytes / 1e9:,.1f} | {reads} | {read} | {guess.seconds / 60:,.1f} |"
    )


if __name__ == "__main__":
    main()
