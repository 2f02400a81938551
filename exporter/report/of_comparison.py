"""What a report tells of comparisons: of methods, of routers, of many models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .page import facts
from .parts import Bar, Bars, Part, Point, Report, Scatter, Table

NOTE = "p: of a row against the best one of its budget, on the same questions (McNemar, exact), by Holm for all rows."


def report_of_grid(done: Any, header: Sequence[str], rows: Sequence[Sequence[Any]], commands: Sequence[str]) -> Report:
    """Return the page of a comparison of localizers, folds and numbers of layers.

    Args:
        done: a `Comparison`.
        header, rows: of its table.
    """
    points = [Point("original", done.parameters / 1e6, 100 * done.original.accuracy, _percent(done.original.interval))]
    points += [
        Point(_name(cell), cell.parameters / 1e6, 100 * cell.accuracy, _percent(cell.interval)) for cell in done.cells
    ]
    parts: list[Part] = [
        Scatter("What is left and what it scores", "parameters (millions)", f"{done.metric} (%)", tuple(points)),
        Table("All cells", tuple(header), tuple(tuple(map(str, row)) for row in rows),
              NOTE),
        _types({_name(cell): cell.by_type for cell in done.best.values()}),
    ]  # fmt: skip
    return Report("Methods side by side", tuple(commands), parts=tuple(parts), facts=facts(), notes=uses_note(done))


def uses_note(done: Any) -> tuple[str, ...]:
    """Return what a comparison's task, kept for a last test, tells of its uses."""
    return (done.task_uses["sentence"],) if done.task_uses else ()


def report_of_seeds(
    done: Any, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], commands: Sequence[str]
) -> Report:
    """Return the page of a comparison over several seeds.

    Args:
        done: a `SeedsComparison`.
        header, rows, notes: of its table.
    """
    points = [Point("original", done.parameters / 1e6, 100 * done.original.accuracy, _percent(done.original.interval))]
    points += [
        Point(f"{row.localizer} + {row.fold}, {row.count} layers gone", row.parameters / 1e6,
              100 * sum(row.accuracy) / len(row.accuracy), _percent((min(row.accuracy), max(row.accuracy))))
        for row in done.rows
    ]  # fmt: skip
    parts: list[Part] = [
        Scatter("What is left and what it scores", "parameters (millions)", f"{done.metric} (%)", tuple(points),
                note="A line spans the lowest and the highest seed; that of the original is its 95 % interval."),
        Table("All rows", tuple(header), tuple(map(tuple, rows))),
    ]  # fmt: skip
    return Report(
        "Methods side by side, over seeds", tuple(commands), parts=tuple(parts), facts=facts(), notes=tuple(notes)
    )


def _name(cell: Any) -> str:
    return f"{cell.localizer} + {cell.fold}, {len(cell.drop)} layers gone"


def _percent(interval: Sequence[float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def _types(by_type: dict[str, dict[str, float]]) -> Table:
    types = sorted({name for shares in by_type.values() for name in shares})
    rows = tuple(
        (name, *(f"{100 * shares[name]:.1f}" if name in shares else "–" for shares in by_type.values()))
        for name in types
    )
    return Table("By type of question, in percent", ("type", *by_type), rows)


def report_of_routes(
    done: Any, header: Sequence[str], rows: Sequence[Sequence[Any]], commands: Sequence[str]
) -> Report:
    """Return the page of a comparison of routers and rules.

    Args:
        done: a `RouteComparison`.
        header, rows: of its table.
    """
    points = [Point("unrouted", 100.0, 100 * done.original.accuracy, _percent(done.original.interval))]
    points += [
        Point(f"{cell.row}, {done.columns[cell.column]}", 100 * cell.decoder_flops_share, 100 * cell.accuracy,
              _percent(cell.interval)) for cell in done.cells
    ]  # fmt: skip
    cost = "decoder FLOPs of the prompt (% of the unrouted model's)"
    parts: list[Part] = [
        Scatter("What a prompt costs and what it scores", cost, f"{done.metric} (%)", tuple(points)),
        Table("All rows", tuple(header), tuple(tuple(map(str, row)) for row in rows)),
        _types({f"{cell.row}, {done.columns[cell.column]}": cell.by_type for cell in done.cells[:8]}),
    ]
    return Report("Routers side by side", tuple(commands), parts=tuple(parts), facts=facts(), notes=uses_note(done))


def report_of_tasks(
    done: Any, header: Sequence[str], by_table: Mapping[str, Any], notes: Sequence[str], commands: Sequence[str]
) -> Report:
    """Return the page of a comparison on several tasks.

    Args:
        done: a `TasksComparison`.
        header, by_table, notes: of its tables, their rows by their titles.
    """
    shown = [row for row in done.rows if row.accuracy]
    counted = any(row.flops_share is not None for row in shown)
    cost = "decoder FLOPs of the prompt (% of the original's)" if counted else "parameters (millions)"
    points = {
        (row.method, 100 * (row.flops_share or 0) if counted else (row.parameters or 0) / 1e6, 100 * row.mean)
        for row in shown
    }
    parts: list[Part] = [
        Scatter("What it costs and what it scores", cost, "mean over the tasks (%)",
                tuple(Point(name, x, y, None) for name, x, y in sorted(points))),
        *(Table(title, tuple(header), tuple(rows)) for title, rows in by_table.items()),
    ]  # fmt: skip
    return Report("Methods on several tasks", tuple(commands), parts=tuple(parts), facts=facts(), notes=tuple(notes))


def report_of_zoo(tables: dict[str, Any], header: Sequence[str], cells: Any, commands: Sequence[str]) -> Report:
    """Return the page of a comparison over many models.

    Args:
        tables: rows by the name of their table.
        cells: makes texts of a row.
    """
    parts: list[Part] = []
    for name, rows in tables.items():
        bars = tuple(
            Bar(f"{row.localizer} + {row.fold}, {100 * row.drop_share:.0f} %", 100 * row.worst, None,
                f"{100 * row.worst:.1f} %") for row in rows
        )  # fmt: skip
        parts += [Bars(f"Worst of the models: kept, {name}", bars), Table(name, tuple(header), tuple(map(cells, rows)))]
    return Report("Methods over many models", tuple(commands), tuple(parts), facts())
