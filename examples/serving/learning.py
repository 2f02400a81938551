"""How a serving router learns best: the weight of the states' error and the number of steps, over several models.

    python examples/serving/learning.py zoo/llava-shapes zoo/qwen-shapes --states 0,20 --steps 300 --out work/learning

Each model's questions are `NAME-data/calibration-unseen.jsonl` beside it, as `make zoo` writes them, or, where there is
none, `data/calibration.jsonl` beside its folder, as the reference model has them. For every weight and number of steps
a router is trained, and judged by the questions that training holds out: divergence (mean over answer tokens) and the
share of the original's answers of which each token is still the likeliest one, at half and at a quarter of the tokens.
Each result is one line of --out/results.jsonl; what is there is not computed again. No folder is written.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

from exporter.progress import silent
from exporter.recipe import CalibrationData, RouterRecipe, RunOptions
from exporter.routing.serving import loop
from exporter.routing.serving.job import prepare_serving, train_serving_job

SHARES = ("serve-balanced", "serve-fast")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--states", default=str(loop.STATES), help=f"weights of the states' error ({loop.STATES})")
    parser.add_argument("--steps", default="300", help="numbers of steps (300)")
    parser.add_argument("--samples", default="512", help="numbers of calibration questions (512)")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def questions_of(model: Path) -> Path:
    """Return the file with a model's calibration questions."""
    beside = [
        model.parent / f"{model.name}-data" / "calibration-unseen.jsonl",
        model.parent / f"{model.name}-data" / "calibration.jsonl",
        model.parent / "data" / "calibration.jsonl",
    ]
    if (known := next((file for file in beside if file.is_file()), None)) is None:
        raise SystemExit(f"{model} has no questions beside it: looked for {', '.join(map(str, beside))}.")
    return known


def measure(model: Path, states: float, steps: int, samples: int) -> dict[str, Any]:
    """Train one router, and return what its held-out questions say."""
    loop.STATES = states
    data = CalibrationData(str(questions_of(model)), samples=samples)
    job = prepare_serving(model, RouterRecipe(data, steps=steps, serve=True), data=data, options=RunOptions())
    begin = time.process_time()
    trained = train_serving_job(job, None, silent)
    return {
        "questions": trained.questions,
        "held_out": trained.held_out,
        "cpu_seconds": round(time.process_time() - begin),
        "step": trained.step,
        "curve": [{k: v for k, v in row.items() if k.startswith("KL")} for row in trained.curve if len(row) > 2],
        "measured": trained.measured,
    }


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    weights, steps_tried, samples_tried = (
        given.split(",") for given in (options.states, options.steps, options.samples)
    )
    print("| model | weight | steps | questions | half: KL | kept | a quarter: KL | kept | CPU s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for model, *numbers in product(options.models, weights, steps_tried, samples_tried):
        states, steps, samples = float(numbers[0]), int(numbers[1]), int(numbers[2])
        asked = {"model": model.name, "states": states, "steps": steps, "samples": samples}
        row = next((row for row in done if row.items() >= asked.items()), None)
        if row is None:
            row = {**asked, **measure(model, states, steps, samples)}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        told = {each["preset"]: each for each in row["measured"]}
        cells = [f"{told[name]['kl']:.3f} | {100 * told[name]['answers_kept']:.1f} %" for name in SHARES]
        print(
            f"| {model.name} | {states:g} | {steps} | {row['questions']} | {' | '.join(cells)} | {row['cpu_seconds']} |"
        )


if __name__ == "__main__":
    main()
