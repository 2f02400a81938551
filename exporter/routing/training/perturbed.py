"""Perturb the scores by which FastV chooses tokens, so that PAR's actions differ (arXiv 2412.06458, section 4.2).

The paper adds Gaussian noise to the attention that visual tokens receive. Noise on the logits of each head, before
their softmax, is averaged over the heads afterwards: the more heads, the less it moves the ranking. One number a token
added to the logarithm of the mean is the same for all heads and moves it by as much as it says.

Shapes: B sequences, H heads, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data.batches import Batch
from ...models.attention import AttentionCall, attention_replaced
from ...models.loading import text_decoder
from ...models.replay import trace
from ..rules import FASTV_LAYER

IMPLEMENTATION = "lvlm_exporter_asked"


class AskedAttention:
    """Exact attention that keeps the probabilities of one query of each sequence, those of the last call."""

    def __init__(self, query: Tensor) -> None:
        self.query = query  # [B]
        self.probabilities: Tensor | None = None  # [B, H, S]

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the attention's output [B, S, H, d]."""
        probabilities = call.probabilities(0, call.queries.shape[2])  # [B, H, S, S]
        self.probabilities = probabilities[torch.arange(len(self.query)), :, self.query]
        output = torch.matmul(probabilities.to(call.values.dtype), call.values)
        return output.transpose(1, 2).contiguous()


@torch.inference_mode()
def attention_of_heads(model: Any, batch: Batch) -> Tensor:
    """Return each head's attention from the last token of the prompt to all tokens, where FastV looks: [B, H, S]."""
    batch = batch.to(model.device)
    real = batch.inputs["attention_mask"].bool()
    order = torch.arange(real.shape[1], device=real.device)
    attention = AskedAttention(torch.where(real, order, -1).amax(1))
    layers = text_decoder(model).layers
    with attention_replaced(model, IMPLEMENTATION, attention):
        traced = trace(model, batch)
        state = traced.entry
        for layer_idx in range(FASTV_LAYER):
            state = traced.after(layer_idx, traced.step(layers[layer_idx], layer_idx, state))
    assert attention.probabilities is not None, "an attention that does not go through transformers' interface"
    return attention.probabilities


def perturbed_mean(scores: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add noise of a standard deviation to the logarithm of the mean over heads: [B, S]."""
    return scores + noise * torch.randn(scores.shape, generator=generator).to(scores.device)


def perturbed_heads(attention: Tensor, visual: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add noise to each head's logits of visual tokens; return the logarithm of the mean over heads: [B, S].

    Args:
        attention: [B, H, S] probabilities.
        visual: [B, S] True at visual tokens.
    """
    drawn = noise * torch.randn(attention.shape, generator=generator).to(attention.device)
    logits = attention.clamp(min=torch.finfo(attention.dtype).tiny).log() + drawn * visual[:, None]
    return logits.softmax(-1).mean(1).clamp(min=torch.finfo(attention.dtype).tiny).log()
