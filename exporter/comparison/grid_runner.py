"""What a grid's cells are made of, together, so that what they share is computed once: layers and folds."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.shapes import read_json
from ..compression.job import CompressionJob
from ..compression.steps import fold_job, localize
from ..fold.job import FoldRefused, GapMemo
from ..localize.scores import LayerScores
from ..methods import FOLDS, LOCALIZERS, resolve
from ..models.capture import BatchStatistics, layer_statistics
from ..models.questions import Questions
from ..models.variants import Variant
from ..plan import Folded, PruningPlan, make_plan
from ..progress import Progress
from ..recipe import Method
from .cells_file import CellsFile
from .grid import Cell, Comparison, Grid, Key, cell_from_data, label

CELLS_AT_A_TIME = 16  # whose new tensors are held together


def alike_together(keys: Sequence[Key], choices: dict[tuple[str, int], LayerScores]) -> Iterator[list[Key]]:
    """Yield the keys in parts of CELLS_AT_A_TIME different models: localizers that choose alike share their cells."""
    models: dict[tuple[frozenset[int], str], list[Key]] = {}
    for localizer, fold, count in keys:
        models.setdefault((frozenset(choices[localizer, count].drop), fold), []).append((localizer, fold, count))
    alike = list(models.values())
    for start in range(0, len(alike), CELLS_AT_A_TIME):
        yield [key for same in alike[start : start + CELLS_AT_A_TIME] for key in same]


@dataclass
class GridRunner:
    """One model and what its calibration questions tell: the layers that go and the folds of every cell."""

    grid: Grid
    job: CompressionJob
    model: Any
    progress: Progress
    counts: tuple[int, ...]  # of layers that go
    clock: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # folds that this model does not take, and why

    def timed(self, what: str, begin: float) -> None:
        self.clock.setdefault(what, []).append(time.monotonic() - begin)

    # localizers

    def choose(self) -> dict[tuple[str, int], LayerScores]:
        """Return the layers that each localizer drops at each budget."""
        chosen = {}
        for method in self.grid.localizers:
            for count in self.counts:
                chosen[label(method), count] = self._choose(method, count)
        return chosen

    def _choose(self, method: Method, count: int) -> LayerScores:
        row = LOCALIZERS[method.name]
        if row.from_statistics:
            chosen: LayerScores = resolve(row.run)(self.statistics, count, self.job.protect, **method.options)
            return chosen
        options = tuple(sorted(method.options.items()))
        if not row.nested:
            return self._choice(method.name, options, count)
        longest = self._choice(method.name, options, max(self.counts))
        return dataclasses.replace(longest, drop=longest.drop[:count])

    @functools.cache  # noqa: B019 - one runner a run
    def _choice(self, name: str, options: tuple[tuple[str, Any], ...], count: int) -> LayerScores:
        begin = time.monotonic()
        recipe = dataclasses.replace(self.job.recipe, localizer=Method(name, dict(options)))
        scores = localize(dataclasses.replace(self.job, recipe=recipe, count=count), self.model, self.questions)
        self.timed(name, begin)
        return scores

    @functools.cached_property
    def questions(self) -> Questions:
        return self.job.questions(self.model)

    @functools.cached_property
    def statistics(self) -> list[BatchStatistics]:
        begin = time.monotonic()
        measured = list(layer_statistics(self.model, self.questions.batches("score layers")))
        self.timed("statistics", begin)
        return measured

    def __hash__(self) -> int:
        return id(self)

    # cells

    def keys(self, choices: dict[tuple[str, int], LayerScores]) -> list[Key]:
        return [(name, label(fold), count) for name, count in choices for fold in self.grid.folds]

    def variants(self, choices: dict[tuple[str, int], LayerScores], keys: Sequence[Key]) -> dict[Key, Variant]:
        """Return the cells' models: equal layers and folds share one, and folds that are refused are left out."""
        folds = {label(fold): fold for fold in self.grid.folds}
        distinct: dict[tuple[PruningPlan, str], Variant] = {}
        variants = {}
        for key in keys:
            at = (make_plan(self.job.source.num_layers, choices[key[0], key[2]].drop), key[1])
            try:
                if at not in distinct:
                    distinct[at] = Variant(at[0], self.fold(at[0], folds[at[1]]))
            except FoldRefused as error:
                self.refused[at[1]] = str(error)
            if at in distinct:
                variants[key] = distinct[at]
        return variants

    def fold(self, plan: PruningPlan, method: Method) -> Folded:
        if not plan.drop:
            return {}
        begin = time.monotonic()
        fold_inputs = fold_job(self.job, self.model, questions=self.questions, plan=plan, memo=self._measured)
        folded: Folded = resolve(FOLDS[method.name].run)(fold_inputs, **method.options)
        self.timed("fold", begin)
        return folded

    @functools.cached_property
    def _measured(self) -> GapMemo:
        return GapMemo()

    def naive_seconds(self, cells: int, judged: dict[str, list[float]]) -> float:
        """Return the seconds of a loop over cells that shares nothing: each would localize, fold and answer anew.

        Args:
            judged: the times of the task's judge.
        """
        per_cell = {what: max(times) for what, times in (self.clock | judged).items()}
        clocks = [
            "statistics" if LOCALIZERS[method.name].from_statistics else method.name for method in self.grid.localizers
        ]
        localizing = sum(per_cell.get(clock, 0.0) for clock in clocks) / len(clocks)
        return cells * (localizing + per_cell.get("fold", 0.0) + per_cell.get("answer", 0.0))


class FinishedCells:
    """Cells of the grid on disk as they are done."""

    def __init__(self, out: Path, grid: Grid) -> None:
        self.out = out
        columns = [f.name for f in dataclasses.fields(Cell)]
        depends_on = asdict(grid) | {"task": grid.task.to_data()}
        for name in ("seeds", "task_seed"):  # so that a folder of before they were there is that of the same comparison
            depends_on = {key: value for key, value in depends_on.items() if key != name or value}
        self.file = CellsFile(out / "cells.jsonl", [depends_on, columns])
        self.cells: dict[Key, Cell] = {}
        for cell in self.file.read(cell_from_data):
            self.cells[cell.localizer, cell.fold, len(cell.drop)] = cell

    def finished(self) -> Comparison | None:
        """Return the result of an earlier run that came to its end, if there is one."""
        results = self.out / "results.json"
        if not results.is_file():
            return None
        try:
            return Comparison.from_data(read_json(results), results.parent)
        except (OSError, ValueError, KeyError, TypeError):  # a damaged one is made again from the cells
            return None

    def add(self, cells: dict[Key, Cell]) -> None:
        """Keep cells, if there are some."""
        if cells:
            self.cells |= cells
            self.file.add([asdict(cell) for cell in cells.values()])
