"""Vision graphs of types that no row knows: the model's own `get_image_features`, given what it decides on the host.

Towers of patches ask `transformers.vision_utils` where each patch lies, how position embeddings are resampled, and
which patches are in one window. They take the answers as keywords, so the runner computes these (`runtime/grids.py`)
and they become inputs. What is left reads the picture's rows and columns alone, which here are sizes of the pixels'
first two dimensions: a graph follows them. One picture is one run, so that nothing has to be told apart between
pictures.

Shapes: T tiles, C channels, H x W pixels, R rows and K columns of patches, P = R * K, F features, D their size.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...clean_room.onnx_components import features_in_order
from ...probe.pictures import encoder_of
from ..rows import Pictures, Support
from ..runtime.grids import patch_inputs
from .vision import Dynamic, Samples, Tiles, named, vision_module

SEGMENTS = "lvlm_exporter_flash_segments"  # "flash": towers then hand over where segments end, and split nothing


class OwnTiles(Tiles):
    """Tiles of one size, each on its own, as the model encodes them."""

    def __init__(self, model: Any, form: Pictures) -> None:
        super().__init__(model)
        self.encode, self.form = encoder_of(model), form

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [T, C, H, W] -> [F, D]."""
        tiles = pixel_values
        for _ in range(self.form.dims - 4):
            tiles = tiles[:, None]
        masks = {}
        if self.form.mask_dims:
            whole = torch.ones_like(tiles.flatten(-3)[..., 0] if self.form.mask_dims == 2 else tiles[..., 0, :, :])
            masks["pixel_attention_mask"] = whole.bool()
        return named(features_in_order(self.encode(tiles, **masks)))

    def tile_shape(self) -> tuple[int, ...]:
        stated = getattr(getattr(self.config, "vision_config", None), "image_size", None)
        return super().tile_shape() if stated else self.form.tile


