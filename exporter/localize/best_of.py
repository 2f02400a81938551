"""Best of: what three localizers propose, judged by the divergence that leaving those layers out really causes.

Cosines misrank layers in ways that differ from model to model. A few questions, the same that the proposals come from,
tell them apart. Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..capture import BatchStatistics
from ..errors import InputError
from ..scores import LayerScores
from .angular import angular
from .block_influence import block_influence
from .tis import tis


class SetLoss(Protocol):
    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]: ...


PROPOSERS = {"tis": tis, "block_influence": block_influence, "angular": angular}


def best_of(
    statistics: Sequence[BatchStatistics],
    count: int,
    protect: tuple[int, ...],
    loss: SetLoss,
) -> LayerScores:
    """The proposal of the lowest loss; of equal ones the first, in the order of PROPOSERS.

    Args:
        loss: divergence from the original's answers without each of some sets of layers.
    """
    proposed: dict[str, LayerScores] = {}
    for name, propose in PROPOSERS.items():
        try:
            proposed[name] = propose(statistics, count, protect)
        except InputError:  # no block between protected layers is long enough: the others need none
            if name != "angular":
                raise
    distinct = list(dict.fromkeys(frozenset(scores.drop) for scores in proposed.values()))
    losses = dict(zip(distinct, loss.of_sets(distinct), strict=True))
    winner = min(proposed.values(), key=lambda scores: losses[frozenset(scores.drop)])
    details = {name: {"drop": sorted(s.drop), "loss": losses[frozenset(s.drop)]} for name, s in proposed.items()}
    return LayerScores("best_of", winner.values, winner.drop, {"chosen": winner.method, "proposals": details})
