"""Spacing: layers at even distances, so that every gap is one layer wide and a kept neighbour can be folded for it.

Rankings by cosine crowd their choice into the last third; where many layers go, gaps of several layers are what folds
make up for least. The first layers are spared: what they do, no later one repeats.
"""

from __future__ import annotations

from collections.abc import Collection

SPARED = 1 / 4  # of the layers, the first ones
WANTED = 0.3  # share of the layers from which on the proposal is worth judging


def spacing_wanted(count: int, num_layers: int) -> bool:
    return count >= WANTED * num_layers


def spaced(num_layers: int, count: int, protect: Collection[int]) -> tuple[int, ...]:
    """Choose `count` layers that lie evenly over those that may go, the last one but one among them where it can be."""
    free = [layer for layer in range(num_layers) if layer not in protect]
    late = [layer for layer in free if layer >= round(SPARED * num_layers) and layer < num_layers - 1]
    pool = late if len(late) >= count else free
    step = len(pool) / max(1, count)
    return tuple(sorted({pool[-1 - int(place * step)] for place in range(count)}))
