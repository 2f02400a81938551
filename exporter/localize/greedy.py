"""Greedy removal by loss: drop the layer whose removal hurts least, look again, repeat.

SLEB (arXiv 2402.09025), algorithm 1, with the divergence from the original at its own answers in place of perplexity on
text: questions about images come without labels, and multi-token answers show damage that first tokens hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .scores import LayerScores


class SetLoss(Protocol):
    """How far the model departs from the original's answers without some layers."""

    @property
    def num_layers(self) -> int: ...

    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]: ...


def greedy(loss: SetLoss, count: int, protect: tuple[int, ...] = ()) -> LayerScores:
    """Drop `count` layers one after the other. Values are minus the loss that each layer's removal alone causes."""
    alone = loss.of_sets([frozenset({layer}) for layer in range(loss.num_layers)])
    current = {layer: alone[layer] for layer in range(loss.num_layers) if layer not in protect}
    dropped: list[int] = []
    losses: list[float] = []
    while len(dropped) < count:
        best = min(current, key=lambda layer: (current[layer], -layer))
        dropped.append(best)
        losses.append(current[best])
        if len(dropped) < count:
            rest = [layer for layer in current if layer != best]
            current = dict(zip(rest, loss.of_sets([frozenset({*dropped, layer}) for layer in rest]), strict=True))
    return LayerScores("greedy", tuple(-value for value in alone), tuple(dropped), {"losses": losses})
