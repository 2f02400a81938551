"""Sets of layers judged as they will be used: with a fold, on held-out questions. What `best_of` asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..families import Decoder
from ..localize.judged import JudgedSets
from ..models.divergence import Divergence
from ..models.loading import text_decoder
from ..models.residency import ranges_of
from ..models.variants import Variant
from ..plan import PruningPlan, make_plan
from .held_out import HeldOut
from .job import ON_DISK_BYTES, ORIGINALS_BYTES, FoldJob, Originals, originals_of, with_all_states
from .reconstruction import Fit, Steps, side_by_side, steps


@dataclass(frozen=True)
class FoldedSets:
    """Folds sets of layers by a quick reconstruction: `down_proj` alone, from a few questions."""

    model: Any
    held_out: HeldOut
    read: Callable[[int, str], Tensor | None]
    decoder: Decoder
    multiplier: float = 1.0
    known: dict[frozenset[int], Variant] = field(default_factory=dict)
    judged: dict[frozenset[int], Divergence] = field(default_factory=dict)  # on the most questions so far
    kept: JudgedSets = field(default_factory=JudgedSets)  # by round, also of a run that was broken off

    def of_folded(self, sets: Sequence[frozenset[int]], judged_by: str) -> list[Divergence]:
        """Return the divergence on a portion of the held-out questions without each of the sets.

        Each is folded once, and put each question once; the original's states are shared by all.
        """
        judging = judged_by, tuple(sets)
        if (kept := self.kept.rounds.get(judging)) is not None:
            self.judged.update(zip(sets, kept, strict=True))
            return kept
        self.fold([drop for drop in sets if drop not in self.known])
        number = self.held_out.questions.portion(judged_by)
        before = [self.judged[drop] for drop in sets if drop in self.judged]
        alike = len(before) == len(sets) and len({len(divergence.kl) for divergence in before}) == 1
        variants = [self.known[drop] for drop in sets]
        divergences = self.held_out.judge(variants, number, known=before if alike else ())
        self.judged.update(zip(sets, divergences, strict=True))
        self.kept.note_round(judging, divergences)
        return divergences

    def fold(self, sets: Sequence[frozenset[int]]) -> None:
        """Fold each of the sets quickly, and remember what came of it."""
        if not sets:
            return
        number = self.held_out.questions.portion("fold_sets")
        batches = self.held_out.fit("read for folds", number)
        streamed = ranges_of(self.model) is not None
        with originals_of(self.model, batches, ON_DISK_BYTES if streamed else ORIGINALS_BYTES) as originals:
            if streamed:  # one pass here, and one for all sets together
                with_all_states(self.model, originals)
            plans = [make_plan(len(text_decoder(self.model).layers), drop) for drop in sets]
            tasks = [self._folded(plan, originals) for plan in plans]
            progress = self.held_out.questions.progress
            for drop, plan, folded in progress(
                zip(sets, plans, side_by_side(self.model, tasks), strict=True), "fold sets of layers", len(sets)
            ):
                self.known[drop] = Variant(plan, folded)

    def _folded(self, plan: PruningPlan, originals: Originals) -> Steps:
        if self.decoder.unfoldable or not plan.drop:  # no fold is exact
            return {}
        job = FoldJob(
            model=self.model,
            batches=lambda share=1.0: (),
            plan=plan,
            read=self.read,
            decoder=self.decoder,
            multiplier=self.multiplier,
        )
        return (yield from steps(job, Fit(), originals, ["down_proj"]))
