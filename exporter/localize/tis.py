"""TIS: cosine between a layer's input and output over the tokens that its attention finds important.

Short-LVLM (ACM MM 2025, arXiv 2507.23362), figure (a). Shapes: L layers, B samples, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..models.capture import BatchStatistics
from .scores import LayerScores, most_redundant


def important(scores: Tensor, candidates: Tensor, p: float) -> Tensor:
    """Return the top-p set: the fewest tokens whose scores make up a share of at least p of all.

    Args:
        scores: [..., S], non-negative; candidates: bool, broadcastable: tokens that may be chosen.
    Returns: bool [..., S].
    """
    scores = scores.double() * candidates
    mass = scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    ordered, order = (scores / mass).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the tokens that rank higher
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < p)
    return chosen & candidates


def tis(
    statistics: Iterable[BatchStatistics],
    count: int,
    protect: tuple[int, ...] = (),
    *,
    p: float = 0.5,
    tokens: Literal["per_layer", "all_layers"] = "per_layer",
    text: Literal["rows", "columns"] = "rows",
) -> LayerScores:
    """Score every layer and drop the `count` most redundant ones.

    Args:
        p: share of the attention mass that the important tokens hold.
        tokens: 'per_layer', each layer's own important tokens; 'all_layers', one set by the mean score over layers.
        text: how a text token's self-attention is averaged: 'rows' (what it gives) or 'columns' (what it receives).
    """
    total = torch.zeros(1, dtype=torch.double)
    number = torch.zeros(1, dtype=torch.double)
    for batch in statistics:
        if batch.visual_scores is None or batch.text_scores is None:
            raise InputError(
                "tis scores tokens by the attention that they get, which can't be read from this model: use another "
                "localizer, such as best_of."
            )
        visual, written = batch.visual_scores, batch.text_scores[text]  # [L, B, S]
        if tokens == "all_layers":
            visual, written = visual.mean(0, keepdim=True), written.mean(0, keepdim=True)
        chosen = important(visual, batch.is_visual, p) | important(written, batch.is_text, p)
        total = total + (batch.cosine.double() * chosen).sum((1, 2))
        number = number + chosen.expand_as(batch.cosine).sum((1, 2))
    values = (total / number).tolist()
    return LayerScores(
        "tis", tuple(values), most_redundant(values, count, protect), {"p": p, "tokens": tokens, "text": text}
    )
