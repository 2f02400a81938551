"""A grid of localizers, folds and budgets, and its results, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation.scoring import Rate, mcnemar
from ..fold import FOLDS
from ..localize import LOCALIZERS
from ..plan import LayerBudget
from ..recipe import (
    FOLD_NAMES,
    LOCALIZER_NAMES,
    CalibrationData,
    Method,
    Recipe,
    TaskData,
    calibration_from_data,
    check_keys,
    check_options,
    from_yaml,
    integers,
    paths_as_text,
    read_method,
    task_from_data,
)


@dataclass(frozen=True)
class Grid:
    """A comparison as data; its YAML has the same keys."""

    model: str
    calibration: CalibrationData
    task: TaskData
    localizers: tuple[Method, ...]
    folds: tuple[Method, ...]
    drop_layers: tuple[int, ...]
    task_samples: int | None = None
    revision: str | None = None
    protect: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        paths_as_text(self, "model")

    def recipe(self, count: int) -> Recipe:
        return Recipe(
            self.model,
            self.calibration,
            LayerBudget(drop_layers=count),
            self.revision,
            protect=self.protect,
            seed=self.seed,
        )


def load_grid(path: Path | str) -> Grid:
    """Read a grid's YAML: keys of a recipe with lists of localizers, folds and drop_layers, and a task."""
    return from_yaml(path, grid_from_data)


def grid_from_data(data: Any) -> Grid:
    check_keys(data, [f.name for f in dataclasses.fields(Grid)], "a comparison")
    if missing := [
        key for key in ("model", "calibration", "task", "localizers", "folds", "drop_layers") if key not in data
    ]:
        raise InputError(f"a comparison needs '{missing[0]}'.")
    for key in ("localizers", "folds", "drop_layers"):
        if not isinstance(data[key], list) or not data[key]:
            raise InputError(f"{key} must be a list, not {data[key]!r}.")
    localizers = tuple(read_method(value, LOCALIZER_NAMES, "localizer") for value in data["localizers"])
    folds = tuple(read_method(value, FOLD_NAMES, "fold") for value in data["folds"])
    for method in localizers:
        check_options(LOCALIZERS[method.name], method, "localizer")
    for method in folds:
        check_options(FOLDS[method.name], method, "fold")
    rest = {key: data[key] for key in ("task_samples", "revision", "seed") if key in data}
    protect = data.get("protect")
    return Grid(
        str(data["model"]),
        calibration_from_data(data["calibration"]),
        task_from_data(data["task"]),
        localizers,
        folds,
        integers(data["drop_layers"], "drop_layers"),
        protect=None if protect is None else integers(protect, "protect"),
        **rest,
    )


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

    def p_value(self, cell: Cell) -> float:
        """Whether a cell differs from the best one of its budget: McNemar's exact test on the same questions."""
        best = self.best[len(cell.drop)]
        wrong = [set(one.wrong) for one in (best, cell)]
        return mcnemar(*([index not in one for index in range(cell.n)] for one in wrong))[2]

    def to_data(self) -> dict[str, Any]:
        cells = [asdict(cell) | {"p_value": self.p_value(cell)} for cell in self.cells]
        return asdict(self) | {"out": str(self.out), "cells": cells}


Key = tuple[str, str, int]  # localizer, fold, number of dropped layers


def label(method: Method) -> str:
    """'scp', or 'scp k=16' where it has options."""
    return " ".join([method.name, *(f"{k}={v}" for k, v in method.options.items())])
