"""Batches that go through the original and the smaller model together, and where they are, for a run that goes on.

Shapes: B samples, S tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.boundary import Kept, StateStore
from ..models.journal import Bookmark
from ..models.residency import ranges_of
from ..models.sweep import Lane, after, stepped
from ..plan import Folded


@dataclass
class Stream:
    """One batch at the boundary between two layers, in the original and in the smaller model."""

    lane: Lane
    store: StateStore
    weights: Tensor  # [B, S] of the tokens in the regressions; 0 for those that don't count
    half: Tensor  # [B] bool: the half of the pictures that each question belongs to
    num_batches: int  # batches that there are, in all processes
    kept: dict[str, Kept] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """Return a state: 'original' and 'smaller' [B, S, D]; of the layer that is refitted, with its old down_proj,
        the 'output' [B, S, D], and 'inner' [B, S, I], the input of that down_proj.
        """
        return self.store.read(self.kept[name])

    def __setitem__(self, name: str, state: Tensor) -> None:
        self.forget(name)
        self.kept[name] = self.store.keep(state)

    def forget(self, *names: str) -> None:
        for name in names:
            if name in self.kept:
                self.store.drop(self.kept.pop(name))

    def step(self, layer: Any, layer_idx: int, state: Tensor) -> Tensor:
        return stepped(layer, layer_idx, trace=self.lane.trace, state=state, store=self.store)

    def after(self, layer_idx: int, output: Tensor) -> Tensor:
        return after(layer_idx, self.lane.trace, output, self.store)


def bookmark_of(model: Any, does: list[Any], streams: Sequence[Stream]) -> Bookmark | None:
    """Return the bookmark of a reconstruction; None where all layers are in memory, or nothing is kept."""
    ranges = ranges_of(model)
    if ranges is None or ranges.journal is None:
        return None
    return ranges.journal.begin("reconstruction", [does, [stream["original"] for stream in streams]])


def taken_up(bookmark: Bookmark, streams: Sequence[Stream], folded: Folded) -> int | None:
    """Go on from what a run before has kept: return the layer at whose input both models are; None: it kept nothing."""
    if (told := bookmark.read()) is None:
        return None
    for stream, (original, smaller) in zip(streams, told["streams"], strict=True):
        stream["original"], stream["smaller"] = original, smaller
    folded.update({(layer_idx, name): tensor for layer_idx, name, tensor in told["folded"]})
    return int(told["reached"])


def told(streams: Sequence[Stream], folded: Folded, reached: int) -> dict[str, Any]:
    """Return where a reconstruction is, for a run that goes on from here later."""
    return {
        "reached": reached,
        "streams": [[stream["original"], stream["smaller"]] for stream in streams],
        "folded": [[*key, tensor] for key, tensor in folded.items()],
    }
