"""How much faster several processes are than one, each with one thread: a compression by default, without its writing.

    python examples/benchmarks/ranks.py --model DIR --calibration FILE --samples 64 --batch-size 2 --processes 2

Timed are answers, choice of layers, fold and reference answer, with the model's loading, but no imports. Wall time says
something on idle cores alone. The processor time of the process that took most does so on busy ones too: processes that
wait for each other take none. It leaves out what a process waits for another one.
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
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # a process that is timed
    options = parser.parse_args()
    if options.into is not None:
        timed(options)
        return
    figures: dict[int, list[tuple[float, float]]] = {}
    for _ in range(options.repeats):
        for number in (1, *options.processes):
            figures.setdefault(number, []).append(run(number))
    print("| processes | wall s | CPU s of the busiest | throughput by wall | by CPU |")
    print("|---:|---:|---:|---:|---:|")
    medians = {
        number: [statistics.median(column) for column in zip(*rows, strict=True)] for number, rows in figures.items()
    }
    for number, (wall, cpu) in medians.items():
        print(f"| {number} | {wall:.1f} | {cpu:.1f} | {medians[1][0] / wall:.2f} | {medians[1][1] / cpu:.2f} |")


def run(number: int) -> tuple[float, float]:
    """Return the wall time of a run, and the processor time of its process that took most."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(number)] if number > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, *sys.argv, "--into", folder]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        rows = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    assert len(rows) == number
    return max(row["wall"] for row in rows), max(row["cpu"] for row in rows)


def timed(options: argparse.Namespace) -> None:
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
        figures = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        (options.into / f"{ranks.rank()}.json").write_text(json.dumps(figures))
        ranks.total(0)


if __name__ == "__main__":
    main()
