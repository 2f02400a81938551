"""Putting states through all decoder layers with gradients to the states, in a bounded amount of memory.

Shapes: B samples, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .loading import text_decoder
from .replay import Trace

KEPT_BYTES = 2 << 30  # of activations that a pass may keep for its gradient; above, layers run twice
KEPT_STATES = 16  # of [B, S, D] that a layer keeps, roughly, beside three of its MLP's width


def last_state(model: Any, traced: Trace, state: Tensor, see: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Return the last layer's output [B, S, D] from the input of the first, differentiable in it.

    Args:
        see: is given each layer's number and output, one after the other.
    """
    kept = activation_bytes(model.config.get_text_config(), state[..., 0].numel())
    output, again = state, torch.is_grad_enabled() and kept > KEPT_BYTES
    for layer_idx, layer in enumerate(text_decoder(model).layers):
        arguments = (layer, layer_idx, state)
        output = checkpoint(traced.step, *arguments, use_reentrant=False) if again else traced.step(*arguments)
        if see is not None:
            see(layer_idx, output)
        state = traced.after(layer_idx, output)
    return output


def activation_bytes(text_config: Any, tokens: int) -> int:
    """Return roughly what all layers keep for the gradients of so many tokens, padding counted."""
    wide = 3 * (getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size)
    return int(tokens * (KEPT_STATES * text_config.hidden_size + wide) * text_config.num_hidden_layers * 4)
