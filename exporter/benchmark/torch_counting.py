"""Bytes of caches and weights that a checkpoint reads, counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.flops import kv_bytes_per_token
from ..models.loading import text_decoder

PIXELS = ("pixel_values", "pixel_attention_mask", "pixel_values_videos")  # only the vision tower reads them


def cache_bytes(cache: Any) -> int:
    """Return the size of the keys and values that a cache of transformers holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def kv_bytes(config: Any, dtype: torch.dtype, real: Tensor, route: Any = None, drop_at: int = 0) -> int:
    """Return bytes of keys and values after a prompt: sequences x tokens of each layer, times a token's bytes.

    Args:
        real: [B, S] False at padding, which takes room as long as no token leaves.
        route: its layers [B, L] say which sequences a layer runs, its keep [B, S] which tokens there are from
            `drop_at` on.
    """
    text = config.get_text_config()
    per_token = kv_bytes_per_token(config, dtype) // text.num_hidden_layers
    there = torch.ones_like(real)
    kept = there if route is None or bool((route.keep | ~real).all()) else route.keep & real
    entries = 0
    for layer_idx, window in enumerate(windows(text)):
        sequences = len(real) if route is None else int(route.layers[:, layer_idx].sum())
        tokens = kept if layer_idx >= drop_at else there
        start = 0 if window is None else max(0, tokens.shape[1] - window + 1)
        entries += sequences * int(tokens[:, start:].sum(1).max())
    size: int = entries * per_token
    return size


def windows(text: Any) -> list[int | None]:
    """Return the sliding window of each layer, None where it sees everything."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def weights_read(model: Any, route: Any = None) -> int:
    """Return bytes of the weights that a decoding step reads: layers that any sequence runs, last norm, head."""
    decoder = text_decoder(model)
    layers = [layer for i, layer in enumerate(decoder.layers) if route is None or bool(route.layers[:, i].any())]
    modules = [*layers, decoder.norm, model.get_output_embeddings()]
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
