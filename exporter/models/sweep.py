"""Layers outside, batches inside: a layer is there once for all batches and all variants, and then let go.

What is in memory as a whole goes one batch after the other, so that its activations stay few. What is read from disk
keeps the states of all batches at the boundary between two layers (boundary.py), loads a layer (residency.py), takes
all of them through it and drops it: the weights are read once for each pass, whatever the number of questions. Both are
this code, and compute the same in the same order.

Variants of the model run side by side. They share every layer up to where they part.

Shapes: B samples, S tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..plan import Folded
from .boundary import Kept, StateStore
from .journal import Sums
from .loading import text_decoder
from .replay import Trace, replaced, trace
from .residency import held, ranges_of

OFF, PLAIN = -2, -1  # what a variant does at a layer: leaves it out, runs it as it is, or (0 and up) with its own fold


@dataclass(frozen=True)
class Change:
    """What a variant leaves out, and the tensors that it has in place of the model's own."""

    leave_out: frozenset[int] = frozenset()
    folded: Folded = field(default_factory=dict)

    def at(self, layer_idx: int, number: int) -> int:
        """Return OFF, PLAIN or the variant's own number, which stands for its own tensors."""
        if layer_idx in self.leave_out:
            return OFF
        return number if any(layer == layer_idx for layer, _ in self.folded) else PLAIN

    def of_layer(self, layer_idx: int) -> Folded:
        return {key: tensor for key, tensor in self.folded.items() if key[0] == layer_idx}


ORIGINAL = Change()


@dataclass
class Branch:
    """Variants that were the same so far, in one batch."""

    numbers: list[int]
    state: Kept  # [B, S, D] that the next layer gets
    output: Kept  # [B, S, D] of the last layer that ran, before what the model adds
    gone: int = 0  # variants that have gone on

    def give_up(self, variants: int, store: StateStore) -> None:
        """Count variants that have gone on from here; behind the last one nothing is kept any more."""
        self.gone += variants
        if self.gone == len(self.numbers):
            self.drop_from(store)

    def drop_from(self, store: StateStore) -> None:
        store.drop(self.state)
        if self.output is not self.state:
            store.drop(self.output)


@dataclass
class Lane:
    """One batch on its way through the layers."""

    number: int
    batch: Any  # Batch or AnsweredBatch, without what the vision tower was given
    trace: Trace  # what the layers get beside the state, parked in the store
    branches: list[Branch]

    @property
    def plain(self) -> Batch:
        batch: Batch = getattr(self.batch, "batch", self.batch)
        return batch


@dataclass(frozen=True)
class Passed:
    """A batch behind the last layer."""

    number: int
    batch: Any  # as it came, without inputs
    outputs: Callable[[], Iterator[tuple[int, Tensor]]]  # of each variant: its number, its last output [B, S, D]


Seen = Callable[[Lane, int, Tensor, Tensor], object]  # the original at one layer: lane, layer, its input, its output
Beside = Callable[[Any, int], object]  # what runs in a layer beside all this: the layer, its number


def sweep(
    model: Any,
    batches: Iterable[Any],
    changes: Sequence[Change] = (ORIGINAL,),
    *,
    before: Callable[[Batch], object] = lambda batch: None,
    seen: Seen = lambda lane, layer_idx, state, output: None,
    stop: int | None = None,
    sums: Sums | None = None,
) -> Iterator[Passed]:
    """Take batches through the layers of several variants; yield each batch with the last outputs.

    Args:
        batches: Batch or AnsweredBatch.
        before: called with a batch before each of its steps, and before it enters.
        seen: called with each step of the variants that are as the model is so far, the first of `changes` among them.
        stop: the first layer that does not run any more; None: all run.
        sums: what `seen` has taken, so that a pass that was broken off can go on.
    """
    last = len(text_decoder(model).layers) if stop is None else stop
    ranges = ranges_of(model)
    numbered = enumerate(batches)
    for chunk in [numbered] if ranges is not None else ([numbered_batch] for numbered_batch in numbered):
        with store_for(model) as store:
            lanes = entered(model, chunk, store=store, variants=len(changes), before=before)
            yield from taken_through(
                model, range(last), lanes=lanes, changes=changes, store=store, before=before, seen=seen, sums=sums
            )


