"""The subcommand `compress`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from .. import ranks
from ..methods import FOLDS
from ..recipe import DEFAULT_FOLD, Recipe, RunOptions
from .arguments import DATA, MODEL, calibration_arguments, layer_budget_arguments, localizer_arguments, run_arguments
from .from_flags import progress_bar, recipe_from_flags, run_options_from_flags, write_json
from .healing_table import cost_lines, result_lines

SUMMARY = "remove redundant layers and write a standalone checkpoint"
EXAMPLE = f"compress {MODEL} --out small --drop-ratio 0.25 --calibration {DATA}/calibration.jsonl"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub id (hub:USER/NAME@REVISION)")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    subcommand.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="a recipe, in place of all flags below")
    layer_budget_arguments(subcommand)
    calibration_arguments(subcommand, required=False, answers=True)
    localizer_arguments(subcommand)
    subcommand.add_argument(
        "--scores", type=Path, metavar="FILE", help="use scores that `score --save` kept; no localizer runs"
    )
    subcommand.add_argument(
        "--keep-period",
        action="store_true",
        help="keep the order in which kinds of layers repeat, which llama.cpp and mlx-vlm assume",
    )
    subcommand.add_argument(
        "--fold", choices=tuple(FOLDS), help=f"how weights make up for removed layers ({DEFAULT_FOLD})"
    )
    subcommand.add_argument(
        "--fold-option", action="append", default=[], metavar="NAME=VALUE", help="option of the fold"
    )
    subcommand.add_argument(
        "--heal", action="store_true", help="train the result to answer as the original does; see `heal`"
    )
    subcommand.add_argument(
        "--heal-option", action="append", default=[], metavar="NAME=VALUE", help="option of healing"
    )
    subcommand.add_argument("--router", action="store_true", help="train a router for the result, too; see `route`")
    subcommand.add_argument("--base-model", metavar="USER/NAME", help="hub id for the card, if MODEL is a folder")
    subcommand.add_argument("--dry-run", action="store_true", help="only say what would happen")
    run_arguments(subcommand)


def run(options: argparse.Namespace) -> None:
    recipe, run = recipe_from_flags(options), run_options_from_flags(options)
    from ..checkpoints.record import read_record
    from ..pipeline import compress, work_folder

    if options.dry_run:
        ranks.from_first(lambda: dry_run(options, recipe, run))
        return
    try:
        folder = compress(recipe, options.out, run, progress_bar(options), scores=options.scores)
    except KeyboardInterrupt:
        if recipe.heal is None and not work_folder(options.out).exists():
            raise
        raise KeyboardInterrupt("interrupted; the same command goes on from what is saved.") from None
    if not ranks.is_first():
        return
    record = read_record(folder)
    plan, measured, source = record.plan, record.measured, record.source
    shown = ("plan", "measured", "scores", "fold", "heal")
    write_json(options, {"path": str(folder), **{k: record.data[k] for k in shown if k in record.data}})
    print(
        f"dropped layers {', '.join(map(str, plan.drop)) or 'none'} of {plan.num_layers}; "
        f"{source.parameters:,} -> {measured.parameters:,} parameters, "
        f"{source.bytes / 1e6:,.1f} -> {measured.bytes / 1e6:,.1f} MB, {measured.seconds:.0f} s"
    )
    if measured.bytes_read is not None:
        times = measured.bytes_read / source.bytes
        print(f"weights were read {times:.1f} times over, {measured.bytes_read / 1e9:,.2f} GB")
    if record.heal is not None:
        print("\n".join(result_lines(record.data["heal"])))
    verified = record.verification
    how = "verified in a clean process"
    if verified is not None and not verified.loaded:
        how = f"its structure was verified, it was not loaded: {verified.reason}"
    print(f"{how}. Checkpoint: {folder}, card: {folder / 'README.md'}")


def dry_run(options: argparse.Namespace, recipe: Recipe, run: RunOptions) -> None:
    from ..checkpoints.staging import check_space, check_target
    from ..compression.estimate import estimate
    from ..compression.job import prepare
    from ..localize.stored import load_scores
    from ..pipeline import healing_of
    from ..plan import may_break_period

    check_target(options.out)
    stored = load_scores(options.scores) if options.scores is not None else None
    job = prepare(recipe, run, progress_bar(options), stored)
    guess = estimate(job)
    check_space(options.out, guess.bytes_after)
    named = recipe.budget.layers if job.chosen is None else job.chosen.drop
    healing = healing_of(recipe, job.source, guess.drop, job.dtype.itemsize) if recipe.heal is not None else None
    write_json(options, asdict(guess) | ({"heal": healing} if healing else {}))
    print(f"would drop {guess.drop} of {guess.layers} layers by {job.chosen_by}, fold by {job.fold.name}")
    print(
        f"parameters {guess.parameters:,} -> {guess.parameters_after:,}, weights {guess.bytes / 1e6:,.1f} -> "
        f"{guess.bytes_after / 1e6:,.1f} MB"
    )
    if broken := may_break_period(job.source.config, guess.drop, named):
        print(f"lvlm-exporter: {options.out.name}: {broken}", file=sys.stderr)
    if not job.needs_model:
        print("headers are read and ranges copied: no model is loaded, but where it fits, to verify the result")
        return
    print(
        f"about {guess.seconds:.0f} s and {guess.memory_bytes / 1e9:.2f} GB on {job.device} for {guess.tokens:,} tokens"
        f", as much as {guess.forward_passes:.1f} forward passes over them"
    )
    print("of these " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in guess.stages.items()))
    if guess.bytes_to_read is not None:
        print(
            f"layers on disk are read about {guess.sweeps} times, {guess.answer_passes} of them for answers: "
            f"{guess.bytes_to_read / 1e9:,.2f} GB, {guess.bytes_to_read / guess.bytes:.1f} times the weights"
        )
    if healing:
        print("\n".join(cost_lines(healing)))
