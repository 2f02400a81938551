"""Controls: localizers that look at nothing, to compare the others with. Values only say the order of choice."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .job import LocalizeJob
from .scores import LayerScores, most_redundant


def by_random(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    """Drop layers at random, by the recipe's seed."""
    order = list(range(job.num_layers))
    random.Random(job.seed).shuffle(order)
    return _in_order("random", order, count, protect)


def by_first(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    """Drop the first layers."""
    return _in_order("first", list(range(job.num_layers)), count, protect)


def by_last(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    """Drop the last layers."""
    return _in_order("last", list(range(job.num_layers))[::-1], count, protect)


def _in_order(name: str, order: list[int], count: int, protect: Sequence[int]) -> LayerScores:
    values = [1 - order.index(layer) / len(order) for layer in range(len(order))]
    return LayerScores(name, tuple(values), most_redundant(values, count, protect))
