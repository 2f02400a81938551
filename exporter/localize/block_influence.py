"""Block influence: one minus the cosine between a layer's input and output, over all tokens.

ShortGPT (arXiv 2403.03853), equation 1. Shapes: L layers, B samples, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..models.capture import BatchStatistics
from .scores import LayerScores, most_redundant


def block_influence(statistics: Iterable[BatchStatistics], count: int, protect: tuple[int, ...] = ()) -> LayerScores:
    """Drop the `count` layers of the lowest influence. Values are mean cosines, so that higher is more redundant."""
    total = torch.zeros(1, dtype=torch.double)
    number = 0
    for batch in statistics:
        counted = batch.is_visual | batch.is_text  # [B, S]
        total = total + (batch.cosine.double() * counted).sum((1, 2))
        number += int(counted.sum())
    values = (total / number).tolist()
    return LayerScores("block_influence", tuple(values), most_redundant(values, count, protect))
