"""Replace a decoder's attention by a function of ours, which gets an `AttentionCall`.

Shapes: B samples, S tokens, H heads, G heads of keys and values, d head size, Q queries of a block, K keys they see.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .loading import text_decoder


@contextlib.contextmanager
def attention_replaced(model: Any, name: str, attend: Callable[[AttentionCall], Tensor]) -> Iterator[None]:
    """Send the decoder's attention through `attend`, which returns its output [B, S, H, d].

    Uses transformers' AttentionInterface, so that it works for every family; masks are those that sdpa takes.

    Args:
        name: transformers' key for the function.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def function(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        return attend(
            AttentionCall.of(query, key, value=value, mask=attention_mask, scaling=scaling, softcap=softcap)
        ), None

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    decoder = text_decoder(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@dataclass(frozen=True)
class AttentionCall:
    """What one call of a decoder layer's attention computes on, after rotary embedding and normalisation."""

    queries: Tensor  # [B, H, S, d] scaled
    keys: Tensor  # [B, H, d, S] transposed, grouped ones repeated
    values: Tensor  # [B, H, S, d] grouped ones repeated
    mask: Tensor | None  # [B, 1, S, S] True where a key is seen, or added to the scores; None: merely causal
    softcap: float | None  # bounds the scores

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        softcap: float | None,
    ) -> AttentionCall:
        """Take query [B, H, S, d], key and value [B, G, S, d] as transformers' AttentionInterface gives them."""
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key, value))
        return cls(query * scaling, key.transpose(-1, -2), values=value, mask=mask, softcap=softcap)

    def probabilities(self, start: int, stop: int) -> Tensor:
        """Return float32 probabilities [B, H, Q, K] of the queries from `start` to `stop`.

        K is S, or `stop` where the mask is merely causal: no query of the block attends to a later key.
        """
        seen = stop if self.mask is None else self.keys.shape[-1]
        scores = torch.matmul(self.queries[:, :, start:stop], self.keys[..., :seen])  # [B, H, Q, K]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return self._masked(scores, start, stop).softmax(-1, dtype=torch.float32)

    def _masked(self, scores: Tensor, start: int, stop: int) -> Tensor:
        if self.mask is None:  # transformers leaves out a mask that is merely causal
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(start + 1)
            return scores.masked_fill(future, -math.inf)
        part = self.mask[:, :, start:stop]
        floor = torch.finfo(scores.dtype).min  # not -inf: a padded query sees nothing at all
        return scores.masked_fill(~part, floor) if part.dtype == torch.bool else scores + part
