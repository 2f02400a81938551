"""Patch coordinates of visual tokens: which image, row and column each one shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .prepare import Array, best_grid, images_of, shrunk, unpadded


@dataclass(frozen=True)
class ImageShape:
    """The layout of consecutive visual tokens in an image: tiles of rows and columns one after the other."""

    height: int
    width: int
    top: float = 0.0  # where it begins in its image, and how much of it it covers, from 0 to 1
    share: float = 1.0
    first_of_image: bool = True
    finer: tuple[int, int] | None = None  # a grid over the same image that follows, its line ends not counted

    @property
    def length(self) -> int:
        rows, columns = self.finer or (0, 0)
        return self.height * self.width + rows * (columns + 1)

    def coordinates(self, length: int) -> Array:
        """Return the middle of each token, [length, 2]. What comes after whole tiles is not known to be a grid."""
        rows = (np.arange(self.height) + 0.5) / self.height * self.share + self.top
        columns = (np.arange(self.width) + 0.5) / self.width
        grid = product(rows, columns)
        if self.finer is not None:
            rows = (np.arange(self.finer[0]) + 0.5) / self.finer[0]
            columns = np.append((np.arange(self.finer[1]) + 0.5) / max(1, self.finer[1]), 1.0)
            return np.concatenate([grid, product(rows, columns)])
        tiles = length // len(grid)
        spare = length - tiles * len(grid)
        rest = (np.arange(spare) + 0.5) / max(1, spare)
        return np.concatenate([np.tile(grid, (tiles, 1)), np.stack([rest, np.full(spare, 0.5)], 1)])


def product(rows: Array, columns: Array) -> Array:
    """Return all pairs, line by line: [R], [C] -> [R * C, 2]"""
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def patch_coordinates(manifest: Mapping[str, Any], masks: list[Array], inputs: Mapping[str, Any]) -> list[Array]:
    """Return each sequence's image number, row and column of visual tokens, [S, 3]; zero at text. As at training."""
    spans = [(sequence, *span) for sequence, visual in enumerate(masks) for span in spans_of(visual)]
    shapes = run_shapes(manifest, [end - start for _, start, end in spans], inputs)
    out = [np.zeros((len(sequence), 3)) for sequence in masks]
    number, previous = -1, None
    for (sequence, start, end), shape in zip(spans, shapes, strict=True):
        if shape.first_of_image:
            number = 0 if sequence != previous else number + 1
            previous = sequence
        out[sequence][start:end, 0] = number
        out[sequence][start:end, 1:] = shape.coordinates(end - start)
    return out


def spans_of(visual: Array) -> list[tuple[int, int]]:
    """Return the start and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], visual.astype(np.int8), [0]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def run_shapes(manifest: Mapping[str, Any], lengths: list[int], inputs: Mapping[str, Any]) -> list[ImageShape]:
    """Return the shape of each run, as the inputs tell it, or guessed from its length where they do not."""
    vision, known = manifest["vision"], []
    if vision["kind"] == "patches" and inputs.get("image_grid_thw") is not None:
        grids = np.asarray(inputs["image_grid_thw"]).tolist()
        known = [ImageShape(height // vision["merge"], width // vision["merge"]) for _, height, width in grids]
    elif vision["kind"] == "sized" and inputs.get("image_sizes") is not None:
        for height, width in np.asarray(inputs["image_sizes"]).tolist():  # a run is one row, then comes [IMG_BREAK]
            count = int(height) // vision["side"]
            known += [
                ImageShape(
                    height=1,
                    width=int(width) // vision["side"],
                    top=row / count,
                    share=1 / count,
                    first_of_image=row == 0,
                )
                for row in range(count)
            ]
    elif vision["kind"] == "anyres" and inputs.get("image_sizes") is not None:
        known = [any_resolution(vision, *image) for image in images_of(inputs)]
    if [shape.length for shape in known] == lengths:
        return known
    return [guessed(manifest["router"]["tile_lengths"], length) for length in lengths]


def any_resolution(vision: Mapping[str, Any], size: list[int], in_tiles: bool) -> ImageShape:
    """Return the whole image in one tile, then a finer grid of it whose lines each end with a token of their own."""
    side = vision["grid"]
    if not in_tiles:
        return ImageShape(side, side, finer=(1, 0))
    rows, columns = best_grid(size, vision)
    index, _ = shrunk(unpadded(np.zeros((rows * side, columns * side)), size), side, vision["max_tiles"])
    return ImageShape(side, side, finer=(index.shape[0], index.shape[1]))


def guessed(tile_lengths: list[int], length: int) -> ImageShape:
    """Return square tiles of a size that the configuration speaks of, or one square; else one token a row."""
    for tile in (*tile_lengths, length):
        side = math.isqrt(tile)
        if 1 < tile <= length and side * side == tile:
            return ImageShape(side, side)
    return ImageShape(length, 1)
