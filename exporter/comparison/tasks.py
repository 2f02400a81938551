"""A comparison put on several tasks, in the form of the papers' tables: a row a method, a column a task, with the mean.

Every task is a comparison of its own in a folder of its own, which goes on where a broken-off run has left it. Routers
that the rows name are trained first. Rows that can't be made stand in the table with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cards import tables as report
from ..cards.plots import MARKERS, PALETTE, figure, save
from ..checkpoints.record import RECORD, read_record
from ..checkpoints.source import open_source
from ..clean_room import load_processor
from ..errors import InputError
from ..evaluation.metrics.task import compared_task
from ..pipeline import route
from ..progress import Progress, silent
from ..recipe import RunOptions
from ..routing.cost import few_prompts
from ..routing.requests import router_settings
from .grid import Comparison, Grid
from .layers import compare
from .routers import compare_routes
from .routes import RouteComparison, RouteTables
from .saved import write_all
from .speed import Ratio, samples_per_second
from .tasks_recipe import Line, TasksRecipe
from .theory import Shape, fastv_tflops

ROUTERS = "routers"  # the folder of those that are trained


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

    @property
    def mean(self) -> float | None:
        return sum(self.accuracy.values()) / len(self.accuracy) if self.accuracy else None


@dataclass(frozen=True)
class TasksComparison:
    """All rows; the first of each table is the original."""

    out: Path
    tasks: tuple[str, ...]
    rows: tuple[TaskRow, ...]

    def to_data(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def compare_tasks(
    wanted: TasksRecipe, out: Path | str, options: RunOptions = RunOptions(batch_size=32), progress: Progress = silent
) -> TasksComparison:
    """Train the routers, fill each task's comparison in `out`/TASK; write table.md, accuracy.png and results.json.

    Raises: InputError for wrong input; what was measured before stays in `out`, and the same command goes on from it.
    """
    out = Path(out)
    parts = {name: wanted.of(name, out / ROUTERS) for name in wanted.tasks}
    shape = shape_of(wanted, parts)
    out.mkdir(parents=True, exist_ok=True)
    try:
        train_routers(wanted, out / ROUTERS, options, progress)
        done = {name: _compared(part, out / name, options, progress) for name, part in parts.items()}
    except InputError:
        with contextlib.suppress(OSError):
            out.rmdir()  # unless it holds something
        raise
    first = next(iter(parts.values()))
    if isinstance(first, Grid):
        drops = {len(cell.drop): cell.drop for cell in _first(done).cells}
        speeds = {} if wanted.speed is None else samples_per_second(first, drops, wanted.speed, options, progress)
        rows = _grid_tables(wanted, done, shape, speeds)
    else:
        rows = _route_tables(wanted, first, done, shape)
    result = TasksComparison(out, tuple(wanted.tasks), tuple(rows))
    pictures = {"accuracy.png": lambda path: plot_tasks(result, path)}
    write_all(out, {"table.md": tasks_markdown(result)}, pictures, result.to_data())
    return result


def _compared(part: Grid | RouteTables, out: Path, options: RunOptions, progress: Progress) -> Any:
    if isinstance(part, Grid):
        return compare(part, out, options, progress)
    return compare_routes(part, out, options, progress)


def train_routers(wanted: TasksRecipe, out: Path, options: RunOptions, progress: Progress) -> None:
    """Train the routers that are not there yet. Raises: InputError for a folder that holds another one."""
    for name, router in wanted.routers.items():
        folder = out / name
        if not folder.exists():
            out.mkdir(exist_ok=True)
            route(wanted.model, router, folder, replace(options, batch_size=min(options.batch_size, 16)), progress)
        elif read_record(folder).to_data()["recipe"].get("router") != router.to_data():
            raise InputError(f"{folder / RECORD} tells of a router that was trained otherwise: remove {folder}.")


# --- rows -------------------------------------------------------------------------------------------------------------


def shape_of(wanted: TasksRecipe, parts: Mapping[str, Grid | RouteTables]) -> Shape:
    """Return what the papers' formula counts: the decoder's sizes, and the tokens of a few prompts of each task."""
    source = open_source(wanted.model)
    processor, prompts = load_processor(source.folder), []
    for part in parts.values():
        samples = compared_task(part.task, part.task_samples, part.seed).samples
        prompts += few_prompts(samples, processor, source.config)
    text = source.config.get_text_config()
    return Shape(
        layers=source.num_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None),
        tokens=sum(int(batch.inputs["attention_mask"].sum()) for batch in prompts) / len(prompts),
        visual=sum(int(batch.is_visual.sum()) for batch in prompts) / len(prompts),
    )


def _first(done: Mapping[str, Any]) -> Any:
    return next(iter(done.values()))


def _original(done: Mapping[str, Comparison | RouteComparison], shape: Shape) -> TaskRow:
    first = _first(done)
    return TaskRow(
        table="",
        method="original",
        layers=shape.layers,
        visual_tokens=1.0,
        tflops=fastv_tflops(shape, shape.layers),
        flops_share=None if isinstance(first, Comparison) else 1.0,
        parameters=first.parameters if isinstance(first, Comparison) else None,
        accuracy={name: one.original.accuracy for name, one in done.items()},
        kept=dict.fromkeys(done, 1.0),
    )


def _grid_tables(
    wanted: TasksRecipe, done: Mapping[str, Comparison], shape: Shape, speeds: Mapping[int, Ratio]
) -> list[TaskRow]:
    """Return a table for each number of dropped layers, and one of what can't be made.

    Args:
        speeds: by number of dropped layers; empty where they were not timed.
    """
    first, rows = _first(done), []
    original = replace(_original(done, shape), speed=(1.0, 1.0, 1.0) if speeds else None)
    for count in dict.fromkeys(first.counts):
        title = f"{100 * count / shape.layers:.0f} % of the layers gone"
        rows.append(replace(original, table=title))
        for cell in (cell for cell in first.cells if len(cell.drop) == count):
            key = (cell.localizer, cell.fold, count)
            same = {
                name: next(c for c in one.cells if (c.localizer, c.fold, len(c.drop)) == key)
                for name, one in done.items()
            }
            rows.append(
                TaskRow(
                    table=title,
                    method=f"{cell.localizer} + {cell.fold}",
                    layers=shape.layers - count,
                    visual_tokens=1.0,
                    tflops=fastv_tflops(shape, shape.layers - count),
                    parameters=cell.parameters,
                    accuracy={name: c.accuracy for name, c in same.items()},
                    kept={name: c.kept for name, c in same.items()},
                    speed=speeds.get(count),
                )
            )
    rows += [TaskRow("Not taken by this model", fold, reason=reason) for fold, reason in first.refused.items()]
    rows += [TaskRow(title, line.row, reason=line.reason) for title, lines in wanted.tables.items() for line in lines]
    return rows


def _route_tables(
    wanted: TasksRecipe, part: RouteTables, done: Mapping[str, RouteComparison], shape: Shape
) -> list[TaskRow]:
    """Return the tables that the recipe names, the original first in each."""
    drop_at = {}
    for row in part.rows:
        rule = row.parsed()
        drop_at[row.name] = rule.drops_at(router_settings(open_source(row.folder or part.model), rule))
    rows = []
    for title, lines in wanted.tables.items():
        rows.append(replace(_original(done, shape), table=title))
        rows += [_route_row(title, line, done, shape, drop_at.get(line.row, 0)) for line in lines]
    return rows


def _route_row(title: str, line: Line, done: Mapping[str, RouteComparison], shape: Shape, drop_at: int) -> TaskRow:
    """Return a line of a table out of the cells of all tasks."""
    method = line.name or line.row
    if line.reason is not None:
        return TaskRow(title, method, reason=line.reason)
    assert line.budget is not None
    cells = {name: one.cell(line.row, line.budget) for name, one in done.items()}
    there = {name: cell for name, cell in cells.items() if cell is not None}
    if len(there) < len(cells):
        return TaskRow(title, method, reason="this row can't keep to this budget")
    budget = next(iter(there.values())).budget
    layers, asked = budget["keep_layers"] or shape.layers, budget["keep_visual_tokens"]
    share = 1.0 if asked is None else asked if isinstance(asked, float) else min(1.0, asked / shape.visual)
    return TaskRow(
        table=title,
        method=method,
        layers=layers,
        visual_tokens=share,
        tflops=fastv_tflops(shape, layers, share, drop_at),
        flops_share=sum(cell.decoder_flops_share for cell in there.values()) / len(there),
        accuracy={name: cell.accuracy for name, cell in there.items()},
        kept={name: cell.kept for name, cell in there.items()},
    )


# --- what people read -------------------------------------------------------------------------------------------------


def header(done: TasksComparison) -> tuple[str, ...]:
    counted = any(row.flops_share is not None for row in done.rows)
    speed = any(row.speed is not None for row in done.rows)
    cost = ("decoder FLOPs %",) if counted else ("parameters",)
    timed = ("samples/s ÷ original's",) if speed else ()
    return ("method", "layers", "visual tokens %", "GFLOPs (formula)", *cost, *timed, "mean %", "kept %", *done.tasks)


def cells_of(done: TasksComparison, row: TaskRow) -> tuple[str, ...]:
    """Return a row as texts; a reason stands where the figures would."""
    if row.reason is not None:
        return (row.method, f"– {row.reason}", *[""] * (len(header(done)) - 2))
    counted = any(other.flops_share is not None for other in done.rows)
    cost = f"{100 * (row.flops_share or 0):.1f}" if counted else f"{row.parameters or 0:,}"
    timed = [f"{row.speed[0]:.2f} ({row.speed[1]:.2f}-{row.speed[2]:.2f})"] if row.speed else []
    kept = sum(row.kept.values()) / len(row.kept)
    formula = "–" if row.tflops is None else f"{1000 * row.tflops:.4g}"
    return (
        row.method,
        str(row.layers),
        f"{100 * (row.visual_tokens or 1):.1f}",
        formula,
        cost,
        *timed,
        f"{100 * (row.mean or 0):.1f}",
        f"{100 * kept:.1f}",
        *(f"{100 * row.accuracy[name]:.1f}" for name in done.tasks),
    )


def by_table(done: TasksComparison) -> dict[str, list[tuple[str, ...]]]:
    """Return the rows as texts, by the title of their table."""
    titles = dict.fromkeys(row.table for row in done.rows)
    return {title: [cells_of(done, row) for row in done.rows if row.table == title] for title in titles}


NOTE = (
    "GFLOPs by FastV's formula, which PAR counts by, for a mean prompt of these tasks; shares of FLOPs in percent are "
    "counted."
)


def tasks_text(done: TasksComparison) -> str:
    """Return the tables as text for the terminal."""
    tables = [f"{title}\n{report.table(header(done), rows)}" for title, rows in by_table(done).items()]
    return "\n\n".join([*tables, NOTE])


def tasks_markdown(done: TasksComparison) -> str:
    names = header(done)
    head = f"| {' | '.join(names)} |\n|---|" + "---:|" * (len(names) - 1)
    parts = []
    for title, rows in by_table(done).items():
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"## {title}\n\n{head}\n{lines}\n")
    return "\n".join(parts) + f"\n{NOTE}\n"


def plot_tasks(done: TasksComparison, path: Path) -> None:
    """Draw the mean over the tasks against the cost: counted FLOPs, or parameters; a colour and marker a method."""
    drawn, axes = figure(8.5, 4.6)
    shown = [row for row in done.rows if row.accuracy]
    counted = any(row.flops_share is not None for row in shown)
    for number, name in enumerate(dict.fromkeys(row.method for row in shown)):
        points = sorted(
            {
                (100 * (row.flops_share or 0) if counted else (row.parameters or 0) / 1e6, 100 * (row.mean or 0))
                for row in shown
                if row.method == name
            }
        )
        style = {"marker": "*", "color": "black", "markersize": 11} if name == "original" else {
            "marker": MARKERS[number % len(MARKERS)], "color": PALETTE[number % len(PALETTE)], "markersize": 5,
        }  # fmt: skip
        axes.plot(*zip(*points, strict=True), linewidth=1, label=name, **style)
    axes.set_xlabel("decoder FLOPs of the prompt (% of the original's)" if counted else "parameters (millions)")
    axes.set_ylabel("mean over the tasks (%)")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(drawn, path)
