"""The rows of a comparison on several tasks: over seeds, and how sure their differences are. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..evaluation.scoring import holm, mcnemar
from .speed import Ratio


@dataclass(frozen=True)
class TaskRow:
    """A method under a budget on all tasks. Figures that there are none of are None, or missing."""

    table: str
    method: str
    layers: int | None = None
    visual_tokens: float | None = None  # share that is kept
    tflops: float | None = None  # by the papers' formula
    flops_share: float | None = None  # counted, of the decoder's; of a router and of rules
    parameters: int | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)  # of the original's
    speed: Ratio | None = None
    reason: str | None = None  # why there are no figures
    by_seed: dict[str, tuple[float, ...]] = field(default_factory=dict)  # accuracy with each seed, where there are some
    p_value: float | None = None  # against the best row of its table, the largest over the seeds; None: it is the best
    p_corrected: float | None = None  # by Holm for all rows
    right: dict[str, tuple[bool, ...]] = field(default_factory=dict, repr=False)  # which questions, while rows are made

    @property
    def mean(self) -> float | None:
        return sum(self.accuracy.values()) / len(self.accuracy) if self.accuracy else None


@dataclass(frozen=True)
class TasksComparison:
    """All rows; the first of each table is the original."""

    out: Path
    tasks: tuple[str, ...]
    rows: tuple[TaskRow, ...]
    metrics: dict[str, str]  # of each task, by its title
    seeds: tuple[int, ...] = ()
    task_uses: dict[str, Any] = field(default_factory=dict)  # `used_data` of tasks that are kept for a last test

    def to_data(self) -> dict[str, Any]:
        data = asdict(self) | {"out": str(self.out)}
        for row in data["rows"]:
            del row["right"]
        return data


def over_seeds(of_seed: Sequence[Sequence[TaskRow]]) -> list[TaskRow]:
    """Return the rows of all seeds as one each, with p-values against the best row of their table.

    Args:
        of_seed: each seed's rows, in the same order; one seed where nothing is repeated.
    """
    merged = [_merged(rows) for rows in zip(*of_seed, strict=True)]
    scored = [number for number, row in enumerate(merged) if row.right]
    best: dict[str, int] = {}
    for number in scored:
        table = merged[number].table
        if table not in best or (merged[number].mean or 0) > (merged[best[table]].mean or 0):
            best[table] = number
    rest = [number for number in scored if number not in best.values()]
    p_values = [max(_p_value(rows[best[rows[n].table]], rows[n]) for rows in of_seed) for n in rest]
    for number, p_value, corrected in zip(rest, p_values, holm(p_values), strict=True):
        merged[number] = replace(merged[number], p_value=p_value, p_corrected=corrected)
    return merged


def _p_value(best: TaskRow, other: TaskRow) -> float:
    """Compare two rows on the questions of all tasks."""
    first, second = ([right for task in row.right.values() for right in task] for row in (best, other))
    return mcnemar(first, second)[2]


def _merged(rows: Sequence[TaskRow]) -> TaskRow:
    """Return a row's means over the seeds; it has no figures where a seed has none."""
    first = rows[0]
    if len(rows) == 1:
        return first
    if without := next((row for row in rows if row.reason is not None), None):
        return without
    shares = [row.flops_share for row in rows if row.flops_share is not None]
    return replace(
        first,
        accuracy={name: statistics.fmean(row.accuracy[name] for row in rows) for name in first.accuracy},
        kept={name: statistics.fmean(row.kept[name] for row in rows) for name in first.kept},
        flops_share=statistics.fmean(shares) if shares else None,
        by_seed={name: tuple(row.accuracy[name] for row in rows) for name in first.accuracy},
    )
