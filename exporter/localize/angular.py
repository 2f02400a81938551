"""Angular distance: the contiguous block of layers that turns the last token's state least.

"The Unreasonable Ineffectiveness of the Deeper Layers" (UIDL, arXiv 2403.17887), equations 7 and 8.
Shapes: L layers, B samples, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..errors import InputError
from ..models.capture import BatchStatistics
from .scores import LayerScores


def angular(statistics: Iterable[BatchStatistics], count: int, protect: tuple[int, ...] = ()) -> LayerScores:
    """Drop the block of `count` layers with the smallest angular distance between what enters and what leaves it.

    Values are one minus the distance of the block that begins at each layer (in units of pi); 0 where none fits.
    """
    length = max(count, 1)
    total = torch.zeros(1, dtype=torch.double)
    number = 0
    for batch in statistics:
        states = batch.last_states.double()  # [L + 1, B, D]
        cosine = torch.cosine_similarity(states[:-length], states[length:], dim=-1).clamp(-1, 1)  # [L + 1 - n, B]
        total = total + (torch.arccos(cosine) / math.pi).sum(1)
        number += states.shape[1]
    distances = (total / number).tolist()
    layers = len(distances) + length - 1
    values = [1 - d for d in distances] + [0.0] * (length - 1)
    starts = [s for s in range(len(distances)) if not set(range(s, s + length)) & set(protect)]
    if count and not starts:
        raise InputError(
            f"no block of {count} consecutive layers of {layers} is free of the protected ones {sorted(protect)}: drop "
            "fewer, protect fewer, or use another localizer."
        )
    best = min(starts, key=lambda s: (distances[s], -s)) if count else 0
    return LayerScores("angular", tuple(values), tuple(range(best, best + count)))
