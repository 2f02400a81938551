"""Tables of text, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..localize.scores import LayerScores


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return columns in line: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0].rstrip(), "  ".join("-" * w for w in widths), *(line.rstrip() for line in lines[1:])])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Return a table in Markdown, without a line break at its end: the first `left` columns to the left."""
    columns = "|" + "---|" * left + "---:|" * (len(header) - left)
    lines = (f"| {' | '.join(map(str, row))} |" for row in (header, *rows))
    return "\n".join([next(lines), columns, *lines])


def scores_table(scores: LayerScores, parameters: Sequence[int], protect: Sequence[int] = ()) -> str:
    fate = dict.fromkeys(scores.drop, "drop") | dict.fromkeys(protect, "protected")
    rows = [(i, f"{value:.4f}", f"{parameters[i]:,}", fate.get(i, "")) for i, value in enumerate(scores.values)]
    return table(("layer", f"redundancy ({scores.method})", "parameters", ""), rows)
