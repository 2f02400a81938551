"""How much faster several processes are than one, each with one thread: a compression by default, healing or a router.

    python examples/benchmarks/ranks.py --model DIR --calibration FILE --samples 64 --batch-size 2 --processes 2
    python examples/benchmarks/ranks.py --what heal --steps 100

Of a compression, answers, choice of layers, fold and reference answer are timed, with the model's loading, but no
imports and no writing. `heal` trains what is left of the model without its last layers but one, `route` the model as it
is; they are timed as a whole, with the original's answers and what process 0 writes. What they verify runs in a process
of its own, whose processor time is not counted. Wall time says something on idle cores alone. The processor time of the
process that took most does so on busy ones too: processes that wait for each other take none. It leaves out what a
process waits for another one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "digits" / "model"))
    parser.add_argument("--calibration", default=str(HERE / "digits" / "data" / "calibration.jsonl"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--drop-layers", type=int, default=3)
    parser.add_argument("--what", choices=["compress", "heal", "route"], default="compress")
    parser.add_argument("--steps", type=int, default=100, help="of healing, or of a router's training (100)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--smaller", type=Path, help=argparse.SUPPRESS)  # the checkpoint that is healed
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # a process that is timed
    options = parser.parse_args()
    if options.into is not None:
        wall, cpu = {"compress": compressing, "heal": training, "route": training}[options.what](options)
        figures = {"wall": wall, "cpu": cpu}
        (options.into / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as made:
        options.smaller = without_layers(options, Path(made)) if options.what == "heal" else None
        print_table(options)


def without_layers(options: argparse.Namespace, made: Path) -> Path:
    """Write the model without its last layers but one, which `heal` is to train."""
    from exporter import compress
    from exporter.checkpoints.source import open_source
    from exporter.plan import LayerBudget
    from exporter.recipe import NO_QUESTIONS, Method, Recipe

    last = open_source(options.model).num_layers - 1
    budget = LayerBudget(layers=tuple(range(last - options.drop_layers, last)))
    return compress(Recipe(options.model, NO_QUESTIONS, budget, fold=Method("none")), made / "smaller")


def print_table(options: argparse.Namespace) -> None:
    figures: dict[int, list[tuple[float, float]]] = {}
    for _ in range(options.repeats):
        for number in (1, *options.processes):
            figures.setdefault(number, []).append(run(options, number))
    print("| processes | wall s | CPU s of the busiest | throughput by wall | by CPU |")
    print("|---:|---:|---:|---:|---:|")
    medians = {
        number: [statistics.median(column) for column in zip(*rows, strict=True)] for number, rows in figures.items()
    }
    for number, (wall, cpu) in medians.items():
        print(f"| {number} | {wall:.1f} | {cpu:.1f} | {medians[1][0] / wall:.2f} | {medians[1][1] / cpu:.2f} |")


def run(options: argparse.Namespace, number: int) -> tuple[float, float]:
    """Return the wall time of a run, and the processor time of its process that took most."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(number)] if number > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        smaller = ["--smaller", str(options.smaller)] if options.smaller else []
        command = [sys.executable, *launcher, *sys.argv, *smaller, "--into", folder]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        rows = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    assert len(rows) == number
    return max(row["wall"] for row in rows), max(row["cpu"] for row in rows)


def compressing(options: argparse.Namespace) -> tuple[float, float]:
    """Return the wall time and the processor time of a compression, without its writing, in this process."""
    from exporter import ranks
    from exporter.compression.job import prepare
    from exporter.compression.steps import changes_of
    from exporter.plan import LayerBudget
    from exporter.recipe import CalibrationData, Recipe, RunOptions

    calibration = CalibrationData(options.calibration, samples=options.samples)
    recipe = Recipe(options.model, calibration, LayerBudget(drop_layers=options.drop_layers))
    with ranks.joined("compress", ["compress"], []):
        job = prepare(recipe, RunOptions(batch_size=options.batch_size))
        job.load_model()  # imports what it needs
        ranks.total(0)  # all begin together
        wall, cpu = time.monotonic(), time.process_time()
        changes_of(job)
        taken = time.monotonic() - wall, time.process_time() - cpu
        ranks.total(0)
    return taken


def training(options: argparse.Namespace) -> tuple[float, float]:
    """Return the wall time and the processor time of healing, or of a router's training, in this process."""
    import torch

    import exporter
    from exporter.checkpoints.source import open_source
    from exporter.models.loading import load_model
    from exporter.recipe import CalibrationData, HealRecipe, RouterRecipe

    calibration = CalibrationData(options.calibration, samples=options.samples)
    load_model(open_source(options.model), "cpu", torch.float32)  # imports what it needs
    wall, cpu = time.monotonic(), time.process_time()
    out = options.into / "made"
    if options.what == "heal":
        exporter.heal(options.smaller, HealRecipe(calibration, teacher=options.model, steps=options.steps), out)
    else:
        exporter.route(options.model, RouterRecipe(calibration, steps=options.steps), out)
    return time.monotonic() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
