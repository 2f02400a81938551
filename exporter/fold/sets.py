"""Sets of layers judged as they will be used: with a fold, on held-out questions. What `best_of` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..data.batches import Batch
from ..families import Decoder
from ..models.divergence import Divergence
from ..models.loading import text_decoder
from ..models.variants import Variant
from ..plan import Folded, make_plan
from .held_out import HeldOut
from .job import FoldJob, Originals
from .reconstruction import Fit, reconstruct


@dataclass(frozen=True)
class FoldedSets:
    """Folds sets of layers by a quick reconstruction: `down_proj` alone, from a few questions."""

    model: Any
    held_out: HeldOut
    read: Callable[[int, str], Tensor | None]
    decoder: Decoder
    multiplier: float = 1.0
    known: dict[frozenset[int], Variant] = field(default_factory=dict)

    def of_folded(self, sets: Sequence[frozenset[int]], judged_by: str) -> list[Divergence]:
        """Return the divergence on a portion of the held-out questions without each of the sets.

        Each is folded once; the original's states are shared by all.
        """
        self._fold([drop for drop in sets if drop not in self.known])
        number = self.held_out.questions.portion(judged_by)
        return self.held_out.judge([self.known[drop] for drop in sets], number)

    def _fold(self, sets: Sequence[frozenset[int]]) -> None:
        if not sets:
            return
        number = self.held_out.questions.portion("fold_sets")
        batches = list(self.held_out.fit("read for folds", number))
        originals = Originals()
        for drop in self.held_out.questions.progress(sets, "fold sets of layers", len(sets)):
            plan = make_plan(len(text_decoder(self.model).layers), drop)
            job = FoldJob(
                model=self.model,
                batches=lambda share=1.0: batches,
                plan=plan,
                read=self.read,
                decoder=self.decoder,
                multiplier=self.multiplier,
                originals=originals,
            )
            self.known[drop] = Variant(plan, self._folded(job, batches))

    def _folded(self, job: FoldJob, batches: Iterable[Batch]) -> Folded:
        if self.decoder.unfoldable or not job.plan.drop:  # no fold is exact
            return {}
        return reconstruct(job, Fit(), batches, ["down_proj"])
