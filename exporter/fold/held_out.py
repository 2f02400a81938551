"""Variants of one model, judged by questions about pictures that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ranks
from ..data.batches import Batch
from ..models.answers import AnsweredBatch
from ..models.divergence import Divergence
from ..models.questions import Questions
from ..models.residency import ranges_of
from ..models.variants import AnswerAgreement, Variant, judge, judge_in_parts


@dataclass(frozen=True)
class HeldOut:
    """The two sides of a run's questions: what folds are fitted on, and what judges them."""

    model: Any
    questions: Questions

    @property
    def too_few(self) -> str:
        """Return a sentence where there are too few pictures to hold some out; else empty."""
        return self.questions.split.too_few

    def fit(self, what: str, number: int | None = None) -> Iterable[Batch]:
        """Return prompts and answers to fit on: the first `number` that are drawn, all if none is given."""
        return self.questions.batches(what, part="fit", number=number)

    def judge(
        self, variants: Sequence[Variant], number: int | None = None, known: Sequence[Divergence] = ()
    ) -> list[Divergence]:
        """Return how far each variant departs from the original on the first `number` held-out questions.

        Args:
            known: what an earlier judging by fewer of them has said of the same variants: only the others are asked.
        """
        after = len(known[0].kl) if known else 0
        if known and not self.questions.indices("held_out", number, after):
            return list(known)
        judged = self._divergences(judge(self.model, variants, self._batches(number, after)), number, after)
        return [before.and_on(more) for before, more in zip(known, judged, strict=True)] if known else judged

    def judges_ahead(self, number: int, then: int | None) -> bool:
        """Tell whether `judge_twice` saves a pass: where layers are read from disk, and more questions are to come.

        What it costs is that variants are judged on these which the first ones would have ruled out.
        """
        streamed = ranges_of(self.model) is not None
        return streamed and ranks.world() == 1 and bool(self.questions.indices("held_out", then, number))

    def judge_twice(
        self, variants: Sequence[Variant], number: int, then: int | None
    ) -> tuple[list[Divergence], list[Divergence]]:
        """Return what `judge` returns by the first `number` questions, and by the others of the first `then`.

        Batches are those of two judgements, one pass takes them all.
        """
        parts = self._batches(number, 0), self._batches(then, number)
        first, others = judge_in_parts(self.model, variants, parts)
        return self._divergences(first, number, 0), self._divergences(others, then, number)

    def _batches(self, number: int | None, after: int) -> Iterator[AnsweredBatch]:
        return self.questions.answered("judge on held-out questions", "held_out", number, after)

    def _divergences(self, agreements: Sequence[AnswerAgreement], number: int | None, after: int) -> list[Divergence]:
        indices = self.questions.indices("held_out", number, after)
        pictures = tuple(self.questions.split.pictures[i] for i in indices)
        return [
            Divergence(
                kl=tuple(agreement.kl_of),
                tokens=tuple(agreement.tokens_of),
                pictures=pictures,
                follows=tuple(agreement.follows),
                states=agreement.states,
            )
            for agreement in agreements
        ]
