"""Who should choose what runs: routers and rules on the user's own model and data, one table and one picture.

Rows are routers (of one or several folders, so that ways of training are compared too), rules, and an oracle; columns
are budgets. By default all rows of a column cost the same counted FLOPs: the first row has the column's budget as it
is, a row that leaves tokens out only, or later, keeps as many of them as that leaves room for.

Batches are made once for all columns of a row, and answers are generated again only where a cell departs from what the
unrouted model says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..cards.figures import describe
from ..checkpoints.source import Source, open_source
from ..data.uses import begin_use, run_of, used_data
from ..errors import InputError
from ..evaluation.metrics.table import METRICS
from ..evaluation.metrics.task import compared_task
from ..evaluation.scoring import Rate
from ..progress import Progress, silent
from ..recipe import RunOptions
from ..routing.requests import BudgetRequest, router_settings
from .routes import RouteComparison, RouteTables
from .routes_runner import FinishedRows, RoutesRunner
from .routes_table import plot_routes, table_markdown
from .saved import write_all


def compare_routes(
    tables: RouteTables,
    out: Path | str,
    options: RunOptions = RunOptions(batch_size=32),
    progress: Progress = silent,
    run: Path | str | None = None,
) -> RouteComparison:
    """Fill the table; write results.json, table.md and accuracy.png into `out`, where finished rows are kept.

    Args:
        run: the folder of a whole of which this is a part; None: `out`.
    Raises: InputError for wrong input, and for several seeds, which need routers that are trained for each.
    """
    out = Path(out)
    if tables.seeds:
        raise InputError("seeds: routers are compared over seeds with 'tasks' and 'routers', which train one for each.")
    sources = {name: open_source(name) for name in {tables.model, *(row.folder for row in tables.rows if row.folder)}}
    _check_rows(tables, sources)
    task = compared_task(tables.task, tables.task_samples, tables.questions_seed)
    kept = FinishedRows(out, tables)
    who = (tables.task.data, "compare", sorted(sources))
    uses = begin_use(*who, len(task.samples), task.fingerprint, run_of(out if run is None else Path(run)))
    runner = RoutesRunner.of(tables, task, options, progress)
    for row in tables.rows:
        if row.name not in kept.cells:
            kept.add(row.name, runner.fill(row))
    names = tuple(describe(BudgetRequest(budget).to_data()) for budget in tables.budgets)
    cells = tuple(cell for row in tables.rows for cell in kept.cells[row.name])
    done = RouteComparison(
        out=out,
        original=Rate.of(runner.original.trials),
        columns=names,
        rows=tuple(row.name for row in tables.rows),
        cells=cells,
        metric=METRICS[task.metric].title,
        task_uses=used_data(uses).get("task_uses"),
    )
    pictures = {"accuracy.png": lambda path: plot_routes(done, path)}
    write_all(out, {"table.md": table_markdown(done)}, pictures, done.to_data())
    return done


def _check_rows(tables: RouteTables, sources: Mapping[str, Source]) -> None:
    """Raise InputError for a row that can't run under a budget, or that measures layers without questions."""
    for row in tables.rows:
        source = sources[row.folder or tables.model]
        if "serving_router" in source.raw_config and row.folder is not None:
            raise InputError(
                f"row '{row.name}': {source.name} has a serving router, which chooses before the decoder, and rows are "
                "compared at equal FLOPs inside it: `lvlm-exporter evaluate --preset` measures it."
            )
        settings = router_settings(source, row.parsed())
        for budget in tables.budgets:
            try:
                budget.check(settings, source.num_layers)
            except ValueError as error:
                raise InputError(f"row '{row.name}': {error}") from error
        if row.parsed().layers == "shortgpt" and tables.calibration is None:
            raise InputError(f"row '{row.name}': shortgpt measures layers on questions: add calibration: FILE.")
