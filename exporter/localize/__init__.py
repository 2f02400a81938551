"""Localizers: which decoder layers are redundant. One file a method; this is the table of them.

A localizer takes what it is measured from, how many layers are to go and which are protected, and its own options.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..data.batches import Batch
from ..errors import InputError
from ..models.answers import AnswerDivergence, AnsweredBatch, StateError
from ..models.capture import layer_statistics
from ..models.questions import Questions
from .angular import angular
from .best_of import EXCHANGES, FoldedLoss, best_of
from .block_influence import block_influence
from .fisher import fisher, information
from .greedy import greedy
from .scores import LayerScores, most_redundant
from .tis import tis


@dataclass(frozen=True)
class LocalizeJob:
    """A model and the questions to judge its layers by."""

    model: Any
    num_layers: int
    questions: Questions | None  # None only for those that look at nothing
    seed: int = 0
    folded: FoldedLoss | None = None  # judges sets of layers with a fold; None where nothing can be held out

    @property
    def asked(self) -> Questions:
        assert self.questions is not None
        return self.questions


def by_tis(
    job: LocalizeJob,
    count: int,
    protect: Sequence[int],
    *,
    p: float = 0.5,
    tokens: Literal["per_layer", "all_layers"] = "per_layer",
    text: Literal["rows", "columns"] = "rows",
) -> LayerScores:
    statistics = layer_statistics(job.model, job.asked.batches("score layers"))
    return tis(statistics, count, tuple(protect), p=p, tokens=tokens, text=text)


def by_block_influence(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    statistics = layer_statistics(job.model, job.asked.batches("score layers"), attention=False)
    return block_influence(statistics, count, tuple(protect))


def by_angular(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    statistics = layer_statistics(job.model, job.asked.batches("score layers"), attention=False)
    return angular(statistics, count, tuple(protect))


def by_greedy(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    loss = AnswerDivergence.of(job.model, list(job.asked.answered("score layers")), job.asked.progress)
    return greedy(loss, count, tuple(protect))


def by_fisher(
    job: LocalizeJob, count: int, protect: Sequence[int], *, samples: int = 64, draws: int = 2
) -> LayerScores:
    """Args: samples: questions that are read; draws: answers drawn at each token."""
    few = list(job.asked.answered("score layers", number=samples))
    return _from(few, fisher(information(job.model, few, draws, job.seed), count, protect))


def by_best_of(
    job: LocalizeJob,
    count: int,
    protect: Sequence[int],
    *,
    samples: int | None = None,
    judged_by: int | None = None,
    exchanges: int = EXCHANGES,
    folded: bool = True,
) -> LayerScores:
    """Args:
    samples: questions that rankings are read from; None: a sixteenth.
    judged_by: questions that sets are judged by without a fold; None: one in 32.
    exchanges: at most.
    folded: whether the last few sets are judged with a fold, on held-out questions.
    """
    samples, judged_by = samples or job.asked.portion("rank"), judged_by or job.asked.portion("sets")
    batches = list(job.asked.batches("score layers", part="fit", number=samples))
    statistics = list(layer_statistics(job.model, batches))
    few = job.asked.batches("score layers", part="fit", number=judged_by)
    loss = StateError.of(job.model, few, job.asked.progress)
    judge = job.folded if folded else None
    scores = best_of(statistics, count, tuple(protect), loss, exchanges, judge)
    read = len(job.asked.indices("fit", max(samples, judged_by)))
    if judge is not None:
        fitted_on = job.asked.indices("fit", max(samples, judged_by, job.asked.portion("fold_sets")))
        read = len(fitted_on) + len(job.asked.indices("held_out", job.asked.portion("judge_few_sets")))
    return replace(scores, details=scores.details | {"questions": read})


def _from(few: Sequence[Batch | AnsweredBatch], scores: LayerScores) -> LayerScores:
    """The scores, saying how many of the questions they come from."""
    batches = [one.batch if isinstance(one, AnsweredBatch) else one for one in few]
    return replace(scores, details=scores.details | {"questions": sum(len(batch.samples) for batch in batches)})


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
