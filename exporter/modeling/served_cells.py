"""The cells of a picture: neighbouring rows of which one row of the shorter prompt is made.

Beside torch and the standard library this file needs nothing: `served_router` imports it, and says what it is for.

Shapes: N rows of a picture, n cells.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def runs(number: int, stays: int, device: Any = None) -> Tensor:
    """Return the cell of each of a picture's rows, [N]: n runs in the order of the prompt, as equal as can be."""
    return torch.arange(number, device=device) * stays // number


def blocks(coordinates: Tensor, stays: int) -> Tensor:
    """Return the cell of each of a picture's rows, [N]: n blocks as square as can be, numbered line by line.

    Where tiles are more than `stays`, or the rows lie in no lines, they are runs.

    Args:
        coordinates: [N, 2] of `served_places.picture_coordinates`.
    """
    number, cells, first, slots = len(coordinates), [], 0, 0
    for lines, columns in grids_of(coordinates):
        first += lines * columns
        here = first * stays // number - slots  # tiles share the cells by their sizes
        if not here:
            return runs(number, stays, coordinates.device)
        cells.append(slots + _blocks_of_grid(lines, columns, here))
        slots += here
    return torch.cat(cells).to(coordinates.device)


def grids_of(coordinates: Tensor) -> list[tuple[int, int]]:
    """Return lines and columns of each tile; a tile whose lines are of different lengths is one column."""
    down, across = coordinates.double().T.tolist()
    tiles: list[list[int]] = []  # lengths of lines
    for i in range(len(down)):
        if not i or down[i] < down[i - 1] or (down[i] == down[i - 1] and across[i] <= across[i - 1]):
            tiles.append([0])
        elif down[i] > down[i - 1]:
            tiles[-1].append(0)
        tiles[-1][-1] += 1
    return [(len(lines), lines[0]) if len(set(lines)) == 1 else (sum(lines), 1) for lines in tiles]


@functools.lru_cache(maxsize=4096)
def _blocks_of_grid(lines: int, columns: int, stays: int) -> Tensor:
    """Return the cell of each row of a tile, [N]: bands of lines, cut across into runs; the bands that spread least."""
    most = min(lines, stays)
    least = min(most, max(1, math.isqrt(stays * lines // columns) // 2))  # fewer would go column by column
    tried = {bands: _banded(lines, columns, stays, bands) for bands in range(least, most + 1)}
    spreads = {
        bands: round(_spread(cells, columns, stays), 6)
        for bands, cells in tried.items()
        if len(torch.unique(cells)) == stays
    }
    if not spreads:
        return runs(lines * columns, stays)
    return tried[min(spreads, key=lambda bands: (spreads[bands], -bands))]


def _banded(lines: int, columns: int, stays: int, bands: int) -> Tensor:
    """Return the cell of each row where `bands` bands of lines share the cells by their heights, [N]."""
    line, column = torch.arange(lines)[:, None], torch.arange(columns)
    band = line * bands // lines
    top, bottom = -(-band * lines // bands), -(-(band + 1) * lines // bands)  # of the line's band
    before, upto = top * stays // lines, bottom * stays // lines
    at = column * (bottom - top) + line - top  # column by column through the band
    return (before + at * (upto - before) // ((bottom - top) * columns)).flatten()


def _spread(cells: Tensor, columns: int, stays: int) -> float:
    """Return the sum of squared distances of rows from the middles of their cells."""
    at = torch.arange(len(cells))
    places = torch.stack([at // columns, at % columns], 1).double()
    middles = torch.zeros(stays, 2, dtype=torch.float64).index_add(0, cells, places)
    middles /= torch.bincount(cells, minlength=stays)[:, None]
    return float((places - middles[cells]).square().sum())


def best_rows(logits: Tensor, cells: Tensor) -> Tensor:
    """Return the number of the highest row of each cell, [n]; of equals the earlier one.

    Args:
        cells: [N] from 0 to n - 1.
    """
    ranked = logits.argsort(descending=True, stable=True)
    ranked = ranked[cells[ranked].argsort(stable=True)]  # cell by cell, the highest first
    ordered = cells[ranked]
    return ranked[F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)]


def middle_rows(cells: Tensor, columns: int) -> Tensor:
    """Return the number of the row nearest to the middle of each cell, [n]; of equals the earlier one.

    Args:
        cells: [N] of a grid, line by line.
        columns: of the grid; where several of them follow each other, a cell lies in one.
    """
    number, counts = len(cells), torch.bincount(cells)
    at = torch.arange(number, device=cells.device)
    places = torch.stack([at // columns, at % columns], 1)  # whole numbers: engines have to find the same rows
    sums = torch.zeros(len(counts), 2, dtype=torch.long, device=cells.device).index_add(0, cells, places)
    apart = (counts[cells, None] * places - sums[cells]).square().sum(1)
    return best_rows(-apart, cells)


def means_of_cells(rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of each cell's rows, [N, D] -> [n, D].

    Args:
        cells: [N] from 0 to n - 1; weights: [N] that add up to 1 in each cell.
    """
    means = rows.new_zeros(int(cells.max()) + 1, rows.shape[1])
    return means.index_add(0, cells, weights[:, None] * rows)


def softmax_of_cells(logits: Tensor, cells: Tensor) -> Tensor:
    """Return the softmax over each cell, [N] -> [N]."""
    number = int(cells.max()) + 1
    highest = logits.new_full((number,), -torch.inf).scatter_reduce(0, cells, logits.detach(), "amax")
    shares = (logits - highest[cells]).exp()
    return shares / logits.new_zeros(number).scatter_add(0, cells, shares)[cells]
