"""A comparison on several tasks, as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..plain_data import check_keys, check_types
from ..recipe import RouterRecipe, calibration_from_data, router_from_data
from .grid import Grid, grid_from_data
from .routes import RouteTables, tables_from_data
from .seed_list import seeds_from_data
from .speed import Timing

ROUTERS = "routers"  # the folder of those that are trained
OWN = ("tasks", "tables", "routers", "speed")  # keys that a comparison on one task has not


@dataclass(frozen=True)
class Line:
    """A line of a table: a row of the comparison under one of its budgets, or why there is none."""

    row: str
    budget: int | None = None  # its number, from 0
    name: str | None = None  # that the table gives it
    reason: str | None = None


@dataclass(frozen=True)
class TasksRecipe:
    """A comparison without its task, and the tasks."""

    model: str
    shared: dict[str, Any]
    tasks: dict[str, Any]
    tables: dict[str, list[Line]] = field(default_factory=dict)
    routers: dict[str, RouterRecipe] = field(default_factory=dict)  # by the name that rows call them by
    speed: Timing | None = None
    seeds: tuple[int, ...] = ()

    def routers_in(self, out: Path, seed: int | None) -> Path:
        """Return the folder of the routers that are trained, with a seed where there are several."""
        return out / ROUTERS if seed is None else out / ROUTERS / f"seed-{seed}"

    def comparison_on(self, task: str, routers: Path) -> Grid | RouteTables:
        """Return the comparison on one of the tasks; its rows find their routers in the folder `routers`."""
        data = {**self.shared, "task": self.tasks[task]}
        if "rows" not in data:
            return grid_from_data(data)
        rows = []
        for row in data["rows"]:
            trained = isinstance(row, Mapping) and row.get("folder") in self.routers
            rows.append({**row, "folder": str(routers / row["folder"])} if trained else row)
        tables = tables_from_data({**data, "rows": rows})
        if not self.tables:
            return tables
        used: dict[str, set[int]] = {row.name: set() for row in tables.rows}
        for line in (line for lines in self.tables.values() for line in lines):
            if line.budget is not None and line.row in used:
                used[line.row].add(line.budget)
        rows_of_tables = [replace(row, columns=tuple(sorted(used[row.name]))) for row in tables.rows if used[row.name]]
        return replace(tables, rows=tuple(rows_of_tables))


def tasks_from_data(data: Any) -> TasksRecipe:
    """Read a comparison with 'tasks', and with 'tables', 'routers' and 'speed' where it has them. Raises InputError."""
    shared = {key: value for key, value in data.items() if key not in OWN}
    if "task" in shared:
        raise InputError("a comparison has 'task' or 'tasks', not both.")
    for key in ("tasks", "tables", "routers"):
        if key in data and (not isinstance(data[key], Mapping) or not data[key]):
            raise InputError(f"{key} must be a mapping of names to what they are, not {data[key]!r:.80}.")
    for name in [*data["tasks"], *data.get("routers", {})]:
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w .=+-]{0,99}", name):  # its folder's name, too
            raise InputError(f"a task or router is called {name!r:.80}: letters, digits and . _ - are fine.")
    read = TasksRecipe(
        model=str(data.get("model")),
        shared=shared,
        tasks=dict(data["tasks"]),
        tables={str(title): _lines(lines, title) for title, lines in data.get("tables", {}).items()},
        routers={name: _router(router, shared, name) for name, router in data.get("routers", {}).items()},
        speed=_timing(data.get("speed")),
        seeds=seeds_from_data(shared),
    )
    parts = [read.comparison_on(name, Path()) for name in read.tasks]  # so that every task is checked
    _check_lines(read, parts[0])
    return read


def _lines(lines: Any, title: Any) -> list[Line]:
    if not isinstance(lines, list) or not lines:
        raise InputError(f"tables: '{title}' must be a list of lines, not {lines!r:.80}.")
    for line in lines:
        check_keys(line, [f.name for f in dataclasses.fields(Line)], "a line of a table")
        if "row" not in line:
            raise InputError("a line of a table needs 'row'.")
        check_types(Line, line, line)
    return [Line(**line) for line in lines]


def _router(router: Any, shared: Mapping[str, Any], name: str) -> RouterRecipe:
    read = router_from_data(router)
    if read.serve:
        raise InputError(
            f"routers: '{name}' is a serving router, which chooses before the decoder, and rows are compared at equal "
            "FLOPs inside it: train it with `lvlm-exporter route --serve`, measure it with `evaluate --preset`."
        )
    if read.calibration is None:
        if "calibration" not in shared:
            raise InputError(f"routers: '{name}' is trained on questions about images: add calibration: FILE.")
        read = replace(read, calibration=calibration_from_data(shared["calibration"]))
    return read


def _timing(data: Any) -> Timing | None:
    if data is None or data is False:
        return None
    read = {} if data is True else data
    check_keys(read, [f.name for f in dataclasses.fields(Timing)], "speed")
    return Timing(**read)


def _check_lines(recipe: TasksRecipe, part: Grid | RouteTables) -> None:
    """Raise InputError for lines that name a row or a budget that there is not."""
    lines = [line for lines in recipe.tables.values() for line in lines if line.reason is None]
    if isinstance(part, Grid):
        if lines or recipe.routers:
            raise InputError(
                "a comparison of localizers and folds has no lines with 'row' and no 'routers': its tables are its "
                "budgets, and 'tables' may name what can't be made, with a 'reason'."
            )
        return
    if recipe.speed is not None:
        raise InputError("speed is timed for fewer layers: leave it out with 'rows'.")
    if not lines:
        raise InputError("a comparison of routes on several tasks needs 'tables' with lines of 'row' and 'budget'.")
    names = [row["name"] for row in recipe.shared["rows"]]
    for line in lines:
        if line.row not in names:
            raise InputError(f"tables: there is no row '{line.row}': {nearest(line.row, tuple(names))}")
        if line.budget is None or not 0 <= line.budget < len(part.budgets):
            raise InputError(
                f"tables: '{line.row}' has budget {line.budget!r}: give a number from 0 to {len(part.budgets) - 1}."
            )
