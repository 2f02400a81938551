"""Localizers: which decoder layers are redundant. One file a method; this is the table of them.

A localizer takes what it is measured from, how many layers are to go and which are protected, and its own options.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..calibration import Batch
from ..capture import layer_statistics
from ..errors import InputError
from ..fidelity import AnswerDivergence, AnsweredBatch, answer_all
from ..scores import LayerScores, most_redundant
from .angular import angular
from .best_of import EXCHANGES, best_of
from .block_influence import block_influence
from .fisher import fisher, information
from .greedy import greedy
from .tis import tis

FEW_SAMPLES = 64  # questions that are answered to learn what removing layers does


@dataclass(frozen=True)
class LocalizeJob:
    """A model and the questions to judge its layers by."""

    model: Any
    num_layers: int
    batches: Callable[..., Iterable[Batch]]  # of a share of the questions; of all of them if none is given
    seed: int = 0
    num_samples: int = 1  # that the batches hold together


def by_tis(
    job: LocalizeJob,
    count: int,
    protect: Sequence[int],
    *,
    p: float = 0.5,
    tokens: Literal["per_layer", "all_layers"] = "per_layer",
    text: Literal["rows", "columns"] = "rows",
) -> LayerScores:
    statistics = layer_statistics(job.model, job.batches())
    return tis(statistics, count, tuple(protect), p=p, tokens=tokens, text=text)


def by_block_influence(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    return block_influence(layer_statistics(job.model, job.batches(), attention=False), count, tuple(protect))


def by_angular(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    return angular(layer_statistics(job.model, job.batches(), attention=False), count, tuple(protect))


def by_greedy(job: LocalizeJob, count: int, protect: Sequence[int], *, answer_tokens: int = 32) -> LayerScores:
    return greedy(
        AnswerDivergence.of(job.model, answer_all(job.model, job.batches(), answer_tokens)), count, tuple(protect)
    )


def by_fisher(
    job: LocalizeJob,
    count: int,
    protect: Sequence[int],
    *,
    samples: int = FEW_SAMPLES,
    answer_tokens: int = 32,
    draws: int = 2,
) -> LayerScores:
    """Args: samples: questions that are read; draws: answers drawn at each token."""
    few = answer_all(job.model, job.batches(samples / job.num_samples), answer_tokens)
    return _from(few, fisher(information(job.model, few, draws, job.seed), count, protect))


def by_best_of(
    job: LocalizeJob,
    count: int,
    protect: Sequence[int],
    *,
    samples: int = FEW_SAMPLES,
    answer_tokens: int = 32,
    exchanges: int = EXCHANGES,
) -> LayerScores:
    """Args: samples: questions that are read and judged by; answer_tokens: longest answer; exchanges: at most."""
    batches = list(job.batches(samples / job.num_samples))
    few = answer_all(job.model, batches, answer_tokens)
    statistics, loss = list(layer_statistics(job.model, batches)), AnswerDivergence.of(job.model, few)
    return _from(few, best_of(statistics, count, tuple(protect), loss, exchanges))


def _from(few: Sequence[AnsweredBatch], scores: LayerScores) -> LayerScores:
    """The scores, saying how many of the questions they come from."""
    return replace(scores, details=scores.details | {"questions": sum(len(one.batch.samples) for one in few)})


def by_order(name: str) -> Callable[..., LayerScores]:
    """Controls that look at nothing: values only say the order of choice."""

    def choose(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
        order = list(range(job.num_layers))
        if name == "random":
            random.Random(job.seed).shuffle(order)
        elif name == "last":
            order.reverse()
        values = [1 - order.index(layer) / job.num_layers for layer in range(job.num_layers)]
        return LayerScores(name, tuple(values), most_redundant(values, count, protect))

    return choose


STATISTICS: dict[str, Callable[..., LayerScores]] = {  # all of them from one pass over the data
    "tis": tis,
    "block_influence": block_influence,
    "angular": angular,
}
LOCALIZERS: dict[str, Callable[..., LayerScores]] = {
    "tis": by_tis,
    "block_influence": by_block_influence,
    "angular": by_angular,
    "fisher": by_fisher,
    "greedy": by_greedy,
    "best_of": by_best_of,
    "random": by_order("random"),
    "first": by_order("first"),
    "last": by_order("last"),
}


def explicit(num_layers: int, layers: Sequence[int]) -> LayerScores:
    """The layers that the recipe names: 1 for those that go."""
    return LayerScores("explicit", tuple(float(i in layers) for i in range(num_layers)), tuple(sorted(layers)))


def check_scores(scores: LayerScores, count: int) -> LayerScores:
    if len(scores.drop) != count:
        raise InputError(f"{scores.method} chose {len(scores.drop)} layers where {count} were to go.")
    return scores
