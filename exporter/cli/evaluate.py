"""The subcommand `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import ranks
from ..errors import InputError
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
from .report import SHOWN, check_report, report_argument, write_report

SUMMARY = "measure exact match, or a benchmark's own metric, on a task, and fidelity to the original"
EXAMPLE = f"evaluate small --reference {MODEL} --task {DATA}/test.jsonl"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folders", nargs="+", metavar="DIR", help="checkpoints: folders or hub ids")
    subcommand.add_argument("--task", required=True, metavar="FILE.jsonl", help="questions with answers")
    subcommand.add_argument("--reference", metavar="MODEL", help="model that they were made from")
    route_budget_arguments(subcommand)
    subcommand.add_argument(
        "--samples", type=positive_count, metavar="N", help="ask only N of the questions, drawn with --seed"
    )
    subcommand.add_argument("--seed", type=seed_number, default=0, help="seed of every random draw (0)")
    data_arguments(subcommand, "(the only one)")
    metric_arguments(subcommand)
    subcommand.add_argument(
        "--max-new-tokens",
        type=positive_count,
        metavar="N",
        help="most tokens of an answer (a few more than the longest right one)",
    )
    subcommand.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE.jsonl",
        help="file that keeps every answer; a run that broke off goes on from it",
    )
    subcommand.add_argument("--no-card", action="store_true", help="leave the checkpoints' records and cards alone")
    report_argument(subcommand)
    run_arguments(subcommand, batch_size=32)


def run(options: argparse.Namespace) -> None:
    if ranks.is_first():
        check_report(options)
    run = run_options_from_flags(options)
    from ..evaluation.evaluate import evaluate
    from ..evaluation.metrics.task import Measure
    from ..evaluation.table import evaluation_table
    from ..routing.requests import BudgetGrid

    budgets = BudgetGrid(
        keep_visual_tokens=options.keep_visual_tokens,
        keep_layers=options.keep_layers,
        presets=options.preset,
        flops=options.flops,
        quality=options.quality,
        rule=options.rule,
        drop_at=options.drop_at,
        tell_question=options.tell_question,
    )
    done = evaluate(
        options.folders,
        options.task,
        reference=options.reference,
        budgets=budgets,
        calibration=options.calibration,
        options=run,
        samples=options.samples,
        seed=options.seed,
        **data_of(options),
        measure=Measure(options.metric, options.suffix),
        rated_by=judge_of(options),
        max_new_tokens=options.max_new_tokens,
        predictions=options.predictions,
        update_cards=not options.no_card,
        show=0 if options.report is None else SHOWN,
        progress=progress_bar(options),
    )
    if not ranks.is_first():
        return
    write_json(options, done.to_data())
    print(evaluation_table(done))
    if options.report is not None:
        from ..report.of_evaluation import report_of_evaluation

        write_report(options, lambda commands: report_of_evaluation(done, commands))
    if silent := [model.no_figures_because for model in done.models if model.no_figures_because]:
        raise InputError(f"{silent[0]} Repeat the command to go on from there.")


def metric_arguments(subcommand: argparse.ArgumentParser) -> None:
    metric = subcommand.add_argument_group("metric", "of the task; a judge is any OpenAI-compatible server")
    metric.add_argument(
        "--metric",
        metavar="NAME",
        help="exact, pope, mme, choice, mmbench, seed, scienceqa, aokvqa, aokvqa-direct, vqa, textvqa, llava-bench "
        "(what the columns clearly ask for, else exact)",
    )
    metric.add_argument(
        "--suffix",
        metavar="TEXT",
        help="text to put behind every question, on a line of its own",
    )
    metric.add_argument(
        "--judge", metavar="URL", help="address of the judge, https://host/v1; its key is read from OPENAI_API_KEY"
    )
    metric.add_argument("--judge-model", metavar="NAME", help="model that judges, by its name there")
    metric.add_argument(
        "--judge-prompt", type=Path, metavar="FILE", help="instructions for the judge, in place of ours"
    )


def judge_of(options: argparse.Namespace) -> Any:
    """Return the judge that the flags name, None for none. Raises InputError."""
    if options.judge is None:
        if options.judge_model or options.judge_prompt:
            raise InputError("--judge-model and --judge-prompt are for a judge: give --judge URL, too.")
        return None
    from ..data.records import read_text
    from ..evaluation.metrics.judged import TASK, JudgeClient

    if options.judge_prompt is not None and not options.judge_prompt.is_file():
        raise InputError(f"there is no file {options.judge_prompt} for --judge-prompt.")
    told = TASK if options.judge_prompt is None else read_text(options.judge_prompt)
    return JudgeClient(options.judge, options.judge_model or "", told)
