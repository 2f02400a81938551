"""The subcommand `compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
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


def run(options: argparse.Namespace) -> None:
    check_report(options)
    run = run_options_from_flags(options)
    from ..comparison.grid import grid_from_data
    from ..comparison.grid_table import COMPARISON_HEADER, comparison_rows, comparison_table
    from ..comparison.layers import compare
    from ..comparison.routers import compare_routes
    from ..comparison.routes import RouteTables, tables_from_data
    from ..comparison.routes_table import table_rows, table_text
    from ..comparison.tasks import by_table, compare_tasks, tasks_text
    from ..comparison.tasks import header as task_header
    from ..comparison.tasks_recipe import TasksRecipe, tasks_from_data
    from ..comparison.zoo import HEADER, compare_zoo, zoo_cells, zoo_from_data, zoo_in_folder, zoo_text
    from ..recipe import from_yaml
    from ..report.of_comparison import report_of_grid, report_of_routes, report_of_tasks, report_of_zoo

    def parse(data: Any) -> Any:
        if options.zoo is not None:
            data = zoo_in_folder(data, options.zoo, options.zoo_calibration, options.zoo_task)
        if isinstance(data, dict) and "models" in data:
            return zoo_from_data(data)
        if isinstance(data, dict) and "tasks" in data:
            return tasks_from_data(data)
        return tables_from_data(data) if isinstance(data, dict) and "rows" in data else grid_from_data(data)

    wanted = from_yaml(options.recipe, parse)
    done: Any
    rows: Sequence[Sequence[Any]]
    if isinstance(wanted, tuple):
        tables = compare_zoo(wanted, options.out, run, progress_bar(options))
        print(zoo_text(tables))
        write_json(options, {name: [asdict(row) for row in rows] for name, rows in tables.items()})
        write_report(options, lambda commands: report_of_zoo(tables, HEADER, zoo_cells, commands))
        _say_where(options, "table.md", "results.json")
        return
    if isinstance(wanted, TasksRecipe):
        done = compare_tasks(wanted, options.out, run, progress_bar(options))
        print(tasks_text(done))
        write_json(options, done.to_data())
        write_report(options, lambda commands: report_of_tasks(done, task_header(done), by_table(done), commands))
        _say_where(options, "table.md", "accuracy.png", "results.json")
        return
    if isinstance(wanted, RouteTables):
        done = compare_routes(wanted, options.out, run, progress_bar(options))
        text = table_text(done)
        header, rows = table_rows(done)
        make = report_of_routes
    else:
        done = compare(wanted, options.out, run, progress_bar(options))
        text = comparison_table(done)
        header, rows = list(COMPARISON_HEADER), comparison_rows(done)
        make = report_of_grid
    write_json(options, done.to_data())
    print(text)
    write_report(options, lambda commands: make(done, header, rows, commands))
    _say_where(options, "table.md", "accuracy.png", "results.json")


def _say_where(options: argparse.Namespace, *names: str) -> None:
    """Name the files that were written; results that could not be are printed, and the exit code says so."""
    if (options.out / names[-1]).is_file():
        print(f"written: {', '.join(str(options.out / name) for name in names)}")
    else:
        options.unsaved = True
