"""Patch coordinates: the image number, row and column of each visual token.

Shapes: B sequences, S tokens of a pass, T tokens of the whole text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GRIDS = ("image_grid_thw", "video_grid_thw", "image_sizes")  # inputs that say how visual tokens lie in their images


def coordinates_of(config: Any, visual: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the image number, row and column of each visual token, [B, S, 3]; zero at text.

    Visual tokens come in runs, one or more an image. The grids are read from the inputs where they hold them
    (`image_grid_thw`, `image_sizes`); a run that is one square, or several squares of `image_seq_length`, is taken as
    such. In other runs the row is how far the token is in the run and the column is the middle.
    """
    runs = runs_of(visual)
    coordinates = torch.zeros(*visual.shape, 3)
    shapes = run_shapes(config, [end - start for _, start, end in runs], inputs)
    number, previous = -1, None
    for (sequence, start, end), shape in zip(runs, shapes, strict=True):
        if shape.first_of_image:
            number = 0 if sequence != previous else number + 1
            previous = sequence
        coordinates[sequence, start:end] = F.pad(shape.coordinates(end - start), (1, 0), value=number)
    return coordinates.to(visual.device)


def pass_coordinates(config: Any, visual: Tensor, inputs: dict[str, Any], whole: Tensor | None, past: int) -> Tensor:
    """Return the coordinates of a pass, [B, S, 3]: a part of the whole text's, or read from the pass's own inputs.

    Args:
        whole: [B, T, 3] of the text, zero for what was generated since; None: not known.
        past: tokens of the text before this pass.
    """
    if whole is None:
        return coordinates_of(config, visual, inputs)
    end = past + visual.shape[1]
    return F.pad(whole, (0, 0, 0, max(0, end - whole.shape[1])))[:, past:end]


def runs_of(visual: Tensor) -> list[tuple[int, int, int]]:
    """Return the sequence, start and end of each run of True in [B, S], in order."""
    edges = F.pad(visual.cpu().byte(), (1, 1)).diff(dim=1).nonzero().tolist()  # one at each start, one at each end
    return [(sequence, start, end) for (sequence, start), (_, end) in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class RunShape:
    """The layout of consecutive visual tokens in an image: tiles of rows and columns one after the other.

    In LLaVA-NeXT and its kin one coarse tile is followed by a finer grid over the same image, whose rows each end with
    a token that only says so: it lies at the right edge.
    """

    height: int
    width: int
    top: float = 0.0  # where the run begins in its image, and how much of it it covers, from 0 to 1
    share: float = 1.0
    first_of_image: bool = True
    finer: tuple[int, int] | None = None  # rows and columns of the finer grid, line ends not counted

    @property
    def length(self) -> int:
        rows, columns = self.finer or (0, 0)
        return self.height * self.width + rows * (columns + 1)

    def coordinates(self, length: int) -> Tensor:
        """Return the middle of each token, [length, 2]. What comes after whole tiles is not known to be a grid."""
        tile = self.height * self.width
        rows = (torch.arange(self.height) + 0.5) / self.height * self.share + self.top
        columns = (torch.arange(self.width) + 0.5) / self.width
        grid = torch.cartesian_prod(rows, columns)  # [tile, 2]
        if self.finer is not None:
            rows = (torch.arange(self.finer[0]) + 0.5) / self.finer[0]
            columns = F.pad((torch.arange(self.finer[1]) + 0.5) / self.finer[1], (0, 1), value=1.0)
            return torch.cat([grid, torch.cartesian_prod(rows, columns)])
        tiles = length // tile
        rest = (torch.arange(length - tiles * tile) + 0.5) / max(1, length - tiles * tile)
        return torch.cat([grid.repeat(tiles, 1), torch.stack([rest, torch.full_like(rest, 0.5)], 1)])


def run_shapes(config: Any, lengths: list[int], inputs: dict[str, Any]) -> list[RunShape]:
    """Return the shape of each run, as the inputs tell it, or guessed from its length where they do not."""
    vision = getattr(config, "vision_config", config)
    known: list[RunShape] = []
    if (grids := inputs.get("image_grid_thw")) is not None and inputs.get("video_grid_thw") is None:
        merge = getattr(vision, "spatial_merge_size", 1)
        known = [RunShape(h // merge, w // merge) for _, h, w in grids.tolist()]
    elif getattr(vision, "model_type", None) == "pixtral" and (sizes := inputs.get("image_sizes")) is not None:
        side = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        for h, w in torch.as_tensor(sizes).tolist():  # a run is one row of patches, then comes [IMG_BREAK]
            count = int(h) // side
            known += [
                RunShape(1, int(w) // side, top=row / count, share=1 / count, first_of_image=row == 0)
                for row in range(count)
            ]
    elif getattr(config, "image_grid_pinpoints", None) and (sizes := inputs.get("image_sizes")) is not None:
        counts = inputs.get("batch_num_images")  # LLaVA-OneVision's: several images are not cut into tiles
        alone = [n == 1 for n in counts.tolist() for _ in range(n)] if counts is not None else [True] * len(sizes)
        images = zip(torch.as_tensor(sizes).tolist(), alone, strict=True)
        known = [any_resolution_shape(config, *image) for image in images]
    if [shape.length for shape in known] == lengths:
        return known
    return [guessed_shape(config, length) for length in lengths]


def any_resolution_shape(config: Any, size: list[int], tiled: bool = True) -> RunShape:
    """Return the shape of LLaVA-NeXT's and LLaVA-OneVision's: the image in one tile, then tiles without their padding.

    Args:
        size: height and width of the image in pixels.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if not tiled:
        return RunShape(side, side, finer=(1, 0))
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    padded = torch.empty(1, down * side, across * side, device="meta")
    rows, columns = unpad_image(padded, size).shape[1:]
    if limit := str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_"):  # LLaVA-OneVision's
        ratio = math.sqrt(rows * columns / (int(limit) * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return RunShape(side, side, finer=(rows, columns))


def guessed_shape(config: Any, length: int) -> RunShape:
    """Guess square tiles of the size that the configuration speaks of, or one square; else one token a row."""
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side = size // patch if isinstance(size, int) and isinstance(patch, int) else 0
    for tile in (getattr(config, "image_seq_length", 0), side * side, length):
        if 1 < tile <= length and math.isqrt(tile) ** 2 == tile:
            return RunShape(math.isqrt(tile), math.isqrt(tile))
    return RunShape(length, 1)
