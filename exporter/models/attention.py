"""Put a function of ours in the place of a decoder's attention, and what such functions begin with.

Shapes: B samples, S tokens, H heads, G heads of keys and values, d head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .loading import text_decoder


@contextlib.contextmanager
def attention_replaced(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Send the decoder's attention through `function`, with masks as sdpa takes them; `name` is transformers' key."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    decoder = text_decoder(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def attention_inputs(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the queries, and repeat grouped keys and values: query [B, H, S, d], key and value [B, G, S, d].

    Returns: queries [B, H, S, d], keys transposed [B, H, d, S], values [B, H, S, d].
    """
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key, value))
    return query * scaling, key.transpose(-1, -2), value


def attention_scores(query: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    """Return scores of queries [B, H, Q, d] at transposed keys [B, H, d, S], bounded by `softcap` if there is one."""
    scores = torch.matmul(query, keys)  # [B, H, Q, S]
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
