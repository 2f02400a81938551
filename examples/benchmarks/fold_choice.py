"""How well each fold does on questions that nothing was chosen by, beside what the held-out questions say of it.

    python examples/benchmarks/fold_choice.py --samples 96 192 256 --seeds 0 1
    python examples/benchmarks/fold_choice.py --model MODEL --calibration FILE.jsonl --others FILE.jsonl

The model is compressed by the defaults with few calibration questions. `auto` judges its folds on a fifth of them; all
folds are then judged on these, and on `--others` too. The last table tells what ways to choose would have given there,
over all runs: by the error of the last states unless the divergence clearly speaks against it, or by the divergence.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from exporter.data.calibration import load_calibration
from exporter.data.pictures import Split
from exporter.fold import auto
from exporter.fold.held_out import HeldOut
from exporter.models.divergence import Divergence, most_faithful, simplest
from exporter.models.questions import Questions
from exporter.models.variants import Variant
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.progress import silent
from exporter.recipe import CalibrationData, Recipe, RunOptions

Folds = Mapping[str, Divergence]
RULES: dict[str, Callable[[list[Divergence]], int]] = {
    "error of the states, divergence has the veto": most_faithful,
    "divergence, the simplest within its noise": simplest,
    "lowest divergence": lambda divergences: min(range(len(divergences)), key=lambda n: divergences[n].mean),
}


@dataclass(frozen=True)
class Run:
    """The folds of one run: on its held-out questions, and on others."""

    drop: tuple[int, ...]
    held_out: Folds
    others: Folds

    def chosen(self, rule: Callable[[list[Divergence]], int]) -> str:
        """Return the fold that a rule takes, of those whose divergence is no worse than without one."""
        names = [name for name in self.held_out if self.held_out[name].mean <= self.held_out["none"].mean]
        return names[rule([self.held_out[name] for name in names])]


def run(options: argparse.Namespace, samples: int, seed: int) -> Run:
    """Compress, and judge the folds that `auto` judges on all held-out questions and on others."""
    runs: list[Run] = []
    judge = auto.judge_candidates

    def judged(held_out: HeldOut, variants: dict[str, Variant]) -> Any:
        own, others = on_all(held_out, variants), on_all(other_questions(held_out, options), variants)
        plan = next(iter(variants.values())).plan
        runs.append(Run(plan.drop, own, others))
        return judge(held_out, variants)

    data = CalibrationData(options.calibration, samples=samples)
    recipe = Recipe(options.model, data, LayerBudget(drop_layers=options.drop_layers), seed=seed)
    with mock.patch.object(auto, "judge_candidates", judged), tempfile.TemporaryDirectory() as folder:
        compress(recipe, Path(folder) / "small", RunOptions(batch_size=16))
    return runs[-1]


def on_all(held_out: HeldOut, variants: dict[str, Variant]) -> Folds:
    return dict(zip(variants, held_out.judge(list(variants.values())), strict=True))


def other_questions(held_out: HeldOut, options: argparse.Namespace) -> HeldOut:
    """Return questions of another file in place of those held out."""
    asked = held_out.questions
    samples = load_calibration(options.others, samples=options.number, seed=1).samples
    questions = Questions(asked.model, asked.processor, tuple(samples), asked.batch_size, seed=0, progress=silent)
    everything = tuple(range(len(samples)))
    questions.split = Split((), everything, everything, questions.split.pictures)
    return HeldOut(asked.model, questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits/model")
    parser.add_argument("--calibration", default="examples/digits/data/calibration.jsonl")
    parser.add_argument("--others", default="examples/digits/data/validation.jsonl")
    parser.add_argument("--number", type=int, default=240, help="of the other questions")
    parser.add_argument("--drop-layers", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[96, 192, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print("| questions | seed | layers | fold | held out: KL | error of states | others: KL | error | same answers % |")
    print("|---:|---:|---|---|---:|---:|---:|---:|---:|")
    runs = []
    for samples in options.samples:
        for seed in options.seeds:
            runs.append(run(options, samples, seed))
            for line in lines(runs[-1]):
                print(f"| {samples} | {seed} | {line}", flush=True)
    print("\n| chosen by | KL on others, mean | worst beside the best |\n|---|---:|---:|")
    for name, rule in RULES.items():
        given = [run.others[run.chosen(rule)].mean for run in runs]
        more = [kl - min(fold.mean for fold in run.others.values()) for kl, run in zip(given, runs, strict=True)]
        print(f"| {name} | {sum(given) / len(given):.4f} | {max(more):+.4f} |")


def lines(run: Run) -> list[str]:
    """Return the end of a line for each fold."""
    drop = ", ".join(map(str, run.drop))
    return [
        f"{drop} | {name} | {own.mean:.4f} ± {own.error:.4f} | {own.state_error:.4f} | {other.mean:.4f} | "
        f"{other.state_error:.4f} | {100 * sum(other.follows) / len(other.follows):.1f} |"
        for name, own in run.held_out.items()
        for other in [run.others[name]]
    ]


if __name__ == "__main__":
    main()
