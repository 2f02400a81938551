"""A comparison of routers and rules, and its results, as data."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cards.figures import EXACT_MATCH
from ..checkpoints.shapes import COUNT, SIZE, TEXT, ListOf, Maybe, check
from ..errors import InputError
from ..evaluation.scoring import Rate, holm, mcnemar, rights
from ..modeling.routed_route import Budget
from ..plain_data import check_keys, check_types, paths_as_text
from ..recipe import TaskData, task_from_data
from ..routing.rules import Rule
from .cells_file import RESULT
from .oracle import Search
from .seed_list import seeds_from_data

FEWEST = 0.004  # share of the visual tokens
OUT_OF_REACH = 0.03  # share of the FLOPs by which a row may miss its column's


@dataclass(frozen=True)
class Row:
    """Who chooses. `rule` as in `evaluate --rule`; 'oracle' or 'oracle+LAYERS' searches tokens."""

    name: str
    rule: str = "router"
    folder: str | None = None  # a routed checkpoint; None: the comparison's model, for rules and the oracle
    drop_at: int | None = None
    columns: tuple[int, ...] | None = None  # numbers of the budgets that it runs under, from 0; None: all

    @property
    def searches(self) -> bool:
        return self.rule.split("+")[0] == "oracle"

    def parsed(self) -> Rule:
        """Put the oracle's tokens where a rule's would stand."""
        tokens, _, layers = self.rule.partition("+")
        rule = f"random+{layers or 'all'}" if tokens == "oracle" else self.rule
        return Rule.parse(rule, self.drop_at)


@dataclass(frozen=True)
class RouteTables:
    """A comparison as data; its YAML has the same keys."""

    model: str  # unrouted: what everything is judged against
    task: TaskData
    rows: tuple[Row, ...]
    budgets: tuple[Budget, ...]
    calibration: str | None = None  # for the rule shortgpt
    task_samples: int | None = None
    equal: str = "flops"  # or "budget": every row has the column's counts, as far as it uses them
    oracle: Search = field(default_factory=Search)
    seed: int = 0
    seeds: tuple[int, ...] = ()  # for which routers are trained and rules draw anew; (): for `seed` alone
    task_seed: int | None = None  # that draws `task_samples`; None: `seed`

    def __post_init__(self) -> None:
        paths_as_text(self, "model", "calibration")

    @property
    def questions_seed(self) -> int:
        """Return the seed that draws the task's questions."""
        return self.seed if self.task_seed is None else self.task_seed

    def of_seed(self, seed: int) -> RouteTables:
        """Return the comparison with what one seed draws; the task's questions stay the same."""
        return dataclasses.replace(self, seed=seed, seeds=(), task_seed=self.questions_seed)


def tables_from_data(data: Any) -> RouteTables:
    check_keys(data, [f.name for f in dataclasses.fields(RouteTables)], "a comparison of routes")
    for key in ("model", "task", "rows", "budgets"):
        if not data.get(key):
            raise InputError(f"a comparison of routes needs '{key}'.")
    for key in ("rows", "budgets"):
        if not isinstance(data[key], list):
            raise InputError(f"{key} must be a list, not {data[key]!r}.")
    check_types(RouteTables, data, ("model", "calibration", "task_samples", "seed", "task_seed"))
    if data.get("equal", "flops") not in ("flops", "budget"):
        raise InputError(f"equal: {data['equal']!r} is not known: flops, budget.")
    read = {
        "rows": tuple(_part(Row, row, "a row") for row in data["rows"]),
        "budgets": tuple(_part(Budget, budget, "a budget") for budget in data["budgets"]),
        "oracle": _part(Search, data.get("oracle") or {}, "oracle"),
        "task": task_from_data(data["task"]),
        "seeds": seeds_from_data(data),
    }
    names = [row.name for row in read["rows"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two rows are called '{twice[0]}'.")
    for row in read["rows"]:
        row.parsed()
    if any(budget.flops is not None or budget.quality is not None for budget in read["budgets"]):
        raise InputError(
            "budgets: a column names keep_visual_tokens and keep_layers, which rules can keep to as well; flops and "
            "quality are for routers alone: `lvlm-exporter evaluate --flops 0.5` measures them."
        )
    return RouteTables(**{**data, **read})


def _part(cls: Any, data: Any, what: str) -> Any:
    check_keys(data, [f.name for f in dataclasses.fields(cls)], what)
    if missing := [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in data]:
        raise InputError(f"{what} needs '{missing[0]}'.")
    check_types(cls, data, data)
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


@dataclass(frozen=True)
class RouteCell:
    row: str
    column: int  # number of the budget
    budget: dict[str, Any]  # what the row ran under: `BudgetRequest.to_data`
    n: int
    accuracy: float
    interval: tuple[float, float]
    kept: float  # of the unrouted model's accuracy
    by_type: dict[str, float]
    kl: float  # per answer token of the unrouted model
    agreement: float
    flops_share: float
    decoder_flops_share: float
    wrong: tuple[int, ...]  # questions, by their number in the task
    searched: str | None = None


BUDGET = {
    "preset": Maybe(TEXT),
    "keep_visual_tokens": Maybe(SIZE),
    "keep_layers": Maybe(COUNT),
    "rule": TEXT,
    "drop_at": Maybe(COUNT),
}
ROUTE_CELL = {
    "row": TEXT,
    "column": COUNT,
    "budget": BUDGET,
    **RESULT,
    "flops_share": SIZE,
    "decoder_flops_share": SIZE,
    "wrong": ListOf(COUNT),
    "searched": Maybe(TEXT),
}


def row_from_data(data: Any) -> tuple[str, list[RouteCell]]:
    """Read a row of cells as it is kept. Raises Misfit."""
    check(data, {"row": TEXT, "cells": ListOf(ROUTE_CELL)})
    cells = [{name: cell[name] for name in ROUTE_CELL} for cell in data["cells"]]
    return data["row"], [
        RouteCell(**cell | {name: tuple(cell[name]) for name in ("interval", "wrong")}) for cell in cells
    ]


@dataclass(frozen=True)
class RouteComparison:
    out: Path
    original: Rate
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[RouteCell, ...]  # one that is not here is out of the row's reach
    metric: str = EXACT_MATCH  # by its title
    task_uses: dict[str, Any] | None = None  # `used_data` of a task that is kept for a last test

    def cell(self, row: str, column: int) -> RouteCell | None:
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)

    def best(self, column: int) -> RouteCell:
        """Return the best cell of a column; of equal ones that which stays nearer to the original."""
        return max((cell for cell in self.cells if cell.column == column), key=lambda c: (c.accuracy, -c.kl))

    def p_value(self, cell: RouteCell) -> float:
        """Return whether a cell differs from the best one of its column: McNemar's exact test on the same questions."""
        return mcnemar(rights(cell.n, self.best(cell.column).wrong), rights(cell.n, cell.wrong))[2]

    @functools.cached_property
    def p_corrected(self) -> dict[tuple[str, int], float]:
        """Return p-values by row and column, corrected by Holm for all cells; the best of a column has none."""
        rest = [cell for cell in self.cells if cell != self.best(cell.column)]
        corrected = holm([self.p_value(cell) for cell in rest])
        return {(cell.row, cell.column): p_value for cell, p_value in zip(rest, corrected, strict=True)}

    def to_data(self) -> dict[str, Any]:
        cells = [
            asdict(cell)
            | {"p_value": self.p_value(cell), "p_corrected": self.p_corrected.get((cell.row, cell.column), 1.0)}
            for cell in self.cells
        ]
        return asdict(self) | {"out": str(self.out), "cells": cells}
