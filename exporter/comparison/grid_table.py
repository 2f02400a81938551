"""The table and the plot of a comparison of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cards.plots import MARKERS, PALETTE, figure, save
from ..cards.tables import markdown_table, table
from ..evaluation.scoring import pareto_front
from .grid import Comparison
from .saved import write_all


def comparison_rows(done: Any) -> list[tuple[Any, ...]]:
    """Return a row of each cell, by number of dropped layers, the best first."""
    rows = []
    corrected = dict(zip(map(id, done.cells), done.p_corrected, strict=True))
    for cell in sorted(done.cells, key=lambda c: (len(c.drop), -c.accuracy, c.kl)):
        low, high = cell.interval
        rows.append(
            (
                f"{cell.localizer} + {cell.fold}",
                len(cell.drop),
                ",".join(map(str, cell.drop)),
                f"{cell.parameters:,}",
                f"{100 * cell.accuracy:.1f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{100 * cell.kept:.1f}",
                f"{cell.kl:.4f}",
                f"{100 * cell.agreement:.1f}",
                "" if cell is done.best[len(cell.drop)] else f"{corrected[id(cell)]:.2g}",
            )
        )
    return rows


def comparison_header(done: Any) -> tuple[str, ...]:
    return ("localizer + fold", "dropped", "layers", "parameters", f"{done.metric} %", "95 % CI", "kept %", "KL",
            "agreement %", "p")  # fmt: skip


def comparison_table(done: Any) -> str:
    low, high = done.original.interval
    text = table(comparison_header(done), comparison_rows(done))
    text += (
        f"\n\noriginal: {100 * done.original.accuracy:.1f} % ({100 * low:.1f}-{100 * high:.1f}) of {done.original.n} "
        f"questions, {done.parameters:,} parameters"
    )
    for count, cell in sorted(done.best.items()):
        text += f"\nbest without {count} layers: {cell.localizer} + {cell.fold}, {100 * cell.kept:.1f} % kept"
    text += (
        "\np: of a row against the best one of its budget, on the same questions (McNemar, exact), by Holm for all rows"
    )
    if done.task_uses:
        text += f"\n{done.task_uses['sentence']}"
    if done.naive_seconds:
        text += (
            f"\n{len(done.cells)} cells in {done.seconds:.0f} s; cell by cell from scratch about "
            f"{done.naive_seconds:.0f} s, {done.naive_seconds / done.seconds:.1f} times that"
        )
    return text


def comparison_markdown(done: Any) -> str:
    lines = [markdown_table(comparison_header(done), comparison_rows(done))]
    lines += ["", done.task_uses["sentence"]] if done.task_uses else []
    return "\n".join(lines) + "\n"


def plot_comparison(done: Any, path: Path) -> None:
    """Draw the score against parameters: a colour a localizer, a marker a fold, the Pareto front as a line."""
    drawn, axes = figure(8.5, 4.6)
    localizers = list(dict.fromkeys(cell.localizer for cell in done.cells))
    folds = list(dict.fromkeys(cell.fold for cell in done.cells))
    for cell in done.cells:
        axes.plot(
            cell.parameters / 1e6,
            100 * cell.accuracy,
            MARKERS[folds.index(cell.fold) % len(MARKERS)],
            color=PALETTE[localizers.index(cell.localizer) % len(PALETTE)],
            markersize=5,
            alpha=0.8,
        )
    axes.plot(done.parameters / 1e6, 100 * done.original.accuracy, "*", color="black", markersize=11)
    front = pareto_front([(done.parameters, done.original.accuracy), *((c.parameters, c.accuracy) for c in done.cells)])
    axes.plot([p / 1e6 for p, _ in front], [100 * a for _, a in front], color="black", linewidth=1, zorder=0)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel(f"{done.metric} (%)")
    shown = [("original", "*", "black"), *((n, "s", PALETTE[i % len(PALETTE)]) for i, n in enumerate(localizers))]
    shown += [(n, MARKERS[i % len(MARKERS)], "#888888") for i, n in enumerate(folds)]
    handles = [axes.plot([], [], marker, color=color, linestyle="")[0] for _, marker, color in shown]
    handles.append(axes.plot([], [], color="black", linewidth=1)[0])
    names = [*(name for name, *_ in shown), "Pareto front"]
    axes.legend(handles, names, frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(drawn, path)


def write_results(done: Comparison) -> None:
    pictures = {"accuracy.png": lambda path: plot_comparison(done, path)}
    write_all(done.out, {"table.md": comparison_markdown(done)}, pictures, done.to_data())
