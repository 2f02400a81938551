"""The grid localizers x folds x budgets on the user's own model and data, in one run, one table and one picture.

What cells share is computed once: one statistics pass for all one-pass localizers and budgets, one greedy search for
all its budgets, one measurement of a gap for all folds, image features and unchanged layers for all cells of a batch,
and answers are generated again only where a cell departs from what the original says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..compression.job import CompressionJob, prepare
from ..data.batches import by_size
from ..data.uses import begin_use, run_of, used_data
from ..errors import InputError
from ..evaluation.metrics.table import METRICS
from ..evaluation.metrics.task import compared_task
from ..progress import Progress, silent
from ..recipe import RunOptions
from .grid import Cell, Comparison, Grid
from .grid_judge import TaskJudge
from .grid_runner import FinishedCells, GridRunner, alike_together
from .grid_table import write_results


def compare(
    grid: Grid, out: Path | str, options: RunOptions = RunOptions(batch_size=32), progress: Progress = silent
) -> Comparison:
    """Fill the grid; write results.json, table.md and accuracy.png into `out`.

    Cells that an earlier, broken-off run of the same grid has left in `out` are not computed again.
    Raises: InputError for wrong input, and for a grid of several seeds, which `compare_seeds` takes.
    """
    if grid.seeds:
        raise InputError("a comparison over several seeds is `compare_seeds`'s: leave 'seeds' out here.")
    out = Path(out)
    return compare_together({out: grid}, out, options, progress)[out]


def compare_together(
    parts: Mapping[Path, Grid], run: Path, options: RunOptions, progress: Progress
) -> dict[Path, Comparison]:
    """Fill grids that differ in their tasks and seeds alone, each in its own folder.

    The model is loaded once and answers each task once; layers and folds, which depend on the calibration questions
    alone, are found once for each seed.

    Args:
        run: the folder of all of it: one use of a task that counts its uses.
    """
    kept = {out: FinishedCells(out, grid) for out, grid in parts.items()}
    done = {out: finished for out, cells in kept.items() if (finished := cells.finished())}
    todo = {out: grid for out, grid in parts.items() if out not in done}
    shared = Shared(options, progress, run)
    for seed in dict.fromkeys(grid.seed for grid in todo.values()):
        of_seed = {out: grid for out, grid in todo.items() if grid.seed == seed}
        done |= _of_one_seed(of_seed, kept, shared)
    return {out: done[out] for out in parts}


@dataclass
class Shared:
    """What all seeds of a run share: the loaded model, and each task with the original's answers."""

    options: RunOptions
    progress: Progress
    run: Path
    model: Any = None
    judges: dict[str, TaskJudge] = field(default_factory=dict)

    def judge_of(self, grid: Grid, job: CompressionJob) -> TaskJudge:
        """Return a grid's task with the original's answers, read and asked if no earlier grid has."""
        key = json.dumps([grid.task.to_data(), grid.task_samples, grid.questions_seed])
        if key not in self.judges:
            task = compared_task(grid.task, grid.task_samples, grid.questions_seed)
            task = replace(task, samples=tuple(by_size(task.samples)))
            who = (grid.task.data, "compare", [grid.model])
            uses = begin_use(*who, len(task.samples), task.fingerprint, run_of(self.run))
            self.judges[key] = TaskJudge(job, self.model, task=task, progress=self.progress, uses=uses)
        return self.judges[key]


def _of_one_seed(
    parts: Mapping[Path, Grid], kept: Mapping[Path, FinishedCells], shared: Shared
) -> dict[Path, Comparison]:
    """Fill the grids of one seed."""
    begin, grid = time.monotonic(), next(iter(parts.values()))
    job = prepare(grid.recipe(), shared.options, shared.progress)
    if shared.model is None:
        shared.model, _ = job.load_model()
    judges = {out: shared.judge_of(part, job) for out, part in parts.items()}
    counts = tuple(job.count_of(budget) for budget in grid.budgets)
    runner = GridRunner(grid, job, model=shared.model, progress=shared.progress, counts=tuple(dict.fromkeys(counts)))
    choices = runner.choose()
    todo = {out: [key for key in runner.keys(choices) if key not in kept[out].cells] for out in parts}
    needed = [key for key in runner.keys(choices) if any(key in keys for keys in todo.values())]
    for some in alike_together(needed, choices):
        variants = runner.variants(choices, some)
        for out, judge in judges.items():
            kept[out].add(judge.rate({key: variant for key, variant in variants.items() if key in todo[out]}))
    seconds = (time.monotonic() - begin) / len(parts)
    done = {}
    for out, judge in judges.items():
        cells = tuple(kept[out].cells[key] for key in runner.keys(choices) if key in kept[out].cells)
        naive = runner.naive_seconds(len(todo[out]), judge.clock)
        done[out] = Comparison(
            out=out,
            original=judge.original,
            parameters=job.source.weights.num_parameters,
            cells=cells,
            seconds=seconds,
            naive_seconds=naive,
            best=best_of(cells, runner.counts),
            num_layers=job.source.num_layers,
            counts=counts,
            ratios=grid.drop_ratios,
            refused=dict(runner.refused),
            metric=METRICS[judge.task.metric].title,
            task_uses=used_data(judge.uses).get("task_uses"),
        )
        write_results(done[out])
    return done


def best_of(cells: Sequence[Cell], counts: Sequence[int]) -> dict[int, Cell]:
    """Return the best cell of each number of dropped layers; of equal ones that which stays nearer to the original."""
    return {
        count: max((cell for cell in cells if len(cell.drop) == count), key=lambda c: (c.accuracy, -c.kl))
        for count in counts
    }
