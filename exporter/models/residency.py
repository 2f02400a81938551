"""Parts of a model that lie on disk: read once for all batches that go through them, and then let go.

accelerate reads a module's weights from disk each time that it runs. That stays so for whoever runs the model as a
whole; who runs a layer for many batches holds it meanwhile. Weights come from their byte ranges in the checkpoint's own
files, straight into memory, the next layer's while this one runs. As many as there is room for stay (room.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.safetensors_ranges import TensorEntry, Weights, read_tensor
from ..errors import InputError
from .journal import Journal
from .room import InMemory, Room

Loaded = list[tuple[Any, Any, dict[str, Tensor]]]  # module, its hook, its weights by name


@dataclass(eq=False)
class Ranges(Mapping[str, Tensor]):
    """The weights that were left on disk, by their names in memory."""

    index: Any  # accelerate's: the file and the name there
    weights: Weights
    name: str  # of the checkpoint, for messages
    room: Room  # that layers and states between them have in memory
    numbers: dict[int, int]  # of the layers, in the order in which they run, by identity
    bytes_read: int = 0  # of weights, in all
    journal: Journal | None = None  # of passes, that a run which is broken off goes on from
    _checked: set[str] = field(default_factory=set)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def count(self, num_bytes: int) -> None:
        """Count bytes that were read; a thread that reads ahead does so too."""
        with self._counting:
            self.bytes_read += num_bytes

    def entry(self, name: str) -> TensorEntry | None:
        """Return where a weight lies in the checkpoint; None where it was put together when it was loaded."""
        place = self.index.index.get(name, {})
        entry = self.weights.entries.get(place.get("weight_name", ""))
        return entry if entry is not None and str(entry.path) == str(place.get("safetensors_file")) else None

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entry(name)
        if entry is None:
            tensor: Tensor = self.index[name]
            self.count(tensor.numel() * tensor.element_size())
        else:
            tensor = read_tensor(entry).to(getattr(torch, self.index.index[name]["dtype"]))
            self.count(entry.num_bytes)
        if name not in self._checked:
            if not tensor.isfinite().all():
                raise InputError(f"{self.name}: tensor {name} holds NaN or infinite values. Download it again.")
            self._checked.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def read_by_ranges(model: Any, layers: Any, weights: Weights, name: str, room: Room) -> Ranges | None:
    """Let all that was left on disk be read from the checkpoint's byte ranges; None where nothing was."""
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    ranges: Ranges | None = None
    for _, hook in _offloaded(model):
        if ranges is None:
            ranges = Ranges(hook.weights_map.dataset, weights, name, room=room, numbers=numbers)
            ranges.bytes_read = weights.num_bytes - sum(entry.num_bytes for entry in map(ranges.entry, ranges) if entry)
        hook.weights_map.dataset = ranges
    return ranges


def ranges_of(model: Any) -> Ranges | None:
    """Return what is read from disk for a model; None where all of it is in memory."""
    offloaded = next(iter(_offloaded(model, held_too=True)), None)
    dataset = getattr(offloaded[1].weights_map, "dataset", None) if offloaded else None
    return dataset if isinstance(dataset, Ranges) else None


def _offloaded(part: Any, held_too: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield the modules of a part whose weights are on disk, each with its hook."""
    for module in part.modules():
        hook = getattr(module, "_hf_hook", None)
        for inner in getattr(hook, "hooks", (hook,)):
            if not hasattr(getattr(inner, "weights_map", None), "dataset"):
                continue
            if inner is not None and (inner.offload or (held_too and getattr(inner, "held", False))):
                yield module, inner


def _read(part: Any) -> Loaded:
    loaded = []
    for module, hook in _offloaded(part):
        names = [name for name, tensor in module._parameters.items() if tensor is not None]
        loaded.append((module, hook, {name: hook.weights_map[name] for name in names}))
    return loaded


class _Ahead:
    """Reads at most one part while another one runs."""

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.part: Any = None
        self.future: Future[Loaded] | None = None

    def begin(self, part: Any) -> None:
        if part is self.part or next(_offloaded(part), None) is None:
            return
        self.forget()
        self.pool = self.pool or ThreadPoolExecutor(1, "read-ahead")
        self.part, self.future = part, self.pool.submit(_read, part)

    def take(self, part: Any) -> Loaded:
        if part is not self.part or self.future is None:
            return _read(part)
        future, self.part, self.future = self.future, None, None
        return future.result()

    def forget(self) -> None:
        if self.future is not None:
            self.future.cancel()
        self.part = self.future = None


_ahead = _Ahead()


@contextlib.contextmanager
def held(*parts: Any, following: Any = None) -> Iterator[None]:
    """Keep the weights of some parts of a model in memory; what is there already, or held already, is left alone.

    Args:
        following: the part that is wanted next: it is read meanwhile.
    """
    using = [used for part in parts if (used := _in_memory(part)) is not None]
    if following is not None:
        _ahead.begin(following)
    try:
        yield
    except BaseException:
        forget_ahead()
        raise
    finally:
        for room, kept in using:
            kept.users -= 1
            room.make(0)  # more may have been in use than there is room for


def _in_memory(part: Any) -> tuple[Room, InMemory] | None:
    """Read what of a part is on disk, and return it with a user more; None where it was never left on disk."""
    hook = next((hook for _, hook in _offloaded(part, held_too=True)), None)
    if hook is None:
        return None
    ranges: Ranges = hook.weights_map.dataset
    kept = ranges.room.layers.setdefault(id(part), InMemory(ranges.numbers.get(id(part), 0)))
    kept.users += 1
    try:
        for read in (_ahead.take, _read):  # of what was read ahead, something that stayed may have gone since
            for module, its_hook, tensors in read(part):
                ranges.room.make(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
                kept.add(module, its_hook, tensors)
    except BaseException:
        kept.users -= 1
        raise
    return ranges.room, kept


def let_go(*parts: Any) -> None:
    """Leave on disk what is kept of some parts of a model for later, or read ahead of it; what is held stays."""
    for part in parts:
        for _, hook in list(_offloaded(part, held_too=True)):
            kept: InMemory | None = getattr(hook, "kept", None)
            if kept is None:
                forget_ahead()
            elif not kept.users:
                kept.let_go(hook)


def forget_ahead() -> None:
    """Let go what was read ahead and is not wanted any more."""
    _ahead.forget()


def beside_layers(model: Any, layers: Any) -> dict[str, Any]:
    """Return the parts of a model that are no decoder layers, by name: the largest ones that hold none."""
    parts: dict[str, Any] = {}

    def add(module: Any, prefix: str) -> None:
        parts.update({f"{prefix}{name}": parameter for name, parameter in module._parameters.items()})
        for name, child in module.named_children():
            if child is layers:
                continue
            if any(inner is layers for inner in child.modules()):
                add(child, f"{prefix}{name}.")
            else:
                parts[f"{prefix}{name}"] = child

    add(model, "")
    return parts
