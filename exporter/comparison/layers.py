"""The grid localizers x folds x budgets on the user's own model and data, in one run, one table and one picture.

What cells share is computed once: one statistics pass for all one-pass localizers and budgets, one greedy search for
all its budgets, one measurement of a gap for all folds, image features and unchanged layers for all cells of a batch,
and answers are generated again only where a cell departs from what the original says.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from ..compression.job import prepare
from ..data.batches import by_size
from ..evaluation.metrics.task import compared_task
from ..progress import Progress, silent
from ..recipe import RunOptions
from .grid import Comparison, Grid
from .grid_runner import FinishedCells, GridRunner, alike_together
from .grid_table import write_results


def compare(
    grid: Grid, out: Path | str, options: RunOptions = RunOptions(batch_size=32), progress: Progress = silent
) -> Comparison:
    """Fill the grid; write results.json, table.md and accuracy.png into `out`.

    Cells that an earlier, broken-off run of the same grid has left in `out` are not computed again.
    """
    out = Path(out)
    kept = FinishedCells(out, grid)
    if finished := kept.finished():
        return finished
    begin = time.monotonic()
    job = prepare(grid.recipe(), options, progress)
    task = compared_task(grid.task, grid.task_samples, grid.seed)
    task = dataclasses.replace(task, samples=tuple(by_size(task.samples)))
    model, _ = job.load_model()
    counts = tuple(job.count_of(budget) for budget in grid.budgets)
    runner = GridRunner(
        grid=grid, job=job, model=model, task=task, progress=progress, counts=tuple(dict.fromkeys(counts))
    )
    choices = runner.choose()
    cells = dict(kept.cells)
    todo = [key for key in runner.keys(choices) if key not in cells]
    for some in alike_together(todo, choices):
        fresh = runner.fill(choices, some)
        kept.add(fresh)
        cells |= fresh
    ordered = tuple(cells[key] for key in runner.keys(choices) if key in cells)
    seconds = time.monotonic() - begin
    best = {
        count: max((c for c in ordered if len(c.drop) == count), key=lambda c: (c.accuracy, -c.kl))
        for count in runner.counts
    }
    done = Comparison(
        out=out,
        original=runner.original,
        parameters=job.source.weights.num_parameters,
        cells=ordered,
        seconds=seconds,
        naive_seconds=runner.naive_seconds(len(todo)),
        best=best,
        num_layers=job.source.num_layers,
        counts=counts,
        ratios=grid.drop_ratios,
        refused=runner.refused,
    )
    write_results(done)
    return done
