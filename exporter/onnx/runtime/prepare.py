"""From a processor's output to the inputs of the graphs: all integers, in numpy.

Shapes: B sequences, S tokens, F visual features, P patches of an image, T tiles, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .grids import patch_inputs

try:  # this package's own, where it is there; the runner also works without the rest of the package
    from ...errors import InputError as InputError
except ImportError:

    class InputError(ValueError):  # type: ignore[no-redef]
        """Wrong input. The message says what, the numbers and the fix."""


Array = Any  # numpy's generic array types say nothing here
Feed = dict[str, Array]
GRIDS = {"image_grid_thw", "grid_thw", "grid_thws", "image_merge_sizes"}
PIXELS = {"pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images"} | GRIDS
KNOWN = PIXELS | {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


@dataclass(frozen=True)
class Prompt:
    """The inputs of the graphs for one batch of questions. Sequences are padded on the side that the cache wants."""

    input_ids: Array  # [B, S]
    real: Array  # [B, S] False: padding
    positions: Array  # [B, S], or [3, B, S]
    next_position: Array  # [B] of the first new token
    block_ids: Array  # [B, S] tokens of one number see each other both ways; -1: only what comes before
    images: list[Feed]  # one run of the vision graph each
    coordinates: Array = None  # [B, S, 3] image number, row and column of visual tokens: what a router reads

    @property
    def lengths(self) -> Array:
        return self.real.sum(1)


def prepare(manifest: Mapping[str, Any], inputs: Mapping[str, Any]) -> Prompt:
    """Check what a processor gave and lay it out for the graphs."""
    arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    if unknown := sorted(set(arrays) - KNOWN):
        raise InputError(
            f"input '{unknown[0]}' has no place in this model's graphs: questions with images are what they take "
            f"({', '.join(sorted(KNOWN))})."
        )
    ids = arrays["input_ids"].astype(np.int64)
    real = arrays.get("attention_mask", np.ones_like(ids)).astype(bool)
    if ids.ndim != 2 or real.shape != ids.shape or not real.any(1).all():
        shapes = f"input_ids {ids.shape} and attention_mask {real.shape}"
        raise InputError(f"{shapes} must be [sequences, tokens], none empty.")
    vision = manifest["vision"]
    images = IMAGES[vision["kind"]](vision, arrays) if "pixel_values" in arrays else []
    sequences = [sequence[keep] for sequence, keep in zip(ids, real, strict=True)]
    positions = sequence_positions(manifest, sequences, arrays.get(vision.get("grid", "image_grid_thw")))
    blocks = [sequence_blocks(manifest["blocks"], sequence == manifest["image_token_id"]) for sequence in sequences]
    left = manifest["cache"] == "growing"
    return Prompt(
        input_ids=padded(sequences, left, manifest["pad_token_id"]),
        real=padded([np.ones(len(sequence), bool) for sequence in sequences], left, False),
        positions=np.moveaxis(padded([p.T for p in positions], left, 0), -1, 0) if manifest["mrope"] else
        padded(positions, left, 0),
        next_position=np.array([position.max() + 1 for position in positions]),
        block_ids=padded(blocks, left, -1),
        images=images,
    )  # fmt: skip


def padded(sequences: Sequence[Array], left: bool, fill: Any) -> Array:
    """Return sequences of different lengths as one array [B, S, ...]."""
    longest = max(len(sequence) for sequence in sequences)
    out = np.full((len(sequences), longest, *sequences[0].shape[1:]), fill, sequences[0].dtype)
    for target, sequence in zip(out, sequences, strict=True):
        if left:
            target[longest - len(sequence) :] = sequence
        else:
            target[: len(sequence)] = sequence
    return out


# --- where tokens are -------------------------------------------------------------------------------------------------


def sequence_positions(manifest: Mapping[str, Any], sequences: Sequence[Array], grids: Array | None) -> list[Array]:
    """Return for each sequence the position of each token: [S], or [3, S] of time, row and column."""
    if not manifest["mrope"]:
        return [np.arange(len(sequence)) + manifest["first_position"] for sequence in sequences]
    merge = manifest["vision"]["merge"]
    rest = list([] if grids is None else grids.tolist())
    return [_three_positions(sequence == manifest["image_token_id"], rest, merge) for sequence in sequences]


def _three_positions(visual: Array, grids: list[list[int]], merge: int) -> Array:
    """Return positions: text counts on in all three; an image spans its rows and columns, text goes on after both."""
    parts, start, index = [], 0, 0
    while index < len(visual):
        if not visual[index]:
            end = index + int(np.argmax(visual[index:])) if visual[index:].any() else len(visual)
            parts.append(np.tile(np.arange(end - index) + start, (3, 1)))
            start += end - index
        else:
            if not grids:
                raise InputError("there are more images in the prompt than in image_grid_thw.")
            time, height, width = grids.pop(0)
            shape = (time, height // merge, width // merge)
            end = index + math.prod(shape)
            parts.append(np.indices(shape).reshape(3, -1) + start)
            start += max(shape[1:])
        index = end
    return np.concatenate(parts, 1).astype(np.int64)


def sequence_blocks(blocks: str | None, visual: Array) -> Array:
    """Return the block that each token is in: all of them in one, each run of visual tokens in one, or none."""
    if blocks == "prompt":
        return np.zeros(len(visual), np.int64)
    if blocks == "images":
        begins = visual & ~np.concatenate([[False], visual[:-1]])
        return np.where(visual, np.cumsum(begins) - 1, -1)
    return np.full(len(visual), -1, np.int64)


# --- images, one function a kind --------------------------------------------------------------------------------------


def tiles(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    pixels = arrays["pixel_values"]
    return [{"pixel_values": pixels.reshape(-1, *pixels.shape[-3:])}]


def real_tiles(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    """Leave out the tiles that fill up a batch, which are all zero."""
    pixels = arrays["pixel_values"].reshape(-1, *arrays["pixel_values"].shape[-3:])
    used = pixels.any((1, 2, 3))
    mask = arrays.get("pixel_attention_mask")
    if mask is not None and not mask.reshape(-1, *mask.shape[-2:])[used].all():
        raise InputError(
            "an image comes padded within its tile, which this graph has no mask for: leave do_image_splitting on, or "
            "give one image at a time."
        )
    return [{"pixel_values": pixels[used]}]


def sized(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    """Return every image alone, without what pads it to the size of the largest."""
    side = vision["side"]
    feeds = []
    for image, size in zip(arrays["pixel_values"], arrays["image_sizes"].tolist(), strict=True):
        height, width = (length // side * side for length in size)
        feeds.append({"pixel_values": np.ascontiguousarray(image[None, :, :height, :width])})
    return feeds


def patches(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    """Return every image alone, with the row, column and window of each patch, in the processor's order."""
    feeds, start, merge = [], 0, vision["merge"]
    for time, height, width in arrays["image_grid_thw"].tolist():
        if time != 1:
            raise InputError(f"image_grid_thw says {time} frames: videos are not exported, images have 1.")
        row, column = np.indices((height, width))  # [H, W] each
        window = vision["window"]
        number = row // (window * merge) * width + column // (window * merge) if window else np.zeros_like(row)
        of_patch = np.stack([row, column, number], -1)  # [H, W, 3]
        blocks = of_patch.reshape(height // merge, merge, width // merge, merge, 3)
        ordered = np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(-1, 3)  # merged patches stand together
        end = start + height * width
        feeds.append(
            {
                "pixel_values": arrays["pixel_values"][start:end],
                "patch_positions": np.ascontiguousarray(ordered[:, :2]),
                "patch_window": np.ascontiguousarray(ordered[:, 2]),
            }
        )
        start = end
    return feeds


def anyres(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    """Return real tiles, and for each feature of the prompt the four tile features that make it, and their weights."""
    side, pixels = vision["grid"], arrays["pixel_values"]
    kept, indices, weights = [], [], []
    first = 0
    for image, (size, in_tiles) in zip(pixels, images_of(arrays), strict=True):
        rows, columns = best_grid(size, vision) if in_tiles else (0, 0)
        kept.append(image[: 1 + rows * columns])
        for index, weight in _packed(vision, size, rows=rows, columns=columns, first=first):
            indices.append(index)
            weights.append(weight)
        first += (1 + rows * columns) * side * side
    index, weight = np.concatenate(indices), np.concatenate(weights)
    index[index < 0] = first  # the end of a line lies behind all tiles
    return [
        {
            "pixel_values": np.concatenate(kept),
            "feature_index": index.astype(np.int64),
            "feature_weight": weight.astype(np.float32),
        }
    ]


def square(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    """Return every picture once: as the folder's processor makes it, or with its one tile, as the checkpoint's does."""
    pixels = arrays["pixel_values"]
    if pixels.ndim == 5:
        if pixels.shape[1] != 2 or not np.array_equal(pixels[:, 0], pixels[:, 1]):
            side = vision["tile"]
            raise InputError(
                f"a picture comes in tiles (pixel_values {pixels.shape}), and these graphs see it as one square: "
                f"prepare it with the folder's own processor, or resize it to {side} x {side} before."
            )
        pixels = pixels[:, 0]
    return [{"pixel_values": pixels}]


def images_of(arrays: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
    """Return the height and width of each image, and whether it was cut into tiles: several of one question are not."""
    sizes, counts = np.asarray(arrays["image_sizes"]).tolist(), arrays.get("batch_num_images")
    if counts is None:
        return [(size, True) for size in sizes]
    cut = [n == 1 for n in np.asarray(counts).tolist() for _ in range(n)]
    return list(zip(sizes, cut, strict=True))


Weighted = tuple[Array, Array]  # [F, 4] features, -1 the end of a line, and [F, 4] weights


def _packed(vision: Mapping[str, Any], size: list[int], rows: int, columns: int, first: int) -> list[Weighted]:
    """Return the small image, then the large one line by line; its tiles begin after the small one's."""
    side = vision["grid"]
    parts = [plain(first + np.arange(side * side))]
    if not rows:
        return [*parts, plain(np.array([-1]))]
    tile = first + side * side + np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
    whole = unpadded(tile.swapaxes(1, 2).reshape(rows * side, columns * side), size)
    index, weight = shrunk(whole, side, vision["max_tiles"])  # [rows, columns, 4]
    end_index, end_weight = plain(np.full(len(index), -1))
    index = np.concatenate([index, end_index[:, None]], 1)
    weight = np.concatenate([weight, end_weight[:, None]], 1)
    return [*parts, (index.reshape(-1, 4), weight.reshape(-1, 4))]


def plain(features: Array) -> Weighted:
    """Return features as they are: [...] -> [..., 4]"""
    weight = np.zeros((*features.shape, 4))
    weight[..., 0] = 1
    return np.repeat(features[..., None], 4, -1), weight


def best_grid(size: Sequence[int], vision: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and columns of tiles that an image of this height and width was cut into."""
    height, width = size
    best, best_key = (0, 0), (-1, 0)
    for rows, columns in vision["pinpoints"]:
        scale = min(columns / width, rows / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if (key := (used, used - rows * columns)) > best_key:
            best, best_key = (rows // vision["tile"], columns // vision["tile"]), key
    return best


def unpadded(grid: Array, size: Sequence[int]) -> Array:
    """Return what of a grid of features shows the image of this height and width, and not the bars beside it."""
    (height, width), (rows, columns) = size, grid.shape
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[bar : rows - bar]
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, bar : columns - bar]


def shrunk(grid: Array, side: int, max_tiles: int | None) -> Weighted:
    """Sample a grid of more features than `max_tiles` tiles have bilinearly down to about that many."""
    rows, columns = grid.shape
    ratio = math.sqrt(rows * columns / (max_tiles * side**2)) if max_tiles else 0
    if ratio <= 1.1:
        return plain(grid)
    (top, bottom, down), (left, right, along) = (
        _between(length, int(length // ratio)) for length in (rows, columns)
    )  # fmt: skip
    corners = [grid[a][:, b] for a in (top, bottom) for b in (left, right)]
    shares = [a[:, None] * b[None] for a in (1 - down, down) for b in (1 - along, along)]
    return np.stack(corners, -1), np.stack(shares, -1)


def _between(length: int, count: int) -> tuple[Array, Array, Array]:
    """Return for each of `count` samples of a line the two positions beside it and the share of the second."""
    position = np.maximum((np.arange(count) + 0.5) * (length / count) - 0.5, 0)
    before = position.astype(np.int64)
    return before, np.minimum(before + 1, length - 1), position - before


def grids(vision: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Feed]:
    """Return every image alone: its patches as a grid, and what the graph is told of them."""
    feeds, start, merge = [], 0, vision["merge"]
    pixels = arrays["pixel_values"].reshape(-1, *vision["patch"])  # some processors put a dimension of 1 in front
    if vision["merges"] and (arrays[vision["merges"]] != merge).any():
        raise InputError(f"{vision['merges']} is not {merge}, the number of patches a side that these graphs merge.")
    for time, rows, columns in arrays[vision["grid"]].tolist():
        if time != 1:
            raise InputError(f"{vision['grid']} says {time} frames: videos are not exported, images have 1.")
        end = start + rows * columns
        patches = pixels[start:end].reshape(rows, columns, *vision["patch"])
        feeds.append({"pixel_values": patches, **patch_inputs(vision["asked"], rows, columns)})
        start = end
    return feeds


IMAGES = {
    "tiles": tiles,
    "real_tiles": real_tiles,
    "anyres": anyres,
    "square": square,
    "sized": sized,
    "patches": patches,
    "grids": grids,
}
