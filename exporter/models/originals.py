"""The original's states between layers, of a few batches, for all that goes on from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..data.batches import Batch
from .boundary import Kept, StateStore
from .journal import Sums
from .loading import text_decoder
from .residency import held
from .sweep import Branch, Change, Lane, Passed, after, entered, stepped, store_for, taken_through

ON_DISK_BYTES = 1 << 62  # where they go to disk: its end is met there


@dataclass
class Originals:
    """A few batches, and the original model's states between layers, computed once for all that share them."""

    store: StateStore
    lanes: list[Lane]  # what the layers get for each batch
    free_bytes: int = 0  # bytes of states that may still be kept
    states: dict[tuple[int, int], Kept] = field(default_factory=dict)  # [B, S, D] input of a layer, by batch and layer

    def keep(self, key: tuple[int, int], state: Tensor) -> None:
        """Keep the state of a batch at the input of a layer, as long as there is room."""
        size = state.numel() * state.element_size()
        if key not in self.states and size <= self.free_bytes:
            self.states[key] = self.store.keep(state)
            self.free_bytes -= size

    def at(self, lane: Lane, layer_idx: int) -> Tensor:
        """Return the input of a layer [B, S, D], which is kept."""
        return self.store.read(self.states[lane.number, layer_idx] if layer_idx else lane.branches[0].state)

    def step(self, layer: Any, layer_idx: int) -> None:
        """Take all batches through a layer that is in memory, and keep what comes out."""
        for lane in self.lanes:
            output = stepped(layer, layer_idx, trace=lane.trace, state=self.at(lane, layer_idx), store=self.store)
            self.keep((lane.number, layer_idx + 1), after(layer_idx, lane.trace, output, self.store))

    def told(self) -> list[Any]:
        """Return all states that are kept, each with its batch and layer."""
        return [[*key, self.store.read(kept)] for key, kept in self.states.items()]

    def take_up(self, told: Sequence[Any]) -> None:
        """Keep what another was told of."""
        for number, layer_idx, state in told:
            self.keep((number, layer_idx), state)

    def complete(self, num_layers: int) -> bool:
        """Tell whether the states behind all layers are kept."""
        return all((lane.number, num_layers) in self.states for lane in self.lanes)


@contextlib.contextmanager
def originals_of(model: Any, batches: Iterable[Batch], free_bytes: int = 0) -> Iterator[Originals]:
    """Give batches at the input of the first layer.

    Args:
        free_bytes: bytes of the original's states that may be kept for others.
    """
    with store_for(model) as store:
        yield Originals(store, entered(model, enumerate(batches), store), free_bytes)


def with_all_states(model: Any, originals: Originals) -> None:
    """Compute the original's states at all boundaries in one pass."""
    layers = text_decoder(model).layers
    for layer_idx, layer in enumerate(layers):
        with held(layer, following=layers[layer_idx + 1] if layer_idx + 1 < len(layers) else None):
            originals.step(layer, layer_idx)


def sweep_on(
    model: Any, originals: Originals, changes: Sequence[Change], along: Originals | None = None
) -> Iterator[Passed]:
    """Take batches through the layers of several variants, from the first layer that one of them changes.

    What is yielded is what `sweep` yields, bit for bit. Where no states are kept yet, the first variant is the
    original: all begin before the first layer, and its states are kept.

    Args:
        along: batches that the original is to run on as well, in the same pass.
    """
    num_layers, first = len(text_decoder(model).layers), not originals.states
    start = 0 if first else _parting(originals, changes, num_layers)
    store, numbers = originals.store, list(range(len(changes)))
    lanes = []
    for lane in originals.lanes:
        state = store.keep(originals.at(lane, start))
        lanes.append(Lane(lane.number, lane.batch, lane.trace, [Branch(numbers, state, state)]))

    def seen(lane: Lane, layer_idx: int, state: Tensor, output: Tensor) -> None:
        if first and layer_idx:
            originals.keep((lane.number, layer_idx), state)

    beside = None if along is None else along.step
    kept = [some for some in (originals, along) if some is not None]

    def take_up(told: Sequence[Any]) -> None:
        for some, states in zip(kept, told, strict=False):
            some.take_up(states)

    sums = Sums("originals", lambda: [some.told() for some in kept] if first or along is not None else [], take_up)
    yield from taken_through(
        model,
        range(start, num_layers),
        lanes=lanes,
        changes=changes,
        store=store,
        seen=seen,
        beside=beside,
        sums=sums,
    )


def _parting(originals: Originals, changes: Sequence[Change], num_layers: int) -> int:
    """Return the first layer that a variant changes, or one before it where the model adds nothing to what comes out.

    A variant without all later layers puts out what the layer before put out, nothing added; what is kept is with it.
    """
    start = min((min(change.leave_out, default=num_layers) for change in changes), default=num_layers)
    start = min(start, num_layers - 1)
    while start and any(start - 1 in lane.trace.added for lane in originals.lanes):
        start -= 1
    return start
