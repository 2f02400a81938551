"""Patch coordinates: the image number, row and column of each visual token. A frame of a video is an image.

Shapes: B sequences, S tokens of a pass, T tokens of the whole text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VIDEO_KIND = 2  # of a token, in `mm_token_type_ids`
GRIDS = ("image_grid_thw", "video_grid_thw", "image_sizes")  # inputs that say how visual tokens lie in their images


def coordinates_of(config: Any, visual: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the image number, row and column of each visual token, [B, S, 3]; zero at text.

    Visual tokens come in runs, one or more an image; a video is one run, or one a frame. The grids are read from the
    inputs where they hold them (`image_grid_thw`, `video_grid_thw`, `image_sizes`); a run that is one square, or
    several squares of `image_seq_length`, is taken as such. In other runs the row is how far the token is in the run
    and the column is the middle. What the vision tower makes of several frames together (Qwen2-VL's pairs) is one.
    """
    runs = runs_of(visual)
    coordinates = torch.zeros(*visual.shape, 3)
    lengths = [end - start for _, start, end in runs]
    shapes = run_shapes(config, lengths, inputs, videos=video_runs(config, visual, inputs=inputs, runs=runs))
    number, previous = -1, None
    for (sequence, start, end), shape in zip(runs, shapes, strict=True):
        if shape.first_of_image:
            number = 0 if sequence != previous else number + 1
            previous = sequence
        coordinates[sequence, start:end] = F.pad(shape.coordinates(end - start), (1, 0))
        coordinates[sequence, start:end, 0] = number + shape.frame_numbers(end - start)
        number += shape.frames - 1
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


def video_runs(config: Any, visual: Tensor, inputs: dict[str, Any], runs: list[tuple[int, int, int]]) -> list[bool]:
    """Return whether each run is of a video, by the kinds of tokens or by the video's placeholder: False if unknown."""
    kinds, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
    placeholder = getattr(config, "video_token_id", None)
    if kinds is not None:
        is_video = kinds == VIDEO_KIND
    elif ids is not None and placeholder is not None and placeholder != getattr(config, "image_token_id", None):
        is_video = ids == placeholder
    else:
        return [inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is not None] * len(runs)
    begin = is_video.shape[1] - visual.shape[1]  # the inputs may be those of the whole text
    if begin < 0:
        return [False] * len(runs)
    is_video = is_video.cpu()
    return [bool(is_video[sequence, begin + start]) for sequence, start, _ in runs]


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
    frames: int = 1  # of a video, one grid after the other, each an image of its own
    ends: int = 0  # tokens after the last frame that only say so (LLaVA-OneVision's line end)

    @property
    def length(self) -> int:
        rows, columns = self.finer or (0, 0)
        return self.frames * self.height * self.width + rows * (columns + 1) + self.ends

    def frame_numbers(self, length: int) -> Tensor:
        """Return the number of each token's frame in this run, from 0: [length]. All 0 for images."""
        return (torch.arange(length) // (self.height * self.width)).clamp(max=self.frames - 1)

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
        if self.frames > 1 or self.ends:
            return torch.cat([grid.repeat(self.frames, 1), torch.ones(self.ends, 2)])
        tiles = length // tile
        rest = (torch.arange(length - tiles * tile) + 0.5) / max(1, length - tiles * tile)
        return torch.cat([grid.repeat(tiles, 1), torch.stack([rest, torch.full_like(rest, 0.5)], 1)])


def run_shapes(config: Any, lengths: list[int], inputs: dict[str, Any], videos: list[bool]) -> list[RunShape]:
    """Return the shape of each run, as the inputs tell it, or guessed from its length where they do not.

    Args:
        videos: which of the runs are of videos.
    """
    of_videos = video_shapes(config, [n for n, is_video in zip(lengths, videos, strict=True) if is_video], inputs)
    of_images = image_shapes(config, inputs)
    if (len(of_videos), len(of_images)) == (sum(videos), len(videos) - sum(videos)):
        sources = {True: iter(of_videos), False: iter(of_images)}
        known = [next(sources[is_video]) for is_video in videos]
        if [shape.length for shape in known] == lengths:
            return known
    return [guessed_shape(config, length) for length in lengths]


def video_shapes(config: Any, lengths: list[int], inputs: dict[str, Any]) -> list[RunShape]:
    """Return the shapes of the runs of videos, in order: of all frames together, or a frame each (Qwen3-VL's)."""
    vision = getattr(config, "vision_config", config)
    if (grids := inputs.get("video_grid_thw")) is None:
        return [pooled_shape(config, length) for length in lengths]
    merge = getattr(vision, "spatial_merge_size", 1)
    known: list[RunShape] = []
    for frames, h, w in grids.tolist():
        frame = RunShape(h // merge, w // merge)
        video = replace(frame, frames=frames)
        together = lengths[len(known) : len(known) + 1] == [video.length]
        known += [video] if together else [frame] * frames
    return known


def pooled_shape(config: Any, length: int) -> RunShape:
    """Return the shape of a video whose frames are one tile each, pooled: LLaVA-OneVision's and LLaVA-NeXT-Video's."""
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return guessed_shape(config, length)
    stride = getattr(config, "spatial_pool_stride", None)
    side = math.ceil(size // patch / 2) if stride is None else size // patch // stride
    frames, ends = divmod(length, side * side) if side else (0, 0)
    return RunShape(side, side, frames=frames, ends=ends) if frames and ends <= 1 else guessed_shape(config, length)


def image_shapes(config: Any, inputs: dict[str, Any]) -> list[RunShape]:
    """Return the shapes of the runs of images, in order, where the inputs tell them."""
    vision = getattr(config, "vision_config", config)
    known: list[RunShape] = []
    if (grids := inputs.get("image_grid_thw")) is not None:
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
    return known


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
