"""The cost of a model, by its configuration and the shapes of its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..checkpoints.source import Source

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")  # as configurations name them
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
OF_EXPERTS = re.compile(r"\.experts\.")  # in names of tensors; experts that every token takes are called shared
TOWER = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder)\.")


def kv_bytes_per_token(config: Any, dtype: Any) -> int:
    """Return keys and values of all decoder layers for one token, in bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)


def active_parameters(source: Source) -> list[float]:
    """Return the parameters of each decoder layer that a token runs through: of experts, those that it is sent to."""
    counts = [0.0] * source.num_layers
    share = active_share(source.config)
    for name, entry in source.weights.entries.items():
        if (layer := source.layer_of(name)) is not None:
            counts[layer] += entry.num_parameters * (share if OF_EXPERTS.search(name) else 1.0)
    return counts


def active_share(config: Any) -> float:
    """Return the share of the experts that a token is sent to; 1 where the configuration names none."""
    text = config.get_text_config()
    experts = next((count for name in EXPERTS if isinstance(count := getattr(text, name, None), int) and count), None)
    per_token = next((count for name in EXPERTS_PER_TOKEN if isinstance(count := getattr(text, name, None), int)), None)
    return 1.0 if experts is None or per_token is None else min(1.0, per_token / experts)


def tower_parameters(source: Source) -> int:
    """Return the parameters of the vision tower, most of which every patch of an image runs through."""
    entries = source.weights.entries.items()
    return sum(e.num_parameters for name, e in entries if TOWER.search(name) and source.layer_of(name) is None)


def image_patches(inputs: Mapping[str, Any], config: Any) -> int:
    """Return how many patches of images and of frames a batch has, as the vision tower takes them.

    Args:
        inputs: of the processor: pixel_values and pixel_values_videos, [patches, values] or [..., 3, height, width].
    """
    return sum(_patches(inputs.get(name), config) for name in ("pixel_values", "pixel_values_videos"))


def _patches(pixels: Any, config: Any) -> int:
    if pixels is None or not hasattr(pixels, "shape"):
        return 0
    if pixels.ndim == 2:
        return int(pixels.shape[0])
    size = getattr(getattr(config, "vision_config", None), "patch_size", None) or _stated(
        config.to_dict(), "patch_size"
    )
    side = size[0] if isinstance(size, list | tuple) else size
    if not isinstance(side, int) or pixels.ndim < 4:
        return 0
    *images, _, height, width = pixels.shape
    return int(math.prod(images) * (height // side) * (width // side))


def _stated(data: Mapping[str, Any], name: str) -> Any:
    """Return the first value of a name in a configuration or its parts: our own types have no vision_config."""
    if data.get(name) is not None:
        return data[name]
    parts = (_stated(part, name) for part in data.values() if isinstance(part, Mapping))
    return next((value for value in parts if value is not None), None)
