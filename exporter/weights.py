"""Safetensors files as byte ranges: what a checkpoint holds, and copying parts of it without reading them.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COPY_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: absolute byte positions in a file."""

    path: Path
    dtype: str  # safetensors' name: F32, BF16 ...
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Shard:
    path: Path
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]  # in file order


@dataclass(frozen=True)
class Weights:
    """All shards of one checkpoint."""

    shards: tuple[Shard, ...]

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def num_parameters(self) -> int:
        return sum(entry.num_parameters for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the checkpoint's own dtype."""
        from safetensors import safe_open

        with safe_open(self.entries[name].path, framework="pt") as file:
            return file.get_tensor(name)


def read_shard(path: Path) -> Shard:
    """Parse one file's header and check it against the file's length. Raises InputError where they disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise InputError(f"{path} is no safetensors file: its header would be {length} of its {size} bytes.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {
                name: TensorEntry(
                    path, spec["dtype"], tuple(spec["shape"]), *(8 + length + offset for offset in spec["data_offsets"])
                )
                for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} has a damaged safetensors header ({error}). Download it again.") from error
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size != expected:
        raise InputError(
            f"{path} has {size:,} bytes, its header promises {expected:,}: it is "
            f"{'truncated' if size < expected else 'damaged'}. Download it again."
        )
    return Shard(path, metadata, entries)


def open_weights(folder: Path) -> Weights:
    """The checkpoint in a folder: `model.safetensors`, or the shards that its index names."""
    index_path = folder / INDEX
    if not index_path.exists():
        single = folder / SINGLE
        if single.exists():
            return Weights((read_shard(single),))
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise InputError(
                f"{folder} holds pickled weights only (.bin/.pt), which can run code when read. Convert it once with "
                "transformers: AutoModelForImageTextToText.from_pretrained(X).save_pretrained(Y)."
            )
        raise InputError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}.")
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{index_path} is no index of safetensors shards ({error!r}).") from error
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing)}.")
    shards = tuple(read_shard(folder / name) for name in names)
    held = {name: shard.path.name for shard in shards for name in shard.entries}
    wrong = [name for name, file in weight_map.items() if held.get(name) != file]
    if wrong:
        raise InputError(
            f"{index_path} is wrong about {len(wrong)} of {len(weight_map)} tensors: '{wrong[0]}' is not in "
            f"{weight_map[wrong[0]]}. Write the index again, or download the checkpoint again."
        )
    unlisted = [name for name in held if name not in weight_map]
    if unlisted:
        raise InputError(
            f"{index_path} leaves out {len(unlisted)} tensors that the shards hold, '{unlisted[0]}' among them. "
            "Write the index again, or download the checkpoint again."
        )
    return Weights(shards)


def copy_range(source: int, target: int, begin: int, count: int, advance: Callable[[int], object]) -> None:
    """Append `count` bytes from `begin` of an open file to another; the kernel copies where it can.

    Args:
        source, target: file descriptors.
        advance: called with the bytes done since the last call (a progress bar).
    """
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(count, COPY_CHUNK_BYTES), offset_src=begin)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    in_kernel = False
                    continue
                raise
        else:
            done = write_all(target, os.pread(source, min(count, COPY_CHUNK_BYTES), begin))
        if done == 0:
            raise OSError(f"the source ended {count} bytes early while it was copied")
        begin, count = begin + done, count - done
        advance(done)


def write_all(target: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)


def _errnos(*names: str) -> frozenset[int]:
    import errno

    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_NO_KERNEL_COPY = _errnos("EXDEV", "ENOSYS", "EOPNOTSUPP", "EINVAL", "EPERM")


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to be written: bytes of an existing file, or a new tensor."""

    name: str
    entry: TensorEntry
    replacement: torch.Tensor | None = None


def write_shard(path: Path, pieces: list[Piece], metadata: dict[str, str], advance: Callable[[int], object]) -> None:
    """Write one safetensors file. Unchanged tensors are copied as bytes, adjacent ones in one go.

    Memory does not grow with the file: at most one replaced tensor is held beside what the caller holds.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.entry.dtype,
            "shape": list(piece.entry.shape),
            "data_offsets": [position, position + piece.entry.num_bytes],
        }
        position += piece.entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as target:
        write_all(target.fileno(), struct.pack("<Q", len(text)) + text)
        for run in _adjacent(pieces):
            if run[0].replacement is not None:
                write_all(target.fileno(), tensor_bytes(run[0].replacement))
                advance(run[0].entry.num_bytes)
                continue
            begin, end = run[0].entry.begin, run[-1].entry.end
            with run[0].entry.path.open("rb") as source:
                copy_range(source.fileno(), target.fileno(), begin, end - begin, advance)


def _adjacent(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Group pieces that lie side by side in the same source file; a replaced tensor stands alone."""
    run: list[Piece] = []
    for piece in pieces:
        joins = (
            run
            and piece.replacement is None
            and run[-1].replacement is None
            and run[-1].entry.path == piece.entry.path
            and run[-1].entry.end == piece.entry.begin
        )
        if not joins and run:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
