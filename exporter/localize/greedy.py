"""Greedy removal by loss: drop the layer whose removal hurts least, look again, repeat.

SLEB (arXiv 2402.09025), algorithm 1, with the divergence from the original at its own answers in place of perplexity on
text: questions about images come without labels, and multi-token answers show damage that first tokens hide.
"""

from __future__ import annotations

from typing import Protocol

from ..scores import LayerScores


class RemovalLoss(Protocol):
    """How far the model departs from the original's answers without some layers."""

    @property
    def num_layers(self) -> int: ...

    def __call__(self, dropped: frozenset[int]) -> float: ...

    def each_further(self, dropped: frozenset[int], candidates: tuple[int, ...]) -> dict[int, float]:
        """The loss without `dropped` and each one of the candidates."""
        ...


def greedy(loss: RemovalLoss, count: int, protect: tuple[int, ...] = ()) -> LayerScores:
    """Drop `count` layers one after the other. Values are minus the loss that each layer's removal alone causes."""
    free = tuple(layer for layer in range(loss.num_layers) if layer not in protect)
    alone = loss.each_further(frozenset(), tuple(range(loss.num_layers)))
    dropped: list[int] = []
    losses: list[float] = []
    current = {layer: alone[layer] for layer in free}
    while len(dropped) < count:
        best = min(current, key=lambda layer: (current[layer], -layer))
        dropped.append(best)
        losses.append(current[best])
        if len(dropped) < count:
            rest = tuple(layer for layer in free if layer not in dropped)
            current = loss.each_further(frozenset(dropped), rest)
    return LayerScores(
        "greedy", tuple(-alone[layer] for layer in range(loss.num_layers)), tuple(dropped), {"losses": losses}
    )
