"""The table and the plot of a comparison of routers."""

from __future__ import annotations

from pathlib import Path

from ..cards.plots import MARKERS, PALETTE, figure, save
from ..cards.tables import markdown_table, table
from .routes import RouteCell, RouteComparison


def table_rows(done: RouteComparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows: the score, in brackets the share of the unrouted model's, and decoder FLOPs."""
    header = [f"{done.metric} % (kept %) at decoder FLOPs %; p", *done.columns]
    rows = []
    for name in done.rows:
        cells = [done.cell(name, column) for column in range(len(done.columns))]
        rows.append([name, *("–" if cell is None else _shown(done, cell) for cell in cells)])
    return header, rows


def _shown(done: RouteComparison, cell: RouteCell) -> str:
    text = f"{100 * cell.accuracy:.1f} ({100 * cell.kept:.1f}) at {100 * cell.decoder_flops_share:.1f}"
    p_value = done.p_corrected.get((cell.row, cell.column))
    return text if p_value is None else f"{text}; {p_value:.2g}"


P_NOTE = (
    "p: of a cell against the best one of its column, on the same questions (McNemar, exact), by Holm for all cells"
)


def table_text(done: RouteComparison) -> str:
    low, high = done.original.interval
    text = table(*table_rows(done))
    text += (
        f"\n\nunrouted: {100 * done.original.accuracy:.1f} % ({100 * low:.1f}-{100 * high:.1f}) of {done.original.n}"
    )
    text += f"\n{P_NOTE}" + (f"\n{done.task_uses['sentence']}" if done.task_uses else "")
    for searched in dict.fromkeys((cell.row, cell.searched) for cell in done.cells if cell.searched):
        text += f"\n{searched[0]}: {searched[1]}"
    return text


def table_markdown(done: RouteComparison) -> str:
    lines = [markdown_table(*table_rows(done))]
    lines += ["", done.task_uses["sentence"]] if done.task_uses else []
    return "\n".join(lines) + "\n"


def plot_routes(done: RouteComparison, path: Path) -> None:
    """Draw the score against the decoder's FLOPs, a line a row."""
    drawn, axes = figure(8.5, 4.6)
    for number, name in enumerate(done.rows):
        cells = sorted((c for c in done.cells if c.row == name), key=lambda c: c.decoder_flops_share)
        axes.plot(
            [100 * c.decoder_flops_share for c in cells], [100 * c.accuracy for c in cells],
            marker=MARKERS[number % len(MARKERS)], color=PALETTE[number % len(PALETTE)],
            linestyle=("-", "--", ":")[number // len(PALETTE) % 3], markersize=5, linewidth=1, label=name,
        )  # fmt: skip
    axes.plot(100, 100 * done.original.accuracy, "*", color="black", markersize=11, label="unrouted", linestyle="")
    axes.set_xlabel("decoder FLOPs of the prompt (% of the unrouted model's)")
    axes.set_ylabel(f"{done.metric} (%)")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(drawn, path)
