"""The reference for routes: a small stock model, its layers run one by one on the tokens that stay.

Nothing of the router's files is used here. What each layer is given is noted in a pass of the stock model, narrowed to
the tokens that stay, and given to the layer again.

Shapes: S tokens, K of them that stay, A of an answer, L layers, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import visual_token_ids
from .stack import check_stack
from .writes import Watched, putting_out, watched

CLOSE = 1e-4  # of logits, absolute and relative


class Unroutable(ValueError):  # noqa: N818 - what was found
    """A type does not route; the message is a clause that says why."""


@dataclass(frozen=True)
class Stock:
    """A small stock model with prompts of one length, [1, S] each."""

    model: Any
    prompts: list[dict[str, Tensor]]

    @functools.cached_property
    def batch(self) -> dict[str, Tensor]:
        """Return all prompts as one batch."""
        return self.batch_of(range(len(self.prompts)))

    def batch_of(self, numbers: Iterable[int]) -> dict[str, Tensor]:
        """Return some of the prompts as one batch."""
        chosen = [self.prompts[number] for number in numbers]
        return {name: torch.cat([prompt[name] for prompt in chosen]) for name in chosen[0]}

    @functools.cached_property
    def alone(self) -> list[Tensor]:
        """Return the logits of each prompt alone, [S, vocabulary]."""
        return [self.model(**prompt, use_cache=False).logits[0] for prompt in self.prompts]

    @functools.cached_property
    def together(self) -> list[list[int]]:
        """Return which prompts are run in one batch: each alone where the stock model gives others in a batch."""
        batch = self.model(**self.batch, use_cache=False).logits
        alike = all(close(*pair) for pair in zip(batch, self.alone, strict=True))
        numbers = list(range(len(self.prompts)))
        return [numbers] if alike else [[number] for number in numbers]

    @property
    def visual(self) -> Tensor:
        """Return [B, S] True at the placeholders."""
        return torch.isin(self.batch["input_ids"], torch.tensor(visual_token_ids(self.model.config)))

    def extended(self, number: int, answer: Tensor) -> dict[str, Tensor]:
        """Return a prompt with an answer behind it: [1, S + A]."""
        prompt = self.prompts[number]
        kinds: dict[str, Tensor] = {
            name: torch.zeros_like(answer) for name in ("mm_token_type_ids", "token_type_ids") if name in prompt
        }
        more = {"input_ids": answer, "attention_mask": torch.ones_like(answer), **kinds}
        return prompt | {name: torch.cat([prompt[name], part[None]], 1) for name, part in more.items()}

    def left(self, inputs: dict[str, Tensor], keep: Tensor, layers: Tensor, drop_at: int) -> Tensor:
        """Return logits [K, vocabulary] of stock layers, run one by one on the tokens that stay.

        Args:
            inputs: one sequence.
            keep: [S]
            layers: [L] those that run.
        """
        decoder = check_stack(self.model)
        noted, added = passed(self.model, inputs)
        stays = keep.nonzero()[:, 0]
        state = noted.before[0]
        for layer_idx, layer in enumerate(decoder.layers):
            dropped = layer_idx >= drop_at
            state = state[:, stays] if layer_idx == drop_at else state
            if layers[layer_idx]:
                keywords = noted.keywords[layer_idx]
                output = layer(state, **(narrowed(keywords, stays, keep) if dropped else keywords))
                state = output[0] if isinstance(output, tuple) else output
            if layer_idx in added:
                state = state + (added[layer_idx][:, stays] if dropped else added[layer_idx])
        whole = torch.zeros_like(noted.before[0])
        whole[:, stays] = state
        with putting_out(decoder.layers[-1], whole):
            logits: Tensor = self.model(**inputs, use_cache=False).logits[0, stays]
        return logits


def passed(model: Any, inputs: dict[str, Tensor]) -> tuple[Watched, dict[int, Tensor]]:
    """Run a stock model and note what its layers are given, and by layer what is added after it, [1, S, D]."""
    layers = check_stack(model).layers
    with watched(layers) as noted:
        model(**inputs, use_cache=False)
    if len(noted.before) != len(layers):
        raise Unroutable(f"{len(noted.before)} of its {len(layers)} layers run in a pass")
    pairs = enumerate(zip(noted.after, noted.before[1:], strict=False))
    return noted, {layer_idx: enters - left for layer_idx, (left, enters) in pairs if not torch.equal(left, enters)}


def narrowed(keywords: dict[str, Any], stays: Tensor, keep: Tensor) -> dict[str, Any]:
    """Narrow what a layer is given to the tokens that stay."""
    size = len(keep)

    def narrow(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(narrow(name, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if name == "attention_mask":
            return value[..., stays, :][..., stays] if value.ndim == 4 else value[..., stays]
        if name == "position_ids":
            return value[..., stays]
        return value[..., stays, :] if value.ndim > 1 and value.shape[-2] == size else value

    return {name: narrow(name, value) for name, value in keywords.items()}


def close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=CLOSE, atol=CLOSE)