def sweeping(
    model: Any,
    batches: Iterable[Any],
    *,
    before: Callable[[Batch], object],
    seen: Seen,
    stop: int,
    sums: Sums,
) -> Iterator[tuple[int, ...]]:
    """Take batches through the layers of the original as `sweep` does, asking for each layer before it runs.

    Nothing is asked for, and nobody may run beside, where all layers are in memory.
    """
    if ranges_of(model) is None:
        for _ in sweep(model, batches, before=before, seen=seen, stop=stop):
            pass
        return
    with store_for(model) as store:
        lanes = entered(model, enumerate(batches), store=store, before=before)
        left, behind = _bookmarked(model, range(stop), lanes, changes=(ORIGINAL,), store=store, sums=sums)
        for layer_idx in left:
            yield (layer_idx,)
            _through(
                model, layer_idx, lanes=lanes, changes=(ORIGINAL,), store=store,
                before=before, seen=seen, beside=None, last=stop,
            )  # fmt: skip
            behind(layer_idx)


def taken_through(
    model: Any,
    layers: range,
    lanes: Sequence[Lane],
    changes: Sequence[Change],
    store: StateStore,
    *,
    before: Callable[[Batch], object] = lambda batch: None,
    seen: Seen = lambda lane, layer_idx, state, output: None,
    beside: Beside | None = None,
    sums: Sums | None = None,
) -> Iterator[Passed]:
    """Take batches that have entered through some layers; yield each with the last outputs, of which none stays.

    Args:
        beside: called with each layer that runs while it is in memory, behind all batches.
        sums: what `seen` and `beside` have taken, so that a pass that was broken off can go on.
    """
    left, behind = _bookmarked(model, layers, lanes, changes=changes, store=store, sums=sums)
    for layer_idx in left:
        _through(
            model, layer_idx, lanes=lanes, changes=changes, store=store,
            before=before, seen=seen, beside=beside, last=layers.stop,
        )  # fmt: skip
        behind(layer_idx)
    for lane in lanes:
        yield Passed(lane.number, lane.batch, functools.partial(_outputs, lane, store))
        for branch in lane.branches:
            branch.drop_from(store)


def _bookmarked(
    model: Any, layers: range, lanes: Sequence[Lane], changes: Sequence[Change], store: StateStore, sums: Sums | None
) -> tuple[range, Callable[[int], None]]:
    """Return the layers that are left of a pass, and what is to be called behind each; batches are brought before them.

    All of them, where no run before has kept anything of this pass.
    """
    ranges = ranges_of(model)
    if ranges is None or ranges.journal is None:
        return layers, lambda layer_idx: None
    does = [[sorted(change.leave_out), [[*key, tensor] for key, tensor in change.folded.items()]] for change in changes]
    identity = [layers.start, layers.stop, does, _states(lanes, store)]
    bookmark = ranges.journal.begin("variants" if sums is None else sums.name, identity)
    start = layers.start
    if (kept := bookmark.read()) is not None:
        start = kept["next"]
        _take_states(kept["states"], lanes, store)
        if sums is not None:
            sums.take_up(kept["sums"])

    def behind(layer_idx: int) -> None:
        def told() -> dict[str, Any]:
            taken = None if sums is None else sums.told()
            return {"next": layer_idx + 1, "states": _states(lanes, store), "sums": taken}

        bookmark.keep_if_due(told, last=layer_idx + 1 == layers.stop)

    return range(start, layers.stop), behind


def _states(lanes: Sequence[Lane], store: StateStore) -> list[Any]:
    """Return the branches of all batches with their states."""
    return [
        [
            [branch.numbers, store.read(branch.state), *([] if same else [store.read(branch.output)])]
            for branch in lane.branches
            for same in [branch.output is branch.state]
        ]
        for lane in lanes
    ]


def _take_states(kept: Sequence[Any], lanes: Sequence[Lane], store: StateStore) -> None:
    """Put all batches where they were."""
    for lane, branches in zip(lanes, kept, strict=True):
        for branch in lane.branches:
            branch.drop_from(store)
        lane.branches = []
        for numbers, *states in branches:
            stored = [store.keep(state) for state in states]
            lane.branches.append(Branch(numbers, stored[0], stored[-1]))


def store_for(model: Any) -> StateStore:
    """Return a store with the limit that a model's states have: none where all of the model is in memory."""
    ranges = ranges_of(model)
    return StateStore() if ranges is None else StateStore(ranges.room.for_states, ranges.room)


