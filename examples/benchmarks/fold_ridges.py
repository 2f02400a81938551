"""Which ridge a fold by few tokens needs, and from how many on it helps at all: what `ridge_for` rests on.

    python examples/benchmarks/fold_ridges.py --models zoo/qwen-shapes zoo/llava-shapes | tee ridges.md
    python examples/benchmarks/fold_ridges.py --read ridges.md        means over the rows that were printed

Real models have more inputs than small ones, and no more questions: 32 questions of 640 tokens are two tokens for each
of 11,008 inputs. Small trained models are there with four questions. For each model the layers that block influence
names and as many drawn ones are folded from 4 to 96 questions, under every ridge, and judged on held-out questions:
error of the states that the head reads, and KL at the answers, each over what it is without a fold (above 1: the fold
hurts).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from set_choice import Enough, Values, measured, run

from exporter.data.batches import Batch
from exporter.fold import reconstruction
from exporter.fold.job import FoldJob
from exporter.fold.sets import FoldedSets
from exporter.localize import best_of
from exporter.localize.block_influence import block_influence
from exporter.models.capture import layer_statistics
from exporter.models.originals import originals_of
from exporter.models.side_by_side import side_by_side
from exporter.models.sweep import Change
from exporter.plan import Folded, make_plan

Ridge = float | str | None
GROUPS = (0.0, 2.0, 4.0, 10.0, math.inf)  # tokens per input, for the means
KINDS = (("down_proj",), ("o_proj", "down_proj"))


def folded_from(
    judge: FoldedSets, drop: Sequence[int], batches: Sequence[Batch], ridge: Ridge, kinds: Sequence[str]
) -> tuple[Folded, float]:
    """Fold from a few batches, however few; return the fold and the tokens for each input."""
    questions = judge.held_out.questions
    job = FoldJob(
        model=judge.model,
        batches=lambda share=1.0: batches,
        plan=make_plan(judge.model.config.get_text_config().num_hidden_layers, drop),
        read=judge.read,
        decoder=judge.decoder,
        multiplier=judge.multiplier,
        half_of=questions.half_of,
    )
    fit = reconstruction.Fit(ridge=ridge)
    with mock.patch.object(reconstruction, "TOKENS_PER_INPUT", 0.0), originals_of(judge.model, batches) as originals:
        folded = side_by_side(judge.model, [reconstruction.steps(job, fit, originals, kinds)])[0]
    return folded, job.report["tokens"] / job.report["inputs"]


def rows(judge: FoldedSets, drop: Sequence[int], options: argparse.Namespace) -> Iterator[str]:
    """Fold one set of layers from each number of questions; yield a table's rows."""
    questions, gone = judge.held_out.questions, frozenset(drop)
    others = list(questions.answered("judge", "held_out", options.held_out))
    without = measured(judge.model, [Change(gone)], others)[0]
    for kinds in KINDS:
        for number in options.questions:
            batches = list(questions.batches("fit", part="fit", number=number))
            values, at = [], 0.0
            for ridge in options.ridges:
                folded, at = folded_from(judge, drop, batches, ridge, kinds)
                values.append(measured(judge.model, [Change(gone, folded)], others)[0])
            cells = " | ".join(over(value, without) for value in values)
            yield f"| {' '.join(map(str, drop))} | {' and '.join(kinds)} | {number} | {at:.1f} | {cells} |"


def over(value: Values, without: Values) -> str:
    return " / ".join(f"{value[name] / without[name]:.2f}" for name in ("states read", "kl answers"))


def study(options: argparse.Namespace, model: str, ratio: float) -> None:
    """Let `compress` prepare everything, and fold where it would choose its layers."""

    def looked_at(job: Any, count: int, protect: tuple[int, ...], **_: Any) -> Any:
        judge: FoldedSets = dataclasses.replace(job.folded)
        batches = judge.held_out.questions.batches("score layers", part="fit", number=16)
        named = block_influence(list(layer_statistics(job.model, batches)), count, tuple(protect)).drop
        drawn = random.Random(options.seed).sample(range(2, job.num_layers), count)
        for drop in (named, drawn):
            for row in rows(judge, sorted(drop), options):
                print(f"| {Path(model).name} {row}", flush=True)
        raise Enough

    run(options, model, ratio, mock.patch.object(best_of, "by_best_of", looked_at))


def summary(lines: Sequence[str]) -> Iterator[str]:
    """Yield a table of geometric means, and the worst KL, over the rows of printed tables, by tokens per input."""
    cells = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in lines if line.startswith("|")]
    names = cells[0][5:]
    found = [[row[4], *row[5:]] for row in cells if row[4].replace(".", "").isdigit()]
    yield f"| tokens per input | rows | {' | '.join(names)} |"
    yield "|---|---:|" + "---:|" * len(names)
    for low, high in itertools.pairwise(GROUPS):
        group = [row[1:] for row in found if low <= float(row[0]) < high]
        if group:
            pairs = [[tuple(map(float, cell.split("/"))) for cell in column] for column in zip(*group, strict=True)]
            means = [[statistics.geometric_mean(values) for values in zip(*column, strict=True)] for column in pairs]
            worst = [max(kl for _, kl in column) for column in pairs]
            shown = " | ".join(
                f"{states:.2f} / {kl:.2f} ({most:.2f})" for (states, kl), most in zip(means, worst, strict=True)
            )
            yield f"| {low:g} to {high:g} | {len(group)} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--calibration", default="{}-data/calibration-unseen.jsonl", help="{} stands for the model")
    parser.add_argument("--drop-ratio", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=256, help="calibration questions")
    parser.add_argument("--held-out", type=int, default=48, help="questions that judge the folds")
    parser.add_argument("--questions", type=int, nargs="+", default=[4, 8, 16, 32, 96], help="to fold from")
    parser.add_argument("--ridges", type=ridge, nargs="+", default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0, "auto", None])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--read", type=Path, nargs="+", help="print means over tables that were printed, measure nothing"
    )
    options = parser.parse_args()
    if options.read:
        print("\n".join(summary([line for path in options.read for line in path.read_text().splitlines()])))
        return
    if not options.models:
        parser.error("give --models or --read.")
    names = " | ".join("default" if r is None else str(r) for r in options.ridges)
    print(f"| model | layers | refitted | questions | tokens per input | {names} |")
    print("|---|---|---|---:|---:|" + "---:|" * len(options.ridges))
    for model in options.models:
        study(options, model, options.drop_ratio)


def ridge(text: str) -> Ridge:
    """Read a ridge: a number, `auto`, or `default`."""
    return None if text == "default" else text if text == "auto" else float(text)


if __name__ == "__main__":
    main()
