"""A decoder pass in which leaving out tokens and layers is a matter of degree, so that a router can learn by gradient.

A visual token that is gone is one that no other token attends to: its key's attention probability is multiplied by a
gate and the rest normalised again (DynamicViT, arXiv 2106.02034, equations 9 to 11). A layer that is skipped adds
nothing: what it adds is multiplied by a gate. With gates of 0 and 1 this is exactly what the routed model computes for
the tokens that stay, so that training sees what will run; the gradient of a gate says what a token that is gone would
have brought, and what one that stays is worth.

Shapes: B samples, S tokens, L layers, N candidate layers, H heads, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...models.attention import AttentionCall, attention_replaced
from ...models.loading import text_decoder
from ...models.replay import Trace

IMPLEMENTATION = "lvlm_exporter_gated"
KEPT_BYTES = 2 << 30  # of attention probabilities that a pass may keep for its gradient; above, layers run twice


@dataclass(frozen=True)
class Gates:
    """The share of each token and layer that stays, from 0 to 1."""

    tokens: Tensor  # [B, S]; 1 at text
    layers: Tensor  # [B, L]


@contextlib.contextmanager
def gated_attention(model: Any) -> Iterator[GatedAttention]:
    """Make the decoder's attention multiply its probabilities by gates, where some are set."""
    attention = GatedAttention()
    with attention_replaced(model, IMPLEMENTATION, attention):
        yield attention


class GatedAttention:
    """Exact attention, times `gate` [B, S] over the keys; None leaves it as it is."""

    def __init__(self) -> None:
        self.gate: Tensor | None = None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the attention's output [B, S, H, d]."""
        probabilities = call.probabilities(0, call.queries.shape[2])  # [B, H, S, S]
        if self.gate is not None:
            probabilities = probabilities * self.gate[:, None, None, :]
            probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-9)
        output = torch.matmul(probabilities.to(call.values.dtype), call.values)
        return output.transpose(1, 2).contiguous()


def gated_states(
    model: Any, traced: Trace, attention: GatedAttention, state: Tensor, start: int, gates: Gates
) -> Tensor:
    """Return the last layer's output [B, S, D] from the input of layer `start`, differentiable in the gates."""
    layers = text_decoder(model).layers

    def step(layer_idx: int, state: Tensor, tokens: Tensor, layer_gate: Tensor) -> Tensor:
        attention.gate = tokens  # also when the layer is run again for its gradient
        output = traced.step(layers[layer_idx], layer_idx, state)
        return state + layer_gate[:, None, None].to(state.dtype) * (output - state)

    again = _kept_bytes(model, state, start) > KEPT_BYTES
    for layer_idx in range(start, len(layers)):
        arguments = (layer_idx, state, gates.tokens, gates.layers[:, layer_idx])
        output = checkpoint(step, *arguments, use_reentrant=False) if again else step(*arguments)
        state = traced.after(layer_idx, output)
    attention.gate = None
    return state


def _kept_bytes(model: Any, state: Tensor, start: int) -> int:
    config = model.config.get_text_config()
    batch, length, _ = state.shape
    num_bytes: int = 4 * 3 * batch * config.num_attention_heads * length**2 * (config.num_hidden_layers - start)
    return num_bytes


# --- gates from logits ------------------------------------------------------------------------------------------------


def straight_through(logits: Tensor, candidates: Tensor, count: Tensor, temperature: float = 1.0) -> Tensor:
    """Return 1 at each sequence's `count` highest candidates and 0 at the others, with the gradient of a sigmoid.

    The sigmoid is centred half way between the last that stays and the first that goes, so that the gradient is the
    largest where the choice is close.

    Args:
        logits: [B, S]; candidates: [B, S] True where a choice is to be made; count: [B] how many stay.
    Returns: [B, S], 0 where there is no candidate.
    """
    if not logits.shape[1]:  # a router without layers to skip
        return torch.zeros_like(logits)
    lowest = torch.finfo(logits.dtype).min
    masked = logits.masked_fill(~candidates, lowest)
    ordered, order = masked.sort(dim=1, descending=True, stable=True)
    available = candidates.sum(1)
    count = torch.minimum(count, available)
    place = torch.arange(logits.shape[1], device=logits.device)
    hard = torch.zeros_like(candidates).scatter(1, order, place < count[:, None])
    last = ordered.gather(1, (count - 1).clamp(min=0)[:, None])
    first = ordered.gather(1, count.clamp(max=logits.shape[1] - 1)[:, None])
    threshold = torch.where((count < available)[:, None], (last + first) / 2, last - 8 * temperature)
    threshold = torch.where((count > 0)[:, None], threshold, first + 8 * temperature).detach()
    soft = torch.sigmoid((logits - threshold) / temperature).masked_fill(~candidates, 0)
    return hard.to(soft.dtype) + (soft - soft.detach())  # in this order, so that the value is exactly 0 or 1


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return -torch.log(-torch.log(uniform))
