"""Where a picture's tokens lie in it, by its size alone, and the positions of a prompt from which some have left.

Beside torch and the standard library this file needs `served_cells` alone: `served_router` imports it, and says what it
is for.

Shapes: N rows of a picture, S tokens of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .served_cells import blocks, middle_rows


def picture_coordinates(config: Any, number: int, grid: Any = None, size: Any = None) -> Tensor:
    """Return where a picture's rows lie in it, [N, 2]: row and column of each row's middle, from 0 to 1.

    Args:
        config: of the model.
        number: of the picture's rows, N.
        grid: its entry of `image_grid_thw`, for types that have one: frames, rows and columns of patches.
        size: its entry of `image_sizes`, for types that cut pictures into tiles by it: height and width in pixels.

    Where neither tells, rows are taken as square tiles, each over the whole picture; else as one line.
    """
    vision = entry_of(config, "vision_config") or config
    parts: list[Tensor] = []
    if grid is not None:
        frames, rows, columns = (int(n) for n in grid)
        merge = int(entry_of(vision, "spatial_merge_size") or 1)
        parts = [_middles(rows // merge, columns // merge)] * frames
    elif size is not None and (pinpoints := entry_of(config, "image_grid_pinpoints")):
        parts = _any_resolution(
            (int(size[0]), int(size[1])),
            pinpoints,
            side=int(entry_of(vision, "image_size")),
            patch=int(_patch_of(vision)),
        )
    if sum(map(len, parts)) != number:
        side = _tile_side(config, vision, number)
        parts = [_middles(side, side)] * (number // side**2) if side else [_middles(number, 1)]
    return torch.cat(parts)


def _patch_of(vision: Any) -> int:
    """Return the side of a patch in pixels."""
    patch = entry_of(vision, "patch_size")
    return int(patch[0] if isinstance(patch, (list, tuple)) else patch)


def _tile_side(config: Any, vision: Any, number: int) -> int:
    """Return the side of the square tiles that the rows make up, in rows; 0 if none does."""
    image, patch = entry_of(vision, "image_size"), entry_of(vision, "patch_size")
    image = image[0] if isinstance(image, (list, tuple)) else image
    whole = (image // _patch_of(vision)) ** 2 if isinstance(image, int) and patch else 0
    for tile in (entry_of(config, "image_seq_length") or 0, whole, number):
        if isinstance(tile, int) and tile > 0 and number % tile == 0 and math.isqrt(tile) ** 2 == tile:
            return math.isqrt(tile)
    return 0


def _middles(rows: int, columns: int) -> Tensor:
    """Return the middles of a grid's cells, row by row: [rows * columns, 2]."""
    down, across = ((torch.arange(n, dtype=torch.float32) + 0.5) / max(1, n) for n in (rows, columns))
    return torch.cartesian_prod(down, across).reshape(-1, 2)


def _any_resolution(size: tuple[int, int], pinpoints: Any, side: int, patch: int) -> list[Tensor]:
    """Return the parts of LLaVA-NeXT's picture: one coarse tile, then finer ones without their padding.

    Each line of the finer tiles ends with a row that only says so: it lies at the right edge.
    """
    height, width = size
    rows_of_tile = side // patch
    down, across = (edge // side * rows_of_tile for edge in _resolution_for(size, pinpoints))
    if width / height > across / down:  # wide: padded above and below
        padding = (down - int(round(height * (across / width), 7))) // 2
        down -= 2 * padding
    else:
        padding = (across - int(round(width * (down / height), 7))) // 2
        across -= 2 * padding
    finer = torch.stack(
        [
            ((torch.arange(down) + 0.5) / max(1, down))[:, None].expand(down, across + 1),
            F.pad((torch.arange(across) + 0.5) / max(1, across), (0, 1), value=1.0).expand(down, across + 1),
        ],
        -1,
    )
    return [_middles(rows_of_tile, rows_of_tile), finer.reshape(-1, 2)]


def _resolution_for(size: tuple[int, int], pinpoints: Any) -> tuple[int, int]:
    """Return the resolution that shows most of a picture, and of those that show as much the one that wastes least."""
    height, width = size
    best, most, least = (0, 0), -1, math.inf
    for rows, columns in pinpoints:
        scale = min(columns / width, rows / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (int(rows), int(columns)), shown, wasted
    return best


def served_positions(visible: Tensor, axes: int | None = None) -> Tensor:
    """Return the positions of a shorter prompt: 0 to n - 1, padding not counted.

    Args:
        visible: [..., S] nonzero at tokens, zero at padding; all ones for one prompt without padding.
        axes: how many axes of positions the model has; None for one without a dimension of its own.

    Returns:
        [..., S], or [axes, ..., S]. What a model adds to later positions (M-RoPE's delta) is 0.
    """
    positions = (visible.long().cumsum(-1) - 1).clamp(min=0)
    return positions if axes is None else positions.expand(axes, *positions.shape)


def picture_places(config: Any, grid: Any, stays: int) -> tuple[Tensor, int]:
    """Return line and column of the rows that stay of a picture, [n, 2], and how many positions the picture takes.

    A row stands in the middle of its cell; the whole picture takes as many positions as its longer side has rows,
    whatever stays of it, so that text behind it stands where it did. Of a model with positions in three axes.

    Args:
        config: of the model.
        grid: the picture's entry of `image_grid_thw`: frames, rows and columns of patches.
        stays: n.
    """
    merge = int(entry_of(entry_of(config, "vision_config") or config, "spatial_merge_size") or 1)
    frames, lines, columns = (int(n) // m for n, m in zip(grid, (1, merge, merge), strict=True))
    number = frames * lines * columns
    coordinates = picture_coordinates(config, number, grid=grid)
    rows = torch.arange(number) if stays == number else middle_rows(blocks(coordinates, stays), columns)
    return torch.stack([rows // columns % lines, rows % columns], 1), max(lines, columns)


def positions_in_axes(length: int, pictures: Iterable[tuple[int, tuple[Tensor, int]]]) -> Tensor:
    """Return the positions of one prompt with pictures in it, in three axes, [3, S]: as the stock models number them.

    Text counts on in all three; a picture's rows have the position at which it begins, plus their line and column in
    the second and third; text behind it goes on behind its longer side (M-RoPE: Qwen2-VL, arXiv 2409.12191, section
    2.1).

    Args:
        length: S, without padding.
        pictures: at which token each begins, in their order, and what `picture_places` says of it.
    """
    positions, at, position = torch.empty(3, length, dtype=torch.long), 0, 0
    for start, (places, side) in pictures:
        positions[:, at:start] = torch.arange(position, position + start - at)
        position += start - at
        at = start + len(places)
        positions[0, start:at] = position
        positions[1:, start:at] = position + places.T.to(positions.device)
        position += side
    positions[:, at:] = torch.arange(position, position + length - at)
    return positions


def entry_of(config: Any, name: str) -> Any:
    """Return an entry of a configuration, or of the JSON of one; None without it."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
