"""The subcommand `compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arguments import run_arguments
from .from_flags import progress_bar, run_options_from_flags, write_json
from .report import check_report, report_argument, write_report

SUMMARY = "compare localizers, folds and budgets on your model and data"
EXAMPLE = "compare examples/digits/compare.yaml --out comparison"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for table, picture and JSON")
    zoo = subcommand.add_argument_group("many models", "one table over all of them: mean, worst case and rank")
    zoo.add_argument(
        "--zoo", type=Path, metavar="DIR", help="compare on every model of DIR: NAME, with its questions in NAME-data"
    )
    zoo.add_argument("--zoo-task", choices=("validation", "test"), default="validation", help="questions that judge")
    zoo.add_argument(
        "--zoo-calibration",
        choices=("unseen", "seen"),
        default="unseen",
        help="whether the models were trained on the pictures of the calibration questions (unseen)",
    )
    report_argument(subcommand)
    run_arguments(subcommand, batch_size=32)


@dataclass(frozen=True)
class Compared:
    """What a comparison gives to be shown."""

    text: str
    data: Any  # for JSON
    report: Callable[[Sequence[str]], Any]  # of the commands
    files: tuple[str, ...] = ("table.md", "accuracy.png", "results.json")


def run(options: argparse.Namespace) -> None:
    check_report(options)
    run = run_options_from_flags(options)
    from ..comparison.grid import grid_from_data
    from ..comparison.routes import RouteTables, tables_from_data
    from ..comparison.tasks_recipe import TasksRecipe, tasks_from_data
    from ..comparison.zoo import zoo_from_data, zoo_in_folder
    from ..recipe import from_yaml

    def parse(data: Any) -> Any:
        if options.zoo is not None:
            data = zoo_in_folder(data, options.zoo, options.zoo_calibration, options.zoo_task)
        if isinstance(data, dict) and "models" in data:
            return zoo_from_data(data)
        if isinstance(data, dict) and "tasks" in data:
            return tasks_from_data(data)
        return tables_from_data(data) if isinstance(data, dict) and "rows" in data else grid_from_data(data)

    recipe = from_yaml(options.recipe, parse)
    if isinstance(recipe, tuple):
        compared = _zoo
    elif isinstance(recipe, TasksRecipe):
        compared = _tasks
    elif isinstance(recipe, RouteTables):
        compared = _routes
    else:
        compared = _seeds if recipe.seeds else _layers
    done = compared(recipe, options.out, run, progress_bar(options))
    print(done.text)
    write_json(options, done.data)
    write_report(options, done.report)
    _say_where(options, *done.files)


def _zoo(*arguments: Any) -> Compared:
    from ..comparison.zoo import HEADER, compare_zoo, zoo_cells, zoo_text
    from ..report.of_comparison import report_of_zoo

    tables = compare_zoo(*arguments)
    data = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
    files = ("table.md", "results.json")
    return Compared(zoo_text(tables), data, lambda commands: report_of_zoo(tables, HEADER, zoo_cells, commands), files)


def _tasks(*arguments: Any) -> Compared:
    from ..comparison.tasks import compare_tasks
    from ..comparison.tasks_table import by_table, header, notes, tasks_text
    from ..report.of_comparison import report_of_tasks

    done = compare_tasks(*arguments)
    table = header(done), by_table(done), notes(done)
    return Compared(tasks_text(done), done.to_data(), lambda commands: report_of_tasks(done, *table, commands))


def _routes(*arguments: Any) -> Compared:
    from ..comparison.routers import compare_routes
    from ..comparison.routes_table import table_rows, table_text
    from ..report.of_comparison import report_of_routes

    done = compare_routes(*arguments)
    return Compared(
        table_text(done), done.to_data(), lambda commands: report_of_routes(done, *table_rows(done), commands)
    )


def _seeds(*arguments: Any) -> Compared:
    from ..comparison.seeds import compare_seeds, seeds_header, seeds_notes, seeds_rows, seeds_text
    from ..report.of_comparison import report_of_seeds

    done = compare_seeds(*arguments)
    table = seeds_header(done), seeds_rows(done), seeds_notes(done)
    files = ("table.md", "results.json")
    return Compared(seeds_text(done), done.to_data(), lambda commands: report_of_seeds(done, *table, commands), files)


def _layers(*arguments: Any) -> Compared:
    from ..comparison.grid_table import comparison_header, comparison_rows, comparison_table
    from ..comparison.layers import compare
    from ..report.of_comparison import report_of_grid

    done = compare(*arguments)
    table = comparison_header(done), comparison_rows(done)
    return Compared(comparison_table(done), done.to_data(), lambda commands: report_of_grid(done, *table, commands))


def _say_where(options: argparse.Namespace, *names: str) -> None:
    """Name the files that were written; results that could not be are printed, and the exit code says so."""
    if (options.out / names[-1]).is_file():
        print(f"written: {', '.join(str(options.out / name) for name in names)}")
    else:
        print(f"lvlm-exporter: {options.out} does not hold these results: they are printed only.", file=sys.stderr)
        options.unsaved = True
