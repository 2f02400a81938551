"""Sets of layers judged as they will be used: with a fold, on held-out questions. What `best_of` asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..families import Decoder
from ..localize.judged import JudgedSets
from ..models.divergence import Divergence
from ..models.loading import text_decoder
from ..models.originals import ON_DISK_BYTES, Originals, originals_of, with_all_states
from ..models.residency import ranges_of
from ..models.side_by_side import Task, side_by_side
from ..models.variants import Variant
from ..plan import Folded, PruningPlan, make_plan
from .held_out import HeldOut
from .job import FoldJob
from .reconstruction import Fit, steps

ORIGINALS_BYTES = 2 << 30  # of states that several folds share, in memory


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
    ahead: dict[frozenset[int], Divergence] = field(default_factory=dict)  # on the questions of the next round alone
    kept: JudgedSets = field(default_factory=JudgedSets)  # by round, also of a run that was broken off
    begun: list[Originals] = field(default_factory=list)  # what sets are folded on, where it was read before

    def of_folded(self, sets: Sequence[frozenset[int]], judged_by: str, then: str | None = None) -> list[Divergence]:
        """Return the divergence on a portion of the held-out questions without each of the sets.

        Each is folded once, and put each question once; the original's states are shared by all.

        Args:
            then: the portion that some of the sets are judged by next.
        """
        judging = judged_by, tuple(sets)
        if (kept := self.kept.rounds.get(judging)) is not None:
            self.judged.update(zip(sets, kept, strict=True))
            return kept
        self.fold([drop for drop in sets if drop not in self.known])
        number = self.held_out.questions.portion(judged_by)
        next_number = number if then is None else self.held_out.questions.portion(then)
        before = [self.judged[drop] for drop in sets if drop in self.judged]
        alike = len(before) == len(sets) and len({len(divergence.kl) for divergence in before}) == 1
        variants = [self.known[drop] for drop in sets]
        if alike and all(drop in self.ahead for drop in sets):
            divergences = [self.judged[drop].and_on(self.ahead.pop(drop)) for drop in sets]
        elif not before and self.held_out.judges_ahead(number, next_number):
            divergences, more = self.held_out.judge_twice(variants, number, next_number)
            self.ahead.update(zip(sets, more, strict=True))
        else:
            divergences = self.held_out.judge(variants, number, known=before if alike else ())
        self.judged.update(zip(sets, divergences, strict=True))
        self.kept.note_round(judging, divergences)
        return divergences

    def fold(self, sets: Sequence[frozenset[int]]) -> None:
        """Fold each of the sets quickly, and remember what came of it."""
        if not sets:
            return
        with contextlib.ExitStack() as stack:
            originals = self.begun[0] if self.begun else stack.enter_context(self._originals())
            num_layers = len(text_decoder(self.model).layers)
            if self._streamed and not originals.complete(num_layers):  # one pass here, and one for all sets together
                with_all_states(self.model, originals)
            plans = [make_plan(num_layers, drop) for drop in sets]
            tasks = [self._folded(plan, originals) for plan in plans]
            progress = self.held_out.questions.progress
            for drop, plan, folded in progress(
                zip(sets, plans, side_by_side(self.model, tasks), strict=True), "fold sets of layers", len(sets)
            ):
                self.known[drop] = Variant(plan, folded)

    @contextlib.contextmanager
    def read_before(self) -> Iterator[Originals | None]:
        """Give what sets will be folded on, so that the original's states are found in a pass that is made anyway.

        None where all layers are in memory: there a pass costs what it computes.
        """
        if not self._streamed:
            yield None
            return
        with self._originals() as originals:
            self.begun.append(originals)
            try:
                yield originals
            finally:
                self.begun.clear()

    @property
    def _streamed(self) -> bool:
        return ranges_of(self.model) is not None

    def _originals(self) -> contextlib.AbstractContextManager[Originals]:
        batches = self.held_out.fit("read for folds", self.held_out.questions.portion("fold_sets"))
        return originals_of(self.model, batches, ON_DISK_BYTES if self._streamed else ORIGINALS_BYTES)

    def _folded(self, plan: PruningPlan, originals: Originals) -> Task[Folded]:
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
