"""Compare a serving router with the router inside the decoder: the same model, questions and steps, the same task.

    python examples/serving/routers.py examples/digits/model --calibration examples/digits/data/calibration.jsonl \\
        --task examples/digits/data/validation.jsonl --samples 300 --steps 300 --out work/serving

Each router is trained once, into a folder below --out (one that is there is taken as it is), and evaluated at half and
at a quarter of the visual tokens: the router inside the decoder, which always reads the question and keeps positions,
the serving router by the picture alone, and one that may be told the question both ways. `kept` is exact match as a
share of the whole model's. The table goes to --out/routers.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

from exporter.evaluation.evaluate import evaluate
from exporter.pipeline import route
from exporter.recipe import CalibrationData, RouterRecipe, RunOptions
from exporter.routing.requests import BudgetGrid

SHARES = (0.5, 0.25)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="unlabelled questions that routers learn from")
    parser.add_argument("--calibration-samples", type=int, default=4096, help="so many of them at most (4096)")
    parser.add_argument("--task", required=True, help="questions with answers, about other pictures")
    parser.add_argument("--samples", type=int, default=300, help="of the task (300)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (300)")
    parser.add_argument("--batch-size", type=int, default=32, help="of evaluation (32)")
    parser.add_argument("--only", default="inside,serving,told", help="which of inside, serving, told (all)")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def trained(options: argparse.Namespace, name: str, **settings: Any) -> Path:
    """Return the folder with a router of a name, which is trained where there is none yet."""
    folder: Path = options.out / name
    if not folder.is_dir():
        data = CalibrationData(options.calibration, samples=options.calibration_samples)
        route(options.model, RouterRecipe(data, steps=options.steps, **settings), folder)
    return folder


def row(options: argparse.Namespace, name: str, folder: Path, told: bool = False) -> str:
    """Return a line of the table: exact match, what is kept of the whole model's, and the divergence, at each share."""
    run = RunOptions(batch_size=options.batch_size)
    done = evaluate(
        [folder],
        options.task,
        reference=options.model,
        budgets=BudgetGrid(keep_visual_tokens=SHARES, tell_question=told),
        options=run,
        samples=options.samples,
        update_cards=False,
        predictions=options.out / "answers.jsonl",
    )
    whole, *routed = done.models
    cells = [f"{100 * m.accuracy:.1f} ({100 * m.accuracy / whole.accuracy:.1f}), {m.kl:.4f}" for m in routed]
    return f"| {name} | {100 * whole.accuracy:.1f} | {' | '.join(cells)} |"


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    only = options.only.split(",")
    rows = []
    if "inside" in only:
        rows.append(row(options, "inside the decoder", trained(options, "inside")))
    if "serving" in only:
        rows.append(row(options, "serving router", trained(options, "serving", serve=True)))
    if "told" in only:
        folder = trained(options, "told", serve=True, question_aware=True)
        rows.append(row(options, "question-aware serving router, not told", folder))
        rows.append(row(options, "question-aware serving router, told the question", folder, told=True))
    head = " | ".join(f"{share:.0%} of the tokens" for share in SHARES)
    table = [
        f"{Path(options.model).name}, {options.steps} steps, {options.samples} questions of {Path(options.task).name}, "
        f"{datetime.date.today():%d %B %Y}, {platform.machine()}: exact match % (kept %), KL",
        "",
        f"| router | whole model | {head} |",
        "|---|---:|" + "---:|" * len(SHARES),
        *rows,
    ]
    text = "\n".join(table) + "\n"
    (options.out / "routers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
