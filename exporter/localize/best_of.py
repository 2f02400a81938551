"""Best of: what three localizers propose, judged by the divergence that leaving those layers out really causes, then
improved by exchanges.

Cosines look at one layer at a time: they misrank layers in ways that differ from model to model, and take two that make
up for each other. A few questions, answered by the model, tell. Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..capture import BatchStatistics
from ..errors import InputError
from ..scores import LayerScores, most_redundant
from .angular import angular
from .block_influence import block_influence
from .greedy import SetLoss
from .tis import tis

PROPOSERS = {"tis": tis, "block_influence": block_influence, "angular": angular}
EXCHANGES = 2  # at most
SPARE = 2  # layers that each ranking names beyond those that are to go: what may be exchanged for others


def best_of(
    statistics: Sequence[BatchStatistics],
    count: int,
    protect: tuple[int, ...],
    loss: SetLoss,
    exchanges: int = EXCHANGES,
) -> LayerScores:
    """The proposal of the lowest loss (of equal ones the first, in the order of PROPOSERS), improved by exchanges.

    Values are those of the localizer whose proposal it was.

    Args:
        loss: divergence from the original's answers without each of some sets of layers.
        exchanges: at most so many, each for as many sets judged as layers are named by any ranking.
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
    named = {layer for scores in proposed.values() for layer in candidates(scores, count, protect)}
    drop, made = exchanged(frozenset(winner.drop), named, losses[frozenset(winner.drop)], loss, exchanges)
    details = {name: {"drop": sorted(s.drop), "loss": losses[frozenset(s.drop)]} for name, s in proposed.items()}
    in_order = tuple(sorted(drop, key=lambda layer: (-winner.values[layer], -layer)))
    return LayerScores(
        "best_of", winner.values, in_order, {"chosen": winner.method, "proposals": details, "exchanges": made}
    )


def candidates(scores: LayerScores, count: int, protect: tuple[int, ...]) -> set[int]:
    """What a localizer proposes to drop, and what it would propose next: values of blocks say nothing of that."""
    if scores.method == "angular":
        return set(scores.drop)
    return {*scores.drop, *most_redundant(scores.values, count + SPARE, protect)}


def exchanged(
    dropped: frozenset[int], named: set[int], current: float, loss: SetLoss, exchanges: int
) -> tuple[frozenset[int], list[dict[str, Any]]]:
    """Put back the layer that is missed most and drop the one that is missed least in its place, while that helps."""
    made: list[dict[str, Any]] = []
    while dropped and named - dropped and len(made) < exchanges:
        back = _cheapest(loss, {layer: dropped - {layer} for layer in sorted(dropped)})[0]
        fewer = dropped - {back}
        instead, least = _cheapest(loss, {layer: fewer | {layer} for layer in sorted(named - dropped)})
        if least >= current:
            break
        dropped, current = fewer | {instead}, least
        made.append({"back": back, "instead": instead, "loss": least})
    return dropped, made


def _cheapest(loss: SetLoss, sets: dict[int, frozenset[int]]) -> tuple[int, float]:
    """Of sets by the layer that makes the difference: the layer of the one with the lowest loss, and that loss."""
    losses = dict(zip(sets, loss.of_sets(list(sets.values())), strict=True))
    best = min(losses, key=lambda layer: losses[layer])
    return best, losses[best]
