"""The subcommand `compare`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import run_arguments
from .from_flags import progress_bar, run_options_from_flags, write_json

SUMMARY = "compare localizers, folds and budgets on your model and data"
EXAMPLE = "compare examples/digits/compare.yaml --out comparison"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for table, picture and JSON")
    zoo = subcommand.add_argument_group("many models", "one table over all of them: mean, worst case and rank")
    zoo.add_argument("--zoo", type=Path, metavar="DIR", help="take every model NAME in DIR, its questions in NAME-data")
    zoo.add_argument("--zoo-task", choices=("validation", "test"), default="validation", help="questions to judge by")
    zoo.add_argument(
        "--zoo-calibration",
        choices=("unseen", "seen"),
        default="unseen",
        help="calibration questions about pictures that the models were, or were not, trained on",
    )
    run_arguments(subcommand, batch_size=32)


def run(options: argparse.Namespace) -> None:
    run = run_options_from_flags(options)
    from ..comparison.grid import grid_from_data
    from ..comparison.grid_table import comparison_table
    from ..comparison.layers import compare
    from ..comparison.routers import compare_routes
    from ..comparison.routes import RouteTables, tables_from_data
    from ..comparison.routes_table import table_text
    from ..comparison.zoo import compare_zoo, zoo_from_data, zoo_in_folder, zoo_text
    from ..recipe import from_yaml

    def parse(data: Any) -> Any:
        if options.zoo is not None:
            data = zoo_in_folder(data, options.zoo, options.zoo_calibration, options.zoo_task)
        if isinstance(data, dict) and "models" in data:
            return zoo_from_data(data)
        return tables_from_data(data) if isinstance(data, dict) and "rows" in data else grid_from_data(data)

    wanted = from_yaml(options.recipe, parse)
    done: Any
    if isinstance(wanted, tuple):
        tables = compare_zoo(wanted, options.out, run, progress_bar(options))
        print(zoo_text(tables))
        print(f"written: {options.out / 'table.md'}, {options.out / 'results.json'}, and a folder for each model")
        write_json(options, {name: [asdict(row) for row in rows] for name, rows in tables.items()})
        return
    if isinstance(wanted, RouteTables):
        done = compare_routes(wanted, options.out, run, progress_bar(options))
        text = table_text(done)
    else:
        done = compare(wanted, options.out, run, progress_bar(options))
        text = comparison_table(done)
    write_json(options, done.to_data())
    print(text)
    print(f"written: {options.out / 'table.md'}, {options.out / 'accuracy.png'}, {options.out / 'results.json'}")
