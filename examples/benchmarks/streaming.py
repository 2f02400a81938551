"""What --memory costs: bytes of weights read over those of the checkpoint, and time over that of the model in memory.

    python examples/benchmarks/streaming.py --model DIR --calibration FILE --samples 64 512

Each number of questions is compressed by default, once with all of the model in memory and once with as little memory
as streaming takes: states and caches that wait are in a file. The two folders are compared tensor by tensor.

`--layers 3 5 8` allows so many layers' worth of memory beside what is no decoder layer, a row each, and tells what the
stages read. Three are the least.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from stage_meter import measured_stages

from exporter import compress
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.compression.estimate import estimate
from exporter.compression.job import prepare
from exporter.models.loading import AT_ONCE, PartSizes
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RunOptions

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "digits" / "model"))
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--drop-layers", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[AT_ONCE], help="that --memory has room for (3)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unlabelled", action="store_true", help="leave out the questions' right answers")
    options = parser.parse_args()
    sizes = PartSizes.of(open_source(options.model), getattr(torch, options.dtype).itemsize)
    if not AT_ONCE <= min(options.layers) <= max(options.layers) < len(sizes.layers):
        raise SystemExit(f"streaming {options.model} takes {AT_ONCE} to {len(sizes.layers) - 1} layers of memory.")
    print("| questions | layers in memory | read ÷ checkpoint | told before | time ÷ in memory | largest difference |")
    print("|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as work:
        if options.unlabelled:
            options.calibration = unlabelled(Path(options.calibration), Path(work) / "unlabelled.jsonl")
        for samples in options.samples:
            for line in rows(options, samples, sizes):
                print(line, flush=True)


def unlabelled(calibration: Path, copy: Path) -> str:
    """Write the questions of a JSONL file without their answers."""
    lines = [json.loads(line) for line in calibration.read_text().splitlines()]
    for line in lines:
        line["image"] = str(calibration.absolute().parent / line["image"])
        line.pop("answer", None)
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(copy)


def rows(options: argparse.Namespace, samples: int, sizes: PartSizes) -> Iterator[str]:
    data = CalibrationData(options.calibration, samples=samples)
    recipe = Recipe(options.model, data, LayerBudget(drop_layers=options.drop_layers))
    in_memory = RunOptions(device="cpu", dtype=options.dtype)
    with tempfile.TemporaryDirectory() as work:
        whole, whole_seconds, _ = timed(recipe, Path(work) / "whole", in_memory)
        for layers in options.layers:
            allowed = sizes.beside + layers * max(sizes.layers)
            streamed = RunOptions(device="cpu", dtype=options.dtype, memory=f"{allowed / 1000 + 1:.0f}KB")
            told = estimate(prepare(recipe, streamed)).bytes_to_read or 0
            folder, seconds, by_stage = timed(recipe, Path(work) / f"streamed{layers}", streamed)
            records = [json.loads((made / "compression.json").read_text()) for made in (whole, folder)]
            assert records[0]["plan"] == records[1]["plan"], "other layers were dropped"
            read, checkpoint = records[1]["measured"]["bytes_read"], records[1]["source"]["bytes"]
            yield (
                f"| {samples} | {layers} | {read / checkpoint:.1f} | {told / checkpoint:.1f} "
                f"| {seconds / whole_seconds:.2f} | {difference([whole, folder]):.1g} |"
            )
            stages = [f"{name} {num_bytes / checkpoint:.2f}" for name, num_bytes in by_stage.items() if num_bytes]
            print(f"  {layers} layers: {', '.join(stages)}", file=sys.stderr, flush=True)


def timed(recipe: Recipe, out: Path, run: RunOptions) -> tuple[Path, float, dict[str, int]]:
    """Return the folder, the seconds that it took, and the bytes of weights that each stage has read."""
    begin = time.perf_counter()
    with measured_stages() as meter:
        folder = compress(recipe, out, run)
    return folder, time.perf_counter() - begin, {name: taken.bytes_read for name, taken in meter.stages.items()}


def difference(folders: list[Path]) -> float:
    first, second = (open_weights(folder) for folder in folders)
    return max(float((first.read(name).float() - second.read(name).float()).abs().max()) for name in first.entries)


if __name__ == "__main__":
    main()
