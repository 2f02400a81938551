"""A grid of localizers, folds and budgets, and its results, as data."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cards.figures import EXACT_MATCH
from ..checkpoints.shapes import COUNT, SHARE, SIZE, TEXT, ListOf, MapOf, Maybe, Misfit, check
from ..data.uses import USE
from ..errors import InputError
from ..evaluation.scoring import Rate, holm, mcnemar, rights
from ..methods import FOLDS, LOCALIZERS
from ..plain_data import check_keys, check_types, integers, paths_as_text
from ..plan import LayerBudget
from ..recipe import (
    CalibrationData,
    Method,
    Recipe,
    TaskData,
    calibration_from_data,
    check_method,
    from_yaml,
    read_method,
    task_from_data,
)
from .cells_file import RESULT
from .seed_list import seeds_from_data


@dataclass(frozen=True)
class Grid:
    """A comparison as data; its YAML has the same keys."""

    model: str
    calibration: CalibrationData
    task: TaskData
    localizers: tuple[Method, ...]
    folds: tuple[Method, ...]
    drop_layers: tuple[int, ...] = ()  # this, or drop_ratios
    drop_ratios: tuple[float, ...] = ()  # shares of the layers, for models of different depths
    task_samples: int | None = None
    revision: str | None = None
    protect: tuple[int, ...] | None = None
    seed: int = 0
    seeds: tuple[int, ...] = ()  # for which calibration questions are drawn anew; (): for `seed` alone
    task_seed: int | None = None  # that draws `task_samples`; None: `seed`

    def __post_init__(self) -> None:
        paths_as_text(self, "model")
        if bool(self.drop_layers) == bool(self.drop_ratios):
            raise InputError("a comparison needs 'drop_layers', or 'drop_ratios' in its place.")

    @property
    def budgets(self) -> tuple[LayerBudget, ...]:
        if self.drop_ratios:
            return tuple(LayerBudget(drop_ratio=ratio) for ratio in self.drop_ratios)
        return tuple(LayerBudget(drop_layers=count) for count in self.drop_layers)

    def of_seed(self, seed: int) -> Grid:
        """Return the comparison with the calibration questions that one seed draws; the task's stay the same."""
        return dataclasses.replace(self, seed=seed, seeds=(), task_seed=self.questions_seed)

    @property
    def questions_seed(self) -> int:
        """Return the seed that draws the task's questions."""
        return self.seed if self.task_seed is None else self.task_seed

    def recipe(self) -> Recipe:
        """Return the recipe of the cells with the fewest layers."""
        largest = max(self.budgets, key=lambda budget: budget.drop_ratio or budget.drop_layers or 0)
        return Recipe(
            self.model,
            self.calibration,
            largest,
            self.revision,
            protect=self.protect,
            seed=self.seed,
        )


def load_grid(path: Path | str) -> Grid:
    """Read a grid's YAML: keys of a recipe with lists of localizers, folds and drop_layers, and a task."""
    return from_yaml(path, grid_from_data)


def grid_from_data(data: Any) -> Grid:
    check_keys(data, [f.name for f in dataclasses.fields(Grid)], "a comparison")
    if missing := [key for key in ("model", "calibration", "task", "localizers", "folds") if key not in data]:
        raise InputError(f"a comparison needs '{missing[0]}'.")
    for key in ("localizers", "folds", "drop_layers", "drop_ratios"):
        if key in data and (not isinstance(data[key], list) or not data[key]):
            raise InputError(f"{key} must be a list, not {data[key]!r}.")
    check_types(Grid, data, ("model", "task_samples", "revision", "seed", "task_seed"))
    localizers = tuple(read_method(value, LOCALIZERS, "localizer") for value in data["localizers"])
    folds = tuple(read_method(value, FOLDS, "fold") for value in data["folds"])
    for method in localizers:
        check_method(method, LOCALIZERS, "localizer")
    for method in folds:
        check_method(method, FOLDS, "fold")
    rest = {key: data[key] for key in ("task_samples", "revision", "seed", "task_seed") if key in data}
    protect = data.get("protect")
    return Grid(
        model=data["model"],
        calibration=calibration_from_data(data["calibration"]),
        task=task_from_data(data["task"]),
        localizers=localizers,
        folds=folds,
        drop_layers=integers(data.get("drop_layers", []), "drop_layers"),
        drop_ratios=shares(data.get("drop_ratios", [])),
        seeds=seeds_from_data(data),
        protect=None if protect is None else integers(protect, "protect"),
        **rest,
    )


def shares(values: Any) -> tuple[float, ...]:
    if bad := [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < 1]:
        raise InputError(f"drop_ratios: {bad[0]!r}: a share of the layers, above 0 and below 1, is needed.")
    return tuple(map(float, values))


