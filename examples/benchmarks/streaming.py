"""What --memory costs: bytes of weights read over those of the checkpoint, and time over that of the model in memory.

    python examples/benchmarks/streaming.py --model DIR --calibration FILE --samples 64 512

Each number of questions is compressed by default, once with all of the model in memory and once with as little memory
as streaming takes: states and caches that wait are in a file. The two folders are compared tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from exporter import compress
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.compression.estimate import estimate
from exporter.compression.job import prepare
from exporter.models.loading import PartSizes
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RunOptions

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "digits" / "model"))
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--drop-layers", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unlabelled", action="store_true", help="leave out the questions' right answers")
    options = parser.parse_args()
    sizes = PartSizes.of(open_source(options.model), getattr(torch, options.dtype).itemsize)
    if sum(sizes.layers) + sizes.beside <= sizes.least:
        raise SystemExit(f"{options.model} has too few layers: streaming takes as much memory as all of it.")
    print("| questions | read ÷ checkpoint | told before | time ÷ in memory | largest difference |")
    print("|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as work:
        if options.unlabelled:
            options.calibration = unlabelled(Path(options.calibration), Path(work) / "unlabelled.jsonl")
        for samples in options.samples:
            print(row(options, samples, sizes.least), flush=True)


def unlabelled(calibration: Path, copy: Path) -> str:
    """Write the questions of a JSONL file without their answers."""
    lines = [json.loads(line) for line in calibration.read_text().splitlines()]
    for line in lines:
        line["image"] = str(calibration.absolute().parent / line["image"])
        line.pop("answer", None)
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(copy)


def row(options: argparse.Namespace, samples: int, least: int) -> str:
    data = CalibrationData(options.calibration, samples=samples)
    recipe = Recipe(options.model, data, LayerBudget(drop_layers=options.drop_layers))
    in_memory = RunOptions(device="cpu", dtype=options.dtype)
    streamed = RunOptions(device="cpu", dtype=options.dtype, memory=f"{least / 1000 + 1:.0f}KB")
    with tempfile.TemporaryDirectory() as work:
        told = estimate(prepare(recipe, streamed)).bytes_to_read or 0
        folders, seconds = [], []
        for name, run in (("whole", in_memory), ("streamed", streamed)):
            begin = time.perf_counter()
            folders.append(compress(recipe, Path(work) / name, run))
            seconds.append(time.perf_counter() - begin)
        records = [json.loads((folder / "compression.json").read_text()) for folder in folders]
        assert records[0]["plan"] == records[1]["plan"], "other layers were dropped"
        read, checkpoint = records[1]["measured"]["bytes_read"], records[1]["source"]["bytes"]
        return (
            f"| {samples} | {read / checkpoint:.1f} | {told / checkpoint:.1f} | {seconds[1] / seconds[0]:.2f} "
            f"| {difference(folders):.1g} |"
        )


def difference(folders: list[Path]) -> float:
    first, second = (open_weights(folder) for folder in folders)
    return max(float((first.read(name).float() - second.read(name).float()).abs().max()) for name in first.entries)


if __name__ == "__main__":
    main()
