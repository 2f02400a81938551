"""Hold what a localizer is given, and run it by its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .. import ranks
from ..data.batches import Batch
from ..errors import InputError
from ..methods import LOCALIZERS, resolve
from ..models.answers import AnsweredBatch
from ..models.capture import layer_statistics
from ..models.divergence import Divergence
from ..models.originals import Originals
from ..models.questions import Questions
from ..recipe import Method
from .scores import LayerScores


class SetLoss(Protocol):
    """The divergence from the original's answers without some layers."""

    @property
    def num_layers(self) -> int: ...

    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]: ...


class FoldedLoss(Protocol):
    """The divergence from the original on held-out questions without some layers, but with a fold."""

    def of_folded(
        self, sets: Sequence[frozenset[int]], judged_by: str, then: str | None = None
    ) -> list[Divergence]: ...

    def read_before(self) -> AbstractContextManager[Originals | None]: ...


KeepLoss = Callable[[Callable[[], SetLoss], int], SetLoss]  # from what makes one, and the number of layers


@dataclass(frozen=True)
class LocalizeJob:
    """A model and the questions to judge its layers by."""

    model: Any
    num_layers: int
    questions: Questions | None  # None only for those that look at nothing
    seed: int = 0
    folded: FoldedLoss | None = None  # judges sets of layers with a fold; None where nothing can be held out
    kept_loss: KeepLoss = lambda make, num_layers: make()  # a SetLoss that remembers what another run has judged

    @property
    def required_questions(self) -> Questions:
        assert self.questions is not None
        return self.questions


def run_localizer(method: Method, job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    """Choose `count` layers that are not protected, by the recipe's localizer.

    Raises: InputError where it chose another number of layers.
    """
    row = LOCALIZERS[method.name]
    measured: Any = job
    if row.from_statistics:
        measured = layer_statistics(job.model, job.required_questions.batches("score layers"), attention=row.attention)
    scores: LayerScores = resolve(row.run)(measured, count, tuple(protect), **method.options)
    if len(scores.drop) != count:
        raise InputError(f"{scores.method} chose {len(scores.drop)} layers instead of {count}.")
    return scores


def with_question_count(scores: LayerScores, batches: Sequence[Batch | AnsweredBatch]) -> LayerScores:
    """Return the scores, with the number of questions that they come from among their details."""
    plain = [batch.batch if isinstance(batch, AnsweredBatch) else batch for batch in batches]
    questions = ranks.total(sum(len(batch.samples) for batch in plain))
    return replace(scores, details=scores.details | {"questions": questions})
