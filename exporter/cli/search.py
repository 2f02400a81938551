"""The subcommand `search`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CheckFailed, InputError
from .arguments import (
    DATA,
    MODEL,
    byte_count,
    calibration_arguments,
    json_argument,
    names,
    number_in_range,
    parameter_count,
    positive_count,
)
from .from_flags import calibration_from_flags, progress_bar, write_json

SUMMARY = "find the model that is as fast, or as small, as you ask and loses least"
EXAMPLE = (
    f"search {MODEL} --speedup 1.5 --max-loss 1 --calibration {DATA}/calibration.jsonl --task {DATA}/validation.jsonl "
    "--out found"
)


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("model", metavar="MODEL", help="folder or hub id (hub:USER/NAME@REVISION)")
    subcommand.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to make; one of the same search goes on"
    )
    goal_arguments(subcommand)
    subcommand.add_argument(
        "--max-loss",
        type=number_in_range,
        default=1.0,
        metavar="POINTS",
        help="points of exact match that may be lost (1.0)",
    )
    subcommand.add_argument(
        "--task", required=True, metavar="FILE", help="questions with answers, which judge the candidates"
    )
    subcommand.add_argument("--task-samples", type=positive_count, metavar="N", help="ask only N of these questions")
    subcommand.add_argument(
        "--heal-samples", type=positive_count, metavar="N", help="how many questions to heal on (--samples)"
    )
    subcommand.add_argument(
        "--without", type=names, default=(), metavar="NAMES", help="try no candidate with these: heal,router,int8"
    )
    subcommand.add_argument(
        "--time", type=number_in_range, metavar="MINUTES", help="minutes that this call may take; the next call goes on"
    )
    calibration_arguments(subcommand, required=True, answers=True)
    subcommand.add_argument("--dry-run", action="store_true", help="only show the candidates and what they cost")
    subcommand.add_argument("--device", help="cpu, cuda, cuda:1 (the first GPU, else the CPU)")
    subcommand.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (auto: float32 on the CPU)")
    subcommand.add_argument("--batch-size", type=positive_count, default=16, metavar="B")
    json_argument(subcommand)


def goal_arguments(subcommand: argparse.ArgumentParser) -> None:
    goals = subcommand.add_argument_group(
        "goal",
        "what the model is to reach, at most one; without one, the whole Pareto front is searched for speed. A search "
        "that does not reach its goal ends with exit code 1",
    ).add_mutually_exclusive_group()
    goals.add_argument(
        "--speedup", type=number_in_range, metavar="S",
        help="how many times as fast one whole answer is to be (image, prompt and all its tokens): 1.5",
    )  # fmt: skip
    goals.add_argument("--latency-ms", type=number_in_range, metavar="T", help="most milliseconds for one whole answer")
    goals.add_argument("--params", type=parameter_count, metavar="P", help="most parameters: 5.2B")
    goals.add_argument("--flops", type=number_in_range, metavar="F", help="share of an answer's FLOPs: 0.5")
    goals.add_argument("--memory", type=byte_count, metavar="M", help="most memory for the weights and one answer: 6GB")


def run(options: argparse.Namespace) -> None:
    from ..outcome.goal import SearchGoal, SearchRecipe
    from ..outcome.report import text
    from ..outcome.search import search
    from ..recipe import RunOptions, calibration_from_data, task_from_data

    goal = SearchGoal(
        **{name: getattr(options, name) for name in ("speedup", "latency_ms", "params", "flops", "memory")}
    )
    recipe = SearchRecipe(
        model=options.model,
        calibration=calibration_from_data(calibration_from_flags(options)),
        task=task_from_data(options.task),
        goal=goal,
        max_loss=options.max_loss,
        task_samples=options.task_samples,
        heal_samples=options.heal_samples,
        without=options.without,
        seed=options.seed or 0,
    )
    run = RunOptions(options.device, options.dtype, batch_size=options.batch_size)
    if options.time is not None and options.time <= 0:
        raise InputError(f"--time {options.time:g}: minutes above 0 are needed.")
    if options.dry_run:
        dry_run(options, recipe, run)
        return
    try:
        result = search(recipe, options.out, options=run, minutes=options.time, progress=progress_bar(options))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from what is measured.") from None
    write_json(options, result.to_data())
    print(text(result))
    if result.chosen is not None:
        print(f"written and verified: {result.chosen} ({result.chosen_label}); the others are recipes in {result.out}")
    if not result.met:
        raise CheckFailed(result.verdict)


def dry_run(options: argparse.Namespace, recipe: object, run: object) -> None:
    from ..cards.tables import table
    from ..outcome.plan_ahead import plan_ahead
    from ..outcome.report import EXPECTED_HEADER, expected_rows

    ahead = plan_ahead(recipe, options.out, run, progress_bar(options))  # type: ignore[arg-type]
    write_json(options, ahead.to_data())
    print(table(EXPECTED_HEADER, expected_rows(ahead.predictor, ahead.candidates, ahead.seconds)))
    print(
        "\nexpected from numbers of parameters and tokens; a search times the model itself first, and leaves out what "
        "held-out questions rule out"
    )
    for name, reason in ahead.left_out.items():
        print(f"{name}, left out: {reason}")
    print(f"about {ahead.minutes:.0f} minutes for all of them, {ahead.disk_bytes / 1e6:,.0f} MB of disk at a time")
