"""The part of a model that turns pixels into features, as modules that trace into one graph for any number of images.

Written out here, over the model's own submodules, because transformers' `get_image_features` decides on the host, image
by image, what an exporter can't follow (and freezes the number of images in a list): the decisions arrive as index
inputs instead. That the result is the same is checked at every export against `get_image_features` itself.

Shapes: T tiles or images, C channels, H x W pixels, N features of a tile, F features of the prompt, D hidden size,
P patches, M patches merged into one feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError

Samples = dict[str, Tensor]
Dynamic = dict[str, dict[int, Any]]


class Tiles(nn.Module):
    """Every image gives the same number of features, in order."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model.base_model, model.config

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [T, C, H, W] -> [F, D]."""
        return named(self.features(pixel_values).flatten(0, 1))

    def features(self, pixels: Tensor) -> Tensor:
        """Compute [T, C, H, W] -> [T, N, D]."""
        if self.config.model_type in ("internvl", "paligemma", "gemma3"):
            features: Tensor = self.model.get_image_features(pixels).pooler_output
        else:
            features = self.model.multi_modal_projector(selected_states(self.model.vision_tower, self.config, pixels))
        return features

    def samples(self) -> Samples:
        return {"pixel_values": torch.rand(3, *self.tile_shape())}

    def tile_shape(self) -> tuple[int, ...]:
        vision = self.config.vision_config
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(vision, "num_channels", 3), height, width

    def dynamic(self) -> Dynamic:
        return {"pixel_values": {0: torch.export.Dim("tiles")}}


class RealTiles(Tiles):
    """Idefics3 and SmolVLM, whose padding tiles the runner leaves out."""

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.connector(self.model.vision_model(pixels).last_hidden_state)
        return features


class AnyResolution(Tiles):
    """LLaVA-NeXT and OneVision: tiles of one image are put together, unpadded, shrunk, and given an end for each line.

    Each of that is a weighted choice among features: four of them with their weights (a bilinear sample; a plain choice
    has the weight 1 once), counted over all tiles, the last being the embedding that ends a line.
    """

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, feature_index: Tensor, feature_weight: Tensor
    ) -> dict[str, Tensor]:
        """Compute [T, C, H, W], [F, 4], [F, 4] -> [F, D]."""
        features = self.features(pixel_values).flatten(0, 1)  # [T * N, D]
        table = torch.cat([features, self.model.image_newline[None].to(features.dtype)])
        chosen = F.embedding(feature_index, table).float()  # [F, 4, D]
        return named((chosen * feature_weight.float()[..., None]).sum(1).to(features.dtype))

    def samples(self) -> Samples:
        index = torch.zeros(7, 4, dtype=torch.long)
        return {**super().samples(), "feature_index": index, "feature_weight": torch.rand(7, 4)}

    def dynamic(self) -> Dynamic:
        features = torch.export.Dim("features")
        return {**super().dynamic(), "feature_index": {0: features}, "feature_weight": {0: features}}


class Sized(Tiles):
    """Pixtral towers: one image of any size at a time, a whole number of merged patches high and wide."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [1, C, H, W] -> [F, D]."""
        tower, config = pixtral_tower(self.model), self.config
        grid = tower.patch_conv(pixel_values)  # [1, D, rows, columns]
        rows, columns = grid.shape[-2:]
        states = tower.ln_pre(grid.flatten(2).transpose(1, 2))
        row = torch.arange(rows)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns)[None].expand(rows, columns).flatten()
        positions = tower.patch_positional_embedding(states, torch.stack([row, column], -1))
        layers = getattr(config, "vision_feature_layer", -1)
        chosen = []
        hidden = [states]
        for layer in tower.transformer.layers:
            hidden.append(layer(hidden[-1], attention_mask=None, position_embeddings=positions))
        for layer_idx in [layers] if isinstance(layers, int) else layers:
            chosen.append(hidden[layer_idx])
        return named(self.projected(torch.cat(chosen, -1)[0], rows, columns))

    def projected(self, states: Tensor, rows: Any, columns: Any) -> Tensor:
        """Project [P, D] -> [F, D]."""
        projector = getattr(self.model, "multi_modal_projector", None) or self.model.vision_projection
        if not hasattr(projector, "patch_merger"):
            features: Tensor = projector(states[None])[0]
            return features
        side = projector.patch_merger.spatial_merge_size
        states = projector.norm(states)
        grid = torch.unflatten(states, 0, (rows // side, side, columns // side, side))
        merged = grid.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)  # [F, D * M], channels first as unfold has them
        states = projector.patch_merger.merging_layer(merged)
        merged_features: Tensor = projector.linear_2(projector.act(projector.linear_1(states)))
        return merged_features

    def side(self) -> int:
        return int(self.config.vision_config.patch_size * getattr(self.config, "spatial_merge_size", 1))

    def samples(self) -> Samples:
        return {"pixel_values": torch.rand(1, 3, 3 * self.side(), 5 * self.side())}

    def dynamic(self) -> Dynamic:
        rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
        return {"pixel_values": {2: self.side() * rows, 3: self.side() * columns}}


class Patches(Tiles):
    """Qwen2-VL and Qwen2.5-VL: one image, as a list of patches in the processor's order.

    Which patches see each other is a number for each: those of one window have the same. transformers sorts patches by
    window and splits; comparing numbers instead is right for windows of every size, at the image's edges too.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tower = model.model.visual

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, patch_positions: Tensor, patch_window: Tensor
    ) -> dict[str, Tensor]:
        """Compute [P, C * pixels of a patch], [P, 2] row and column, [P] -> [F, D]."""
        tower = self.tower
        states = tower.patch_embed(pixel_values)  # [P, D]
        positions = tower.rotary_pos_emb(states, patch_positions)
        same_window = patch_window[:, None] == patch_window[None]  # [P, P]
        whole = getattr(tower, "fullatt_block_indexes", None)
        for block_idx, block in enumerate(tower.blocks):
            sees = None if whole is None or block_idx in whole else same_window
            states = states + attend(block.attn, block.norm1(states), positions, sees)
            states = states + block.mlp(block.norm2(states))
        return named(tower.merger(states))

    def samples(self) -> Samples:
        vision = self.config.vision_config
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        count = 6 * vision.spatial_merge_size**2
        positions = torch.arange(2 * count).reshape(count, 2) % 5
        return {
            "pixel_values": torch.rand(count, pixels),
            "patch_positions": positions,
            "patch_window": torch.arange(count) // 7,
        }

    def dynamic(self) -> Dynamic:
        merged = self.config.vision_config.spatial_merge_size**2
        patches = merged * torch.export.Dim("merged_patches")
        return {name: {0: patches} for name in ("pixel_values", "patch_positions", "patch_window")}


VISION = {"tiles": Tiles, "real_tiles": RealTiles, "anyres": AnyResolution, "sized": Sized, "patches": Patches}


def pixtral_tower(model: Any) -> Any:
    """Return a Pixtral tower by the names that models have for it. Raises: InputError where there is none."""
    towers = (getattr(model, name, None) for name in ("vision_tower", "vision_encoder"))
    tower = next((tower for tower in towers if hasattr(tower, "patch_positional_embedding")), None)
    if tower is None:
        raise InputError(f"{type(model).__name__} takes pictures of any size, by no tower that is known")
    return tower


def named(features: Tensor) -> dict[str, Tensor]:
    return {"image_features": features}


def selected_states(tower: Any, config: Any, pixels: Tensor) -> Tensor:
    """Return the states of the layers that the configuration names: [T, C, H, W] -> [T, N, D]"""
    layers = config.vision_feature_layer
    hidden = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    states = torch.cat([hidden[i] for i in ([layers] if isinstance(layers, int) else layers)], -1)
    return states[:, 1:] if config.vision_feature_select_strategy == "default" else states


def attend(attention: Any, states: Tensor, positions: tuple[Tensor, Tensor], sees: Tensor | None) -> Tensor:
    """Return one attention layer of a Qwen vision tower: states [P, D], sees [P, P]"""
    qkv = attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)  # [3, heads, P, d]
    query, key, value = qkv.unbind(0)
    cos, sin = (part.float() for part in positions)  # [P, d]
    query, key = (turned(part.float(), cos, sin).to(part.dtype) for part in (query, key))
    bias = None if sees is None else torch.zeros_like(sees, dtype=query.dtype).masked_fill(~sees, -1e4)[None]
    mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias, scale=attention.scaling)
    projected: Tensor = attention.proj(mixed[0].transpose(0, 1).flatten(1))
    return projected


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def vision_module(model: Any, kind: str) -> Tiles:
    if kind == "anyres":
        check_line_ends(model)
    return VISION[kind](model).eval()


def check_line_ends(model: Any) -> None:
    """Raise InputError unless the model has the embedding that ends a line of features."""
    if not hasattr(model.model, "image_newline"):
        raise InputError(f"this {model.config.model_type} has no image_newline: it is of a version that is not known.")
