"""The subcommand `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import (
    DATA,
    MODEL,
    data_arguments,
    data_of,
    positive_count,
    route_budget_arguments,
    run_arguments,
    seed_number,
)
from .from_flags import progress_bar, run_options_from_flags, write_json

SUMMARY = "exact match on a task, and fidelity to the original"
EXAMPLE = f"evaluate small --reference {MODEL} --task {DATA}/test.jsonl"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folders", nargs="+", metavar="DIR", help="checkpoints: folders or hub ids")
    subcommand.add_argument("--task", required=True, metavar="FILE.jsonl", help="questions with answers")
    subcommand.add_argument("--reference", metavar="MODEL", help="the model they were made from")
    route_budget_arguments(subcommand)
    subcommand.add_argument(
        "--samples", type=positive_count, metavar="N", help="only N of the questions, drawn with --seed"
    )
    subcommand.add_argument("--seed", type=seed_number, default=0)
    data_arguments(subcommand, "(the only one)")
    subcommand.add_argument("--max-new-tokens", type=positive_count, metavar="N", help="longest answer")
    subcommand.add_argument(
        "--predictions", type=Path, metavar="FILE.jsonl", help="keep every answer; a broken-off run goes on from there"
    )
    subcommand.add_argument("--no-card", action="store_true", help="leave the checkpoints' records and cards alone")
    run_arguments(subcommand, batch_size=32)


def run(options: argparse.Namespace) -> None:
    run = run_options_from_flags(options)
    from ..evaluation.evaluate import evaluate
    from ..evaluation.table import evaluation_table
    from ..routing.requests import BudgetGrid

    wanted = BudgetGrid(
        keep_visual_tokens=options.keep_visual_tokens,
        keep_layers=options.keep_layers,
        presets=options.preset,
        rule=options.rule,
        drop_at=options.drop_at,
    )
    done = evaluate(
        options.folders,
        options.task,
        reference=options.reference,
        budgets=wanted,
        calibration=options.calibration,
        options=run,
        samples=options.samples,
        seed=options.seed,
        **data_of(options),
        max_new_tokens=options.max_new_tokens,
        predictions=options.predictions,
        update_cards=not options.no_card,
        progress=progress_bar(options),
    )
    write_json(options, done.to_data())
    print(evaluation_table(done))
