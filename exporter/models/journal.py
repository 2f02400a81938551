"""What a pass over layers on disk has come to, kept behind a finished layer: a run that was killed goes on there.

A pass is known by what goes into it: the run's fingerprint, what is done, and the states at its first layer. What is
kept of it are the states behind a layer and the sums taken so far, in a file whose SHA-256 an index names. Files are
written whole and then named, and take a tenth of the time at most. Behind its last layer a pass stays until what it was
made for is kept elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import replace_text, sha256
from ..checkpoints.safetensors_ranges import replace_tensors

logger = logging.getLogger(__name__)
INDEX, PREFIX, SUFFIX = "passes.json", "pass-", ".safetensors"
EVERY_S = 30.0  # that a pass is kept, at most
SHARE = 10  # of the time it takes to keep it, that go by before it is kept again
FULL = (errno.ENOSPC, errno.EDQUOT)
DATA = "data"


@dataclass(frozen=True)
class Sums:
    """What a pass takes on its way, beside the states of its batches: how it is told, and given back."""

    name: str
    told: Callable[[], Any]  # a nest of dicts, lists, numbers, texts and tensors
    take_up: Callable[[Any], object]


@dataclass
class Journal:
    """The passes of one run, in its folder.

    Args:
        fingerprint: of all that the run's result depends on; what another run kept is not used.
    """

    folder: Path
    fingerprint: str
    kept: dict[str, list[str]] = field(default_factory=dict)  # of each pass: its file, the SHA-256, what it is

    def __post_init__(self) -> None:
        try:
            index = json.loads((self.folder / INDEX).read_text())
            same, passes = index["fingerprint"] == self.fingerprint, index["passes"]
            self.kept = {str(key): [str(part) for part in told] for key, told in passes.items()} if same else {}
            same = same and all(len(told) == len(("file", "SHA-256", "what")) for told in self.kept.values())
        except FileNotFoundError:
            same = True
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            same = False
        if not same:
            logger.warning("%s is of another recipe, model or version, or damaged: it is not used", self.folder / INDEX)
            self.kept = {}
        self._sweep()

    def begin(self, what: str, identity: Any) -> Bookmark:
        """Return the bookmark of a pass, by what is done and all that goes into it."""
        return Bookmark(self, what, digest([self.fingerprint, what, identity]))

    def clear(self, but: str = "") -> None:
        """Keep no pass any more, or none but those that do something."""
        if stale := [key for key, told in self.kept.items() if not but or told[2] != but]:
            for key in stale:
                del self.kept[key]
            self.write()

    def write(self) -> None:
        """Write the index, and remove what it does not name."""
        replace_text(self.folder / INDEX, json.dumps({"fingerprint": self.fingerprint, "passes": self.kept}))
        self._sweep()

    def _sweep(self) -> None:
        named = {name for name, *_ in self.kept.values()}
        for path in self.folder.glob(f"{PREFIX}*{SUFFIX}"):
            if path.name not in named:
                path.unlink()


@dataclass
class Bookmark:
    """Where a pass is, on disk."""

    journal: Journal
    what: str  # is done
    key: str

    def __post_init__(self) -> None:
        self._wait, self._begin, self._number = EVERY_S, time.monotonic(), 0
        self._last = self._begin

    def read(self) -> Any:
        """Return what a run before has kept of this pass; None where there is nothing, or it is damaged."""
        from safetensors import safe_open

        if self.key not in self.journal.kept:
            return None
        name, told, _ = self.journal.kept[self.key]
        path = self.journal.folder / name
        if not path.is_file() or sha256(path) != told:
            logger.warning("%s is not what was written there: this pass over the layers begins anew", path)
            return None
        logger.warning("%s: goes on within a pass over the layers that a run before has begun", self.journal.folder)
        self._number = 1 + int(name.removesuffix(SUFFIX).rpartition("-")[2])
        with safe_open(path, framework="pt") as file:
            return nested(json.loads(file.metadata()[DATA]), file.get_tensor)

    def keep_if_due(self, told: Callable[[], Any], last: bool = False) -> None:
        """Keep where a pass is, if the last time is long enough ago; behind its last layer, if the pass was long."""
        begin = time.monotonic()
        if begin - self._last < self._wait and not (last and begin - self._begin >= EVERY_S):
            return
        name = f"{PREFIX}{self.key[:16]}-{self._number}{SUFFIX}"
        path, tensors = self.journal.folder / name, dict[str, Tensor]()
        try:
            replace_tensors(path, tensors, {DATA: json.dumps(flat(told(), tensors))})
            self.journal.kept[self.key] = [name, sha256(path), self.what]
            self.journal.write()
        except OSError as error:
            if error.errno not in FULL:
                raise
            logger.warning("%s can't be kept, since the disk is full: a run that is broken off does it again", path)
        self._number += 1
        self._last = time.monotonic()
        self._wait = max(EVERY_S, SHARE * (self._last - begin))


def flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a nest as JSON, and put its tensors beside it."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, dict):
        return {"dict": [[key, flat(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [flat(item, tensors) for item in value]
    return value


def nested(data: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """Return the nest that JSON stands for; tuples became lists."""
    if isinstance(data, list):
        return [nested(item, tensor_of) for item in data]
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return tensor_of(data["tensor"]).to(data["device"])
    return {key: nested(item, tensor_of) for key, item in data["dict"]}


def digest(value: Any) -> str:
    """Return the SHA-256 of a nest."""
    tensors: dict[str, Tensor] = {}
    hashed = hashlib.sha256(json.dumps(flat(value, tensors), default=str).encode())
    for tensor in tensors.values():
        hashed.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
