"""Variants of one model, judged by questions about pictures that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.batches import Batch
from ..models.divergence import Divergence
from ..models.questions import Questions
from ..models.variants import Variant, judge


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
        batches = self.questions.answered("judge on held-out questions", "held_out", number, after)
        agreements = judge(self.model, variants, batches)
        indices = self.questions.indices("held_out", number, after)
        pictures = tuple(self.questions.split.pictures[i] for i in indices)
        judged = [
            Divergence(
                kl=tuple(agreement.kl_of),
                tokens=tuple(agreement.tokens_of),
                pictures=pictures,
                follows=tuple(agreement.follows),
                states=agreement.states,
            )
            for agreement in agreements
        ]
        return [before.and_on(more) for before, more in zip(known, judged, strict=True)] if known else judged
