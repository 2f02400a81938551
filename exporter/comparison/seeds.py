"""A grid repeated with calibration questions that several seeds draw: means, spread, and what differs with each."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cards.tables import markdown_table, table
from ..errors import InputError
from ..evaluation.scoring import Rate, holm, mcnemar, rights
from ..progress import Progress, silent
from ..recipe import RunOptions
from .grid import Cell, Comparison, Grid, Key, key_of
from .layers import compare_together
from .saved import write_all


@dataclass(frozen=True)
class SeedsRow:
    """A localizer, a fold and a number of dropped layers over all seeds."""

    localizer: str
    fold: str
    drops: tuple[tuple[int, ...], ...]  # layers, by seed
    parameters: int
    accuracy: tuple[float, ...]  # by seed
    kept: tuple[float, ...]
    p_value: float = 1.0  # against the best row of its budget: the largest over the seeds
    p_corrected: float | None = None  # by Holm for all rows; None: it is the best of its budget

    @property
    def count(self) -> int:
        return len(self.drops[0])


@dataclass(frozen=True)
class SeedsComparison:
    """All rows, and each seed's own comparison."""

    out: Path
    seeds: tuple[int, ...]
    metric: str
    original: Rate
    parameters: int
    rows: tuple[SeedsRow, ...]
    of_seed: tuple[Comparison, ...]

    @property
    def task_uses(self) -> dict[str, Any] | None:
        return self.of_seed[0].task_uses

    def to_data(self) -> dict[str, Any]:
        rows = [asdict(row) | {"mean": mean(row), "spread": spread(row.accuracy)} for row in self.rows]
        data: dict[str, Any] = {"out": str(self.out), "seeds": list(self.seeds), "metric": self.metric, "rows": rows}
        data |= {"original": asdict(self.original), "parameters": self.parameters, "task_uses": self.task_uses}
        return data | {
            "cells": {
                seed: comparison.to_data()["cells"] for seed, comparison in zip(self.seeds, self.of_seed, strict=True)
            }
        }


def mean(row: SeedsRow) -> float:
    """Return a row's mean over the seeds."""
    return statistics.fmean(row.accuracy)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over the seeds."""
    return statistics.stdev(values)


def folder_of(out: Path, seed: int) -> Path:
    """Return the folder of one seed's comparison."""
    return out / f"seed-{seed}"


def compare_seeds(
    grid: Grid, out: Path | str, options: RunOptions = RunOptions(batch_size=32), progress: Progress = silent
) -> SeedsComparison:
    """Fill the grid for each of its seeds in `out`/seed-N; write table.md and results.json into `out`.

    The calibration questions are drawn by each seed, and the task's questions stay the same.
    Raises: InputError for wrong input; what was measured before stays in `out`, and the same command goes on from it.
    """
    out = Path(out)
    parts = {folder_of(out, seed): grid.of_seed(seed) for seed in grid.seeds}
    with made_folder(out):
        done = compare_together(parts, out, options, progress)
    result = over_seeds(out, grid.seeds, tuple(done.values()))
    write_all(out, {"table.md": seeds_markdown(result)}, {}, result.to_data())
    return result