def entered(
    model: Any,
    batches: Iterable[tuple[int, Any]],
    store: StateStore,
    variants: int = 1,
    before: Callable[[Batch], object] = lambda batch: None,
) -> list[Lane]:
    """Run everything before the first layer: vision tower and embeddings."""
    lanes = []
    for number, batch in batches:
        plain = getattr(batch, "batch", batch).to(model.device)
        before(plain)
        traced = trace(model, plain)
        state = store.keep(traced.entry)
        keywords, added = store.park((traced.keywords, traced.added))
        slim = dataclasses.replace(plain, inputs={})  # what the vision tower was given is large
        if hasattr(batch, "batch"):
            slim = dataclasses.replace(batch, batch=slim)
        branch = Branch(list(range(variants)), state, state)
        lanes.append(Lane(number, slim, Trace(torch.empty(0), keywords, added), [branch]))
    return lanes


def _through(
    model: Any,
    layer_idx: int,
    lanes: Sequence[Lane],
    changes: Sequence[Change],
    store: StateStore,
    *,
    before: Callable[[Batch], object],
    seen: Seen,
    beside: Beside | None,
    last: int,
) -> None:
    """Take all batches and variants through one layer; it is not loaded where all leave it out."""
    layers = text_decoder(model).layers
    work = _parted(lanes, layer_idx, changes)
    following = layers[layer_idx + 1] if layer_idx + 1 < last else None
    runs = beside is not None or any(action != OFF for action in work)
    with held(layers[layer_idx], following=following) if runs else contextlib.nullcontext():
        for action in sorted(work):
            with replaced(model, changes[action].of_layer(layer_idx) if action >= 0 else {}):
                for lane, branch, numbers in work[action]:
                    state = store.read(branch.state)
                    if action == OFF:
                        part = _left_out(branch, numbers, after(layer_idx, lane.trace, state, store), store)
                    else:
                        before(lane.plain)
                        output = stepped(layers[layer_idx], layer_idx, trace=lane.trace, state=state, store=store)
                        if 0 in numbers and action == PLAIN:
                            seen(lane, layer_idx, state, output)
                        part = _behind(numbers, output, after(layer_idx, lane.trace, output, store), store)
                    lane.branches.append(part)
                    branch.give_up(len(numbers), store)
        if beside is not None:
            beside(layers[layer_idx], layer_idx)


def _parted(
    lanes: Sequence[Lane], layer_idx: int, changes: Sequence[Change]
) -> dict[int, list[tuple[Lane, Branch, list[int]]]]:
    """Take the branches of all lanes, and return their parts by what they do at a layer."""
    work: dict[int, list[tuple[Lane, Branch, list[int]]]] = {}
    for lane in lanes:
        for branch in lane.branches:
            parts: dict[int, list[int]] = {}
            for number in branch.numbers:
                parts.setdefault(changes[number].at(layer_idx, number), []).append(number)
            for action, numbers in parts.items():
                work.setdefault(action, []).append((lane, branch, numbers))
        lane.branches = []
    return work


def _behind(numbers: list[int], output: Tensor, state: Tensor, store: StateStore) -> Branch:
    """Return variants behind a layer that ran."""
    kept = store.keep(state)
    return Branch(numbers, kept, kept if state is output else store.keep(output))


def _left_out(branch: Branch, numbers: list[int], state: Tensor, store: StateStore) -> Branch:
    """Return variants behind a layer that did not run: their last output is that of the layer before."""
    return Branch(numbers, store.keep(state), store.keep(store.read(branch.output)))


def stepped(layer: Any, layer_idx: int, trace: Trace, state: Tensor, store: StateStore) -> Tensor:
    """Return what a layer puts out [B, S, D]; what it is given beside the state may be parked in the store."""
    with torch.inference_mode():
        return Trace(state, (store.fetch(trace.keywords[layer_idx]),)).step(layer, 0, state)


def after(layer_idx: int, trace: Trace, output: Tensor, store: StateStore) -> Tensor:
    """Return the state that the next layer gets, [B, S, D]."""
    if layer_idx not in trace.added:
        return output
    with torch.inference_mode():
        state: Tensor = output + store.fetch(trace.added[layer_idx])
        return state


def _outputs(lane: Lane, store: StateStore) -> Iterator[tuple[int, Tensor]]:
    """Yield the last output of each variant, in their order."""
    branch_of = {number: branch for branch in lane.branches for number in branch.numbers}
    for number in sorted(branch_of):
        yield number, store.read(branch_of[number].output)