@dataclass(frozen=True)
class Cell:
    """One localizer, fold and budget on the task."""

    localizer: str
    fold: str
    drop: tuple[int, ...]
    parameters: int
    n: int
    accuracy: float
    interval: tuple[float, float]
    kept: float  # of the original's accuracy
    by_type: dict[str, float]
    kl: float  # per answer token of the original
    agreement: float
    wrong: tuple[int, ...]  # questions, by their number in the task sorted by size


CELL = {
    "localizer": TEXT,
    "fold": TEXT,
    "drop": ListOf(COUNT),
    "parameters": COUNT,
    **RESULT,
    "wrong": ListOf(COUNT),
}


def cell_from_data(data: Any) -> Cell:
    """Read a cell as it is kept. Raises Misfit."""
    check(data, CELL)
    read: dict[str, Any] = {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in CELL}
    return Cell(**read)


RESULTS = {
    "original": {"n": COUNT, "accuracy": SHARE, "interval": ListOf(SHARE, 2)},
    "parameters": COUNT,
    "cells": ListOf(CELL),
    "seconds": SIZE,
    "naive_seconds": SIZE,
    "best": MapOf(CELL),
    "num_layers": COUNT,
    "counts": ListOf(COUNT),
    "ratios": ListOf(SHARE),
    "refused": MapOf(TEXT),
    "metric": TEXT,
    "task_uses": Maybe({"sentence": TEXT, "earlier": ListOf(USE)}),
}


@dataclass(frozen=True)
class Comparison:
    out: Path
    original: Rate
    parameters: int
    cells: tuple[Cell, ...]
    seconds: float
    naive_seconds: float  # of the loop that does each cell from scratch, from the times measured in this run
    best: dict[int, Cell] = field(default_factory=dict)  # by number of dropped layers
    num_layers: int = 0
    counts: tuple[int, ...] = ()  # of dropped layers, in the order of the grid's budgets
    ratios: tuple[float, ...] = ()  # of the grid, one a count; () where it names numbers of layers
    refused: dict[str, str] = field(default_factory=dict)  # folds that this model does not take, and why
    metric: str = EXACT_MATCH  # by its title
    task_uses: dict[str, Any] | None = None  # `used_data` of a task that is kept for a last test

    def p_value(self, cell: Cell) -> float:
        """Return whether a cell differs from the best one of its budget: McNemar's exact test on the same questions."""
        best = self.best[len(cell.drop)]
        return mcnemar(rights(cell.n, best.wrong), rights(cell.n, cell.wrong))[2]

    @functools.cached_property
    def p_corrected(self) -> tuple[float, ...]:
        """Return the p-values of all cells, corrected for their number by Holm; 1 for the best of each budget."""
        rows = [n for n, cell in enumerate(self.cells) if cell != self.best[len(cell.drop)]]
        corrected = dict(zip(rows, holm([self.p_value(self.cells[n]) for n in rows]), strict=True))
        return tuple(corrected.get(number, 1.0) for number in range(len(self.cells)))

    def to_data(self) -> dict[str, Any]:
        cells = [
            asdict(cell) | {"p_value": self.p_value(cell), "p_corrected": corrected}
            for cell, corrected in zip(self.cells, self.p_corrected, strict=True)
        ]
        return asdict(self) | {"out": str(self.out), "cells": cells}

    @staticmethod
    def from_data(data: dict[str, Any], out: Path) -> Comparison:
        """Read what to_data wrote into results.json. Raises ValueError, KeyError, TypeError for a damaged one."""
        check(data, RESULTS)
        cells = tuple(cell_from_data(cell) for cell in data["cells"])
        best = {int(count): cell_from_data(cell) for count, cell in data["best"].items()}
        if strange := [count for count, cell in best.items() if cell not in cells or len(cell.drop) != count]:
            raise Misfit(f"'best.{strange[0]}' is none of its cells")
        if {*data["counts"]} != {*best} or len(data["ratios"]) not in (0, len(data["counts"])):
            raise Misfit("its 'counts', its 'ratios' and 'best' do not name the same budgets")
        rate = data["original"]
        original = Rate(rate["n"], rate["accuracy"], tuple(rate["interval"]))
        same = {"out": out, "original": original, "cells": cells, "best": best}
        return Comparison(**data | same | {name: tuple(data[name]) for name in ("counts", "ratios")})


Key = tuple[str, str, int]  # localizer, fold, number of dropped layers


def key_of(cell: Cell) -> Key:
    return cell.localizer, cell.fold, len(cell.drop)


def label(method: Method) -> str:
    """Return 'scp', or 'scp k=16' where it has options."""
    return " ".join([method.name, *(f"{k}={v}" for k, v in method.options.items())])
