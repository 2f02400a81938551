"""States of many batches at the boundary between two layers: in memory up to a limit, beyond it in a file.

A file is read and written by positions, in place of a memory map, so that a full disk is a sentence and no crash, and
what is in memory is what was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.safetensors_ranges import fill
from ..checkpoints.temporary import temporary_folder
from ..errors import InputError
from .room import Room


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the file."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


Kept = Tensor | Slot


@dataclass(frozen=True)
class Emptied:
    """Memory of a tensor that others hold, and where what was in it lies."""

    storage: torch.UntypedStorage
    kept: Kept
    num_bytes: int


def _block_bytes(size: int) -> int:
    """Return the bytes of a place for so many, up to an eighth more: caches grow, and mostly stay in their places."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


class StateStore(contextlib.ExitStack):
    """Keeps tensors until they are dropped; a context, whose end removes the file.

    Args:
        limit: bytes that may be kept in memory; None: any number.
        room: of which these are taken, where other stores and layers share it.
    """

    def __init__(self, limit: int | None = None, room: Room | None = None) -> None:
        super().__init__()
        self.limit, self.room = limit, room
        self.callback(self._leave)
        self.in_memory = self.in_file = 0
        self._file: int | None = None
        self._folder = Path()
        self._end = 0
        self._free: dict[int, list[int]] = {}  # offsets by their block size, given up

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor. Raises: InputError where the disk is full."""
        size = tensor.numel() * tensor.element_size()
        if self._fits(size):
            self.in_memory += size
            return tensor
        block = _block_bytes(size)
        free = self._free.get(block)
        begin = free.pop() if free else self._end
        self._end = max(self._end, begin + block)
        slot = Slot(begin, tensor.shape, tensor.dtype, tensor.device)
        there = tensor.detach().cpu().contiguous()
        self._write(memoryview((ctypes.c_char * size).from_address(there.data_ptr())).cast("B"), begin)
        self.in_file += size
        return slot

    def _fits(self, size: int) -> bool:
        """Tell whether so many bytes may stay in memory, and take them of the room."""
        if self.limit is not None and self.in_memory + size > self.limit:
            return False
        return self.room is None or self.room.take(size)

    def _leave(self) -> None:
        if self.room is not None:
            self.room.give_back(self.in_memory)
        self.in_memory = 0

    def read(self, kept: Kept) -> Tensor:
        """Return a tensor that is kept."""
        if isinstance(kept, Tensor):
            return kept
        buffer = torch.empty(kept.num_bytes, dtype=torch.uint8)
        if not fill(self._opened(), buffer, kept.begin):
            raise OSError(f"{self._folder} ended early")
        return buffer.view(kept.dtype).reshape(kept.shape).to(kept.device)

    def drop(self, kept: Kept) -> None:
        """Give the place of a tensor up."""
        if isinstance(kept, Tensor):
            size = kept.numel() * kept.element_size()
            self.in_memory -= size
            if self.room is not None:
                self.room.give_back(size)
            return
        self.in_file -= kept.num_bytes
        self._free.setdefault(_block_bytes(kept.num_bytes), []).append(kept.begin)

    def park(self, value: Any, known: dict[int, Any] | None = None) -> Any:
        """Return a nest of dicts, tuples and lists with its tensors kept, each once, however often it stands there."""
        known = {} if known is None else known
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = self.keep(value)
            return known[id(value)]
        if isinstance(value, dict):
            return {key: self.park(item, known) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.park(item, known) for item in value)
        return value

    def fetch(self, value: Any) -> Any:
        """Return what was parked, with its tensors."""
        if isinstance(value, Slot):
            return self.read(value)
        if isinstance(value, dict):
            return {key: self.fetch(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.fetch(item) for item in value)
        return value

    def empty(self, values: Iterable[Any]) -> list[Emptied]:
        """Count tensors that somebody else holds as kept; beyond the limit, their memory is emptied until `fill`.

        Args:
            values: those of them that are tensors are meant.
        """
        emptied: dict[int, Emptied] = {}
        for tensor in values:
            if not isinstance(tensor, Tensor) or not tensor.untyped_storage().nbytes():
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in emptied:
                continue
            size, pointer = storage.nbytes(), storage.data_ptr()
            kept = self.keep(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            if isinstance(kept, Slot):
                storage.resize_(0)
            emptied[pointer] = Emptied(storage, kept, size)
        return list(emptied.values())

    def fill(self, emptied: Emptied) -> None:
        """Give a tensor its memory back, with what was in it."""
        if isinstance(emptied.kept, Slot):
            emptied.storage.resize_(emptied.num_bytes)
            there = torch.empty(0, dtype=torch.uint8, device=emptied.kept.device).set_(emptied.storage)
            there.copy_(self.read(emptied.kept))
        self.drop(emptied.kept)

    def forget(self, emptied: Emptied) -> None:
        """Give up what nobody will fill any more."""
        self.drop(emptied.kept)

    def _opened(self) -> int:
        if self._file is None:
            self._folder = self.enter_context(temporary_folder("states", "the folder for states between layers"))
            self._file = os.open(self._folder / "states", os.O_RDWR | os.O_CREAT)
            self.callback(os.close, self._file)
        return self._file

    def _write(self, view: memoryview, begin: int) -> None:
        file = self._opened()
        try:
            while view:
                done = os.pwrite(file, view, begin)
                view, begin = view[done:], begin + done
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"the disk of {self._folder.parent} is full: the states between layers take over "
                f"{self.in_file / 1e9:.2f} GB there. Take fewer --samples, allow more --memory, or set TMPDIR to "
                "another disk."
            ) from error
