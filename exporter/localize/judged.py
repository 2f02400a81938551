"""Hold what sets of layers were judged to lose, so that a run that goes on from another asks no more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.divergence import Divergence
from .job import SetLoss

JudgingRound = tuple[str, tuple[frozenset[int], ...]]  # by which questions, and which sets


@dataclass
class JudgedSets:
    """Losses of sets of layers without a fold, and divergences of those that were folded, in rounds."""

    losses: dict[frozenset[int], float] = field(default_factory=dict)
    rounds: dict[JudgingRound, list[Divergence]] = field(default_factory=dict)
    on_more: Callable[[], object] = lambda: None  # called when some were judged

    def note_losses(self, sets: Sequence[frozenset[int]], losses: Sequence[float]) -> None:
        self.losses.update(zip(sets, losses, strict=True))
        self.on_more()

    def note_round(self, judging: JudgingRound, divergences: list[Divergence]) -> None:
        self.rounds[judging] = divergences
        self.on_more()

    def to_data(self) -> Any:
        """Return it as JSON holds it."""
        return {
            "losses": [[sorted(layers), loss] for layers, loss in self.losses.items()],
            "rounds": [
                [judged_by, [sorted(layers) for layers in sets], [divergence.to_state() for divergence in divergences]]
                for (judged_by, sets), divergences in self.rounds.items()
            ],
        }

    def go_on_from(self, data: Any) -> None:
        """Take what another run has judged."""
        self.losses.update((frozenset(layers), loss) for layers, loss in data["losses"])
        for judged_by, sets, divergences in data["rounds"]:
            judging = judged_by, tuple(map(frozenset, sets))
            self.rounds[judging] = list(map(Divergence.from_state, divergences))


@dataclass(frozen=True)
class KeptLoss:
    """A SetLoss that is made when a set is asked for that was not judged before."""

    make: Callable[[], SetLoss]
    num_layers: int
    judged: JudgedSets

    @functools.cached_property
    def _loss(self) -> SetLoss:
        return self.make()

    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]:
        fresh = [layers for layers in sets if layers not in self.judged.losses]
        if fresh:
            self.judged.note_losses(fresh, self._loss.of_sets(fresh))
        return [self.judged.losses[layers] for layers in sets]
