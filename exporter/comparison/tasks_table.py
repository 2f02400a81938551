"""The tables and the picture of a comparison on several tasks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..cards import tables as report
from ..cards.figures import EXACT_MATCH
from ..cards.plots import MARKERS, PALETTE, figure, save
from .task_rows import TaskRow, TasksComparison


def header(done: TasksComparison) -> tuple[str, ...]:
    """Return the names of the columns; a task's metric stands in brackets where it is not exact match."""
    counted = any(row.flops_share is not None for row in done.rows)
    speed = any(row.speed is not None for row in done.rows)
    cost = ("decoder FLOPs %",) if counted else ("parameters",)
    timed = ("samples/s ÷ original's",) if speed else ()
    tasks = (name if done.metrics[name] == EXACT_MATCH else f"{name} ({done.metrics[name]})" for name in done.tasks)
    return ("method", "layers", "visual tokens %", "GFLOPs (formula)", *cost, *timed, "mean %", "kept %", "p", *tasks)


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
        percent(row.mean or 0, [statistics.fmean(values) for values in zip(*row.by_seed.values(), strict=True)]),
        f"{100 * kept:.1f}",
        "" if row.p_corrected is None else f"{row.p_corrected:.2g}",
        *(percent(row.accuracy[name], row.by_seed.get(name, ())) for name in done.tasks),
    )


def percent(value: float, by_seed: Sequence[float]) -> str:
    """Return '96.3', or '96.3 ± 0.4' with the standard deviation over the seeds where there are some."""
    return f"{100 * value:.1f}" + (f" ± {100 * statistics.stdev(by_seed):.1f}" if len(by_seed) > 1 else "")


def by_table(done: TasksComparison) -> dict[str, list[tuple[str, ...]]]:
    """Return the rows as texts, by the title of their table."""
    titles = dict.fromkeys(row.table for row in done.rows)
    return {title: [cells_of(done, row) for row in done.rows if row.table == title] for title in titles}


FLOPS_NOTE = (
    "GFLOPs by FastV's formula, which PAR counts by, for a mean prompt of these tasks; shares of FLOPs in percent are "
    "counted."
)
P_NOTE = "p: of a row against its table's best, on the questions of all tasks (McNemar, exact), by Holm for all rows"


def notes(done: TasksComparison) -> list[str]:
    """Return what a reader of the tables has to know."""
    exact = EXACT_MATCH in done.metrics.values()
    sentences = ["Tasks are scored by exact match, but where their column names another metric."] if exact else []
    sentences += [FLOPS_NOTE, f"{P_NOTE}; the largest over the seeds." if done.seeds else f"{P_NOTE}."]
    if done.seeds:
        numbers = ", ".join(map(str, done.seeds))
        sentences.append(f"±: standard deviation over the seeds {numbers}, by which calibration questions are drawn.")
    return sentences + [f"{name}: {uses['sentence']}" for name, uses in done.task_uses.items()]


def tasks_text(done: TasksComparison) -> str:
    """Return the tables as text for the terminal."""
    tables = [f"{title}\n{report.table(header(done), rows)}" for title, rows in by_table(done).items()]
    return "\n\n".join([*tables, "\n".join(notes(done))])


def tasks_markdown(done: TasksComparison) -> str:
    parts = [f"## {title}\n\n{report.markdown_table(header(done), rows)}\n" for title, rows in by_table(done).items()]
    return "\n".join([*parts, *(f"{note}\n" for note in notes(done))])


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