@contextlib.contextmanager
def made_folder(out: Path) -> Any:
    """Make a folder for parts; wrong input leaves none behind that holds nothing."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except InputError:
        with contextlib.suppress(OSError):
            out.rmdir()  # unless it holds something
        raise


def over_seeds(out: Path, seeds: Sequence[int], of_seed: tuple[Comparison, ...]) -> SeedsComparison:
    """Put the comparisons of all seeds together; rows that a seed has not (a fold was refused) are left out."""
    first = of_seed[0]
    cells = [{key_of(cell): cell for cell in comparison.cells} for comparison in of_seed]
    keys = [key for key in cells[0] if all(key in by_key for by_key in cells)]
    rows = [_row(key, [by_key[key] for by_key in cells]) for key in keys]
    best = {row.count: max((r for r in rows if r.count == row.count), key=mean) for row in rows}
    tested = []
    for key, row in zip(keys, rows, strict=True):
        first_of_all = best[row.count]
        rival = (first_of_all.localizer, first_of_all.fold, row.count)
        tested.append(replace(row, p_value=max(_p_value(by_key, rival, key) for by_key in cells)))
    rest = [number for number, row in enumerate(rows) if row is not best[row.count]]
    for number, p_value in zip(rest, holm([tested[n].p_value for n in rest]), strict=True):
        tested[number] = replace(tested[number], p_corrected=p_value)
    head = (out, tuple(seeds), first.metric, first.original, first.parameters)
    return SeedsComparison(*head, rows=tuple(tested), of_seed=of_seed)


def _row(key: Key, cells: Sequence[Cell]) -> SeedsRow:
    return SeedsRow(
        localizer=key[0],
        fold=key[1],
        drops=tuple(cell.drop for cell in cells),
        parameters=cells[0].parameters,
        accuracy=tuple(cell.accuracy for cell in cells),
        kept=tuple(cell.kept for cell in cells),
    )


def _p_value(cells: Mapping[Key, Cell], best: Key, other: Key) -> float:
    return mcnemar(*(rights(cells[key].n, cells[key].wrong) for key in (best, other)))[2]


# --- what people read -------------------------------------------------------------------------------------------------

P_NOTE = (
    "±: standard deviation over the seeds. p: the largest over the seeds, of a row against the best one of its budget "
    "on the same questions (McNemar, exact), by Holm for all rows: below 0.05, the two differ with each seed."
)


def seeds_header(done: SeedsComparison) -> tuple[str, ...]:
    return (
        "localizer + fold",
        "dropped",
        "layers",
        "parameters",
        f"{done.metric} %",
        "±",
        "lowest-highest",
        "kept %",
        "p",
    )


def seeds_rows(done: SeedsComparison) -> list[tuple[str, ...]]:
    """Return a row of each method, by number of dropped layers, the best mean first."""
    return [
        (
            f"{row.localizer} + {row.fold}",
            str(row.count),
            " / ".join(dict.fromkeys(",".join(map(str, sorted(drop))) for drop in row.drops)),
            f"{row.parameters:,}",
            f"{100 * mean(row):.1f}",
            f"{100 * spread(row.accuracy):.1f}",
            f"{100 * min(row.accuracy):.1f}-{100 * max(row.accuracy):.1f}",
            f"{100 * statistics.fmean(row.kept):.1f}",
            "" if row.p_corrected is None else f"{row.p_corrected:.2g}",
        )
        for row in sorted(done.rows, key=lambda row: (row.count, -mean(row)))
    ]


def seeds_notes(done: SeedsComparison) -> list[str]:
    """Return what a reader of the table has to know."""
    low, high = done.original.interval
    notes = [
        f"original: {100 * done.original.accuracy:.1f} % ({100 * low:.1f}-{100 * high:.1f}) of {done.original.n} "
        f"questions, {done.parameters:,} parameters; calibration questions drawn by the seeds "
        f"{', '.join(map(str, done.seeds))}",
        P_NOTE,
    ]
    refused = {fold: reason for comparison in done.of_seed for fold, reason in comparison.refused.items()}
    notes += [f"{fold}, left out: {reason}" for fold, reason in refused.items()]
    return notes + ([done.task_uses["sentence"]] if done.task_uses else [])


def seeds_text(done: SeedsComparison) -> str:
    """Return the table as text for the terminal."""
    return "\n".join([table(seeds_header(done), seeds_rows(done)), "", *seeds_notes(done)])


def seeds_markdown(done: SeedsComparison) -> str:
    rows = markdown_table(seeds_header(done), seeds_rows(done))
    return "\n".join([rows, "", *(f"{note}\n" for note in seeds_notes(done))])