class OwnGrids(nn.Module):
    """One picture as a grid of patches, in the processor's order."""

    def __init__(self, model: Any, form: Pictures) -> None:
        super().__init__()
        self.model, self.form = model.base_model, form
        self.encode = encoder_of(model)
        remember_own_code(self.model)

    def forward(self, pixel_values: Tensor, **host_inputs: Tensor) -> dict[str, Tensor]:
        """Compute [R, K, pixels of a patch] and what the host says of the patches -> [F, D]."""
        rows, columns = pixel_values.shape[:2]
        return self.encoded(pixel_values.flatten(0, 1), (rows, columns), host_inputs)

    def encoded(self, pixels: Tensor, grid_size: tuple[Any, Any], host_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute [P, pixels of a patch] of a grid of so many rows and columns -> [F, D]."""
        for _ in range(self.form.dims - pixels.ndim):
            pixels = pixels[None]
        grid: dict[str, Any] = {self.form.grid: Numbers([[1, *grid_size]])}
        if self.form.merges:
            grid[self.form.merges] = Numbers([self.form.merge])
        known = {"cu_seqlens": torch.zeros(2, dtype=torch.int32), "max_seqlen": 1, "max_window_seqlen": 1}
        with whole_segments(self.model):
            return named(features_in_order(self.encode(pixels, **grid, **known, **host_inputs)))

    def samples(self) -> Samples:
        rows, columns = 3 * self.form.merge, 5 * self.form.merge
        host_inputs = patch_inputs(self.form.host_inputs(), rows, columns)
        arrays = {name: torch.from_numpy(value) for name, value in host_inputs.items()}
        return {"pixel_values": torch.rand(rows, columns, *self.form.tile), **arrays}

    def dynamic(self) -> Dynamic:
        merge = self.form.merge
        rows, columns = (merge * torch.export.Dim(name, min=2) for name in ("rows", "columns"))
        host_inputs = patch_inputs(self.form.host_inputs(), merge, merge)
        return {"pixel_values": {0: rows, 1: columns}} | {name: {0: torch.export.Dim.AUTO} for name in host_inputs}


# --- a grid whose sizes a graph follows -------------------------------------------------------------------------------


class Numbers:
    """A tensor of a few whole numbers that are sizes: what code reads of `image_grid_thw`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, ...]:
        inner = self.rows[0] if self.rows and isinstance(self.rows[0], list) else None
        return (len(self.rows),) if inner is None else (len(self.rows), len(inner))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return (Numbers(row) if isinstance(row, list) else row for row in self.rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple) and isinstance(key[0], Tensor):  # the row of each patch: there is one picture
            return torch.full_like(key[0], 1) * self.rows[0][key[1]]
        if isinstance(key, tuple):
            first, second = key
            chosen = [row[second] for row in (self.rows[first] if isinstance(first, slice) else [self.rows[first]])]
            return _wrapped(chosen if isinstance(first, slice) else chosen[0])
        return _wrapped(self.rows[key])

    def _each(self, operate: Any) -> Numbers:
        return Numbers([[operate(x) for x in row] if isinstance(row, list) else operate(row) for row in self.rows])

    def __rfloordiv__(self, other: int) -> Numbers:
        return self._each(lambda value: other // value)

    def __pow__(self, other: int) -> Numbers:
        return self._each(lambda value: value**other)

    def __floordiv__(self, other: Any) -> Numbers:
        if isinstance(other, Numbers):
            return Numbers([mine // theirs for mine, theirs in zip(self.rows, other.rows, strict=True)])
        return self._each(lambda value: value // other)

    def __mul__(self, other: int) -> Numbers:
        return self._each(lambda value: value * other)

    def prod(self, dim: int = -1) -> Numbers:
        return Numbers([_product(row) for row in self.rows])

    def unbind(self, dim: int = -1) -> tuple[Numbers, ...]:
        return tuple(Numbers(list(column)) for column in zip(*self.rows, strict=True))

    def tolist(self) -> Any:
        return self.rows

    def to(self, *_: Any, **__: Any) -> Numbers:
        return self


def _wrapped(value: Any) -> Any:
    return Numbers(value) if isinstance(value, list) else value


def _product(values: list[Any]) -> Any:
    product: Any = 1
    for value in values:
        product = product * value
    return product


# --- attention within segments ----------------------------------------------------------------------------------------


def attend_in_segments(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as a tower calls it, query [1, Q, P, E], patches of one segment among themselves."""
    ends = options["cu_seq_lens_q"]
    bias = None
    if ends.shape[0] != 2:  # of one segment, all see all
        place = torch.arange(query.shape[2])
        segment = (place[:, None] >= ends[None, 1:]).long().sum(1)  # [P]
        same = segment[:, None] == segment[None]
        bias = torch.zeros_like(same, dtype=query.dtype).masked_fill(~same, -1e4)[None, None]
    if query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(times, 1) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=options.get("scaling"))
    return mixed.transpose(1, 2), None


@contextmanager
def whole_segments(model: Any) -> Iterator[None]:
    """Let a tower's attention hand its segments to `attend_in_segments` inside the block.

    transformers' exporter replaces these layers' code by one for segments of equal length: their own code stays here.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SEGMENTS, attend_in_segments)
    layers = [module for module in model.modules() if hasattr(module, OWN_CODE)]
    before = [layer.config._attn_implementation for layer in layers]
    try:
        for layer in layers:
            layer.forward = getattr(layer, OWN_CODE)
            layer.config._attn_implementation = SEGMENTS
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            del layer.forward
            layer.config._attn_implementation = name


OWN_CODE = "_forward_of_its_class"


def remember_own_code(model: Any) -> None:
    """Note the code of attention layers that take segments, before an exporter replaces it."""
    for module in model.modules():
        takes = inspect.signature(type(module).forward).parameters
        if "cu_seqlens" in takes and hasattr(module, "config"):
            setattr(module, OWN_CODE, types.MethodType(type(module).forward, module))


def own_vision(model: Any, support: Support) -> Any:
    """Return the module that encodes pictures of a type that no row knows."""
    form = support.pictures
    assert form is not None
    if support.kind == "grids":
        return OwnGrids(model, form).eval()
    if support.kind in ("tiles", "real_tiles"):
        return OwnTiles(model, form).eval()
    return vision_module(model, support.kind)
