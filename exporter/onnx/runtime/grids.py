"""What a vision tower of patches is told of a picture: numbers that depend on its rows and columns of patches alone.

Each function gives what the one of its name in `transformers.vision_utils` gives for one picture, in numpy. A folder's
manifest names those that its vision graph takes, with their settings.

Shapes: P patches, in squares of `merge` a side that become one feature; N taps of a resampled table; W windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = Any
Settings = Mapping[str, Any]


def patch_places(rows: int, columns: int, merge: int) -> Array:
    """Return the row and column of each patch, patches of a square together: [P, 2]."""
    places = np.moveaxis(np.indices((rows, columns)), 0, -1)  # [rows, columns, 2]
    squares = places.reshape(rows // merge, merge, columns // merge, merge, 2)
    return np.ascontiguousarray(squares.swapaxes(1, 2)).reshape(-1, 2)


def position_ids(settings: Settings, rows: int, columns: int) -> dict[str, Array]:
    """Return rows and columns for rotary embeddings, behind the time (0) where that is wanted: [P, 2 or 3]."""
    places = patch_places(rows, columns, settings["merge"])
    if settings["with_time"]:
        places = np.concatenate([np.zeros_like(places[:, :1]), places], 1)
    return {"position_ids": places.astype(np.int64)}


def resampling(settings: Settings, rows: int, columns: int) -> dict[str, Array]:
    """Return which entries of a square table make each patch's position embedding, and their weights: [P, N] each."""
    places, side = patch_places(rows, columns, settings["merge"]), settings["side"]
    row_taps, row_weights = _taps(places[:, 0], rows, settings)
    column_taps, column_weights = _taps(places[:, 1], columns, settings)
    indices = (row_taps[:, :, None] * side + column_taps[:, None]).reshape(len(places), -1)
    weights = (row_weights[:, :, None] * column_weights[:, None]).reshape(len(places), -1)
    return {"interp_indices": indices.astype(np.int64), "interp_weights": weights.astype(np.float32)}


def _taps(index: Array, size: int, settings: Settings) -> tuple[Array, Array]:
    """Return for positions [P] on an axis of `size` the entries of the table's axis that count, and by how much."""
    side, index = settings["side"], index.astype(np.float32)
    if settings["align_corners"]:
        source = index * np.float32(side - 1) / np.float32(max(size - 1, 1))
    else:
        source = (index + np.float32(0.5)) * np.float32(side) / np.float32(size) - np.float32(0.5)
    floor = np.floor(source)
    offsets = np.arange(2) if settings["mode"] == "bilinear" else np.arange(-1, 3)
    raw = floor.astype(np.int64)[:, None] + offsets
    distance = np.abs((source - floor)[:, None] - offsets.astype(np.float32))
    weights = np.clip(1 - distance, 0, None) if settings["mode"] == "bilinear" else _keys(distance)
    if settings["padding"] == "zeros":
        weights = weights * ((raw >= 0) & (raw < side))
    return raw.clip(0, side - 1), weights.astype(np.float32)


def _keys(distance: Array) -> Array:
    """Return the weights of Keys' cubic kernel with a = -0.75, which torch's bicubic resampling has."""
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


def windows(settings: Settings, rows: int, columns: int) -> dict[str, Array]:
    """Return merged patches in the order of their windows [P / merge^2], and where windows end in patches [W + 1]."""
    merge = settings["merge"]
    width = settings["window"] // merge // settings["patch"]
    row, column = np.indices((rows // merge, columns // merge)).reshape(2, -1)
    number = row // width * (columns // merge) + column // width
    order = np.argsort(number, kind="stable")
    counts = np.unique(number, return_counts=True)[1] * merge**2
    ends = np.concatenate([[0], counts.cumsum()])
    return {"window_index": order.astype(np.int64), "cu_window_seqlens": ends.astype(np.int32)}


FUNCTIONS = {"position_ids": position_ids, "resampling": resampling, "windows": windows}


def patch_inputs(functions: Mapping[str, Settings], rows: int, columns: int) -> dict[str, Array]:
    """Return the inputs of a vision graph beside pixels, for a picture of so many rows and columns of patches."""
    return {name: array for function, settings in functions.items()
            for name, array in FUNCTIONS[function](settings, rows, columns).items()}  # fmt: skip
