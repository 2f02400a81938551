"""Safetensors files as byte ranges: what a checkpoint holds, and copying parts of it without reading them.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import functools
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .temporary import file_beside

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COPY_CHUNK_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
TORCH_NAMES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor: absolute byte positions in a file."""

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
        """Return one tensor, on the CPU, in the checkpoint's own dtype."""
        from safetensors import safe_open

        with safe_open(self.entries[name].path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor in the checkpoint's own dtype, read from its byte range into memory of its own."""
    import torch

    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    with entry.path.open("rb", buffering=0) as file:
        if not fill(file.fileno(), buffer, entry.begin):
            raise InputError(f"{entry.path} is shorter than it was: it changes while it is read.")
    return buffer.view(getattr(torch, TORCH_NAMES[entry.dtype])).reshape(entry.shape)


def fill(descriptor: int, buffer: torch.Tensor, begin: int) -> bool:
    """Fill a tensor of bytes from an open file, from position `begin` on. Returns: False where the file ends before."""
    view = buffer.numpy().data
    while view:
        done = os.preadv(descriptor, [view], begin)
        if not done:
            return False
        view, begin = view[done:], begin + done
    return True


def same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Tell whether two tensors are equal bit for bit; a chunk of each is in memory at a time."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as first_file, second.path.open("rb") as second_file:
        first_file.seek(first.begin)
        second_file.seek(second.begin)
        left = first.num_bytes
        while left:
            size = min(left, COPY_CHUNK_BYTES)
            if first_file.read(size) != second_file.read(size):
                return False
            left -= size
    return True


def read_shard(path: Path) -> Shard:
    """Parse one file's header and check it as strictly as safetensors does. Raises InputError for all that is wrong."""
    header, start, size = read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is no object of texts")
    entries = sorted((_entry(path, name, spec, start) for name, spec in header.items()), key=lambda item: item[1].begin)
    position = start
    for name, entry in entries:
        if entry.begin != position:
            raise _damaged(path, f"'{name}' begins at byte {entry.begin:,}, where byte {position:,} is due")
        position = entry.end
    if size != position:
        raise InputError(
            f"{path} has {size:,} bytes, its header promises {position:,}: it is "
            f"{'truncated' if size < position else 'damaged'}. Download it again."
        )
    return Shard(path, metadata, dict(entries))


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the JSON of a safetensors file's header, where its data begin, and the file's size in bytes."""
    if not path.is_file():  # a pipe would be waited for without end
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, not a safetensors file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == LFS_POINTER[:8]:
            raise InputError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder, or download it again."
            )
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise InputError(f"{path} is no safetensors file: its header would be {length} of its {size} bytes.")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"{length:,} bytes, more than the {MAX_HEADER_BYTES:,} that safetensors reads")
        text = file.read(length)
    try:
        header = json.loads(
            text.decode(), object_pairs_hook=functools.partial(_unique, path), parse_constant=_no_number
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, f"a {type(header).__name__}, not an object")
    return header, 8 + length, size


def _entry(path: Path, name: str, spec: Any, start: int) -> tuple[str, TensorEntry]:
    """Return one tensor of a header, whose bytes must be what its type and shape need."""
    if not isinstance(spec, dict) or not {"dtype", "shape", "data_offsets"} <= set(spec):
        raise _damaged(path, f"'{name}' has no dtype, shape and data_offsets")
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"'{name}' has the dtype {dtype!r}, which safetensors does not know")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"'{name}' has the shape {shape!r} at {offsets!r}")
    needed = prod(shape) * DTYPE_BITS[dtype]
    if needed != 8 * (offsets[1] - offsets[0]):
        raise _damaged(
            path, f"'{name}' ({dtype} {shape}) needs {needed // 8:,} bytes and has {offsets[1] - offsets[0]:,}"
        )
    return name, TensorEntry(
        path=path, dtype=dtype, shape=tuple(shape), begin=start + offsets[0], end=start + offsets[1]
    )


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of the header; a name that stands twice would hide a tensor."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise _damaged(path, f"'{next(name for name in names if names.count(name) > 1)}' stands in it twice")
    return entries


def _no_number(name: str) -> None:
    raise ValueError(f"{name} in it")


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} has a damaged safetensors header ({reason}). Download it again.")


def copy_range(source: int, target: int, begin: int, count: int, advance: Callable[[int], object]) -> None:
    """Append `count` bytes from `begin` of an open file to another; the kernel copies where it can.

    A hole of a sparse file stays one, as `cp` leaves it.

    Args:
        source, target: file descriptors.
        advance: called with the bytes done since the last call (a progress bar).
    """
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        hole, data = _hole_and_data(source, begin)
        if hole:
            done = min(hole, count)
            os.ftruncate(target, os.lseek(target, done, os.SEEK_CUR))
            begin, count = begin + done, count - done
            advance(done)
            continue
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(count, data, COPY_CHUNK_BYTES), offset_src=begin)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    in_kernel = False
                    continue
                raise
        else:
            done = write_all(target, os.pread(source, min(count, data, COPY_CHUNK_BYTES), begin))
        if done == 0:
            raise OSError(f"the source ended {count} bytes early while it was copied")
        begin, count = begin + done, count - done
        advance(done)


def _hole_and_data(file: int, begin: int) -> tuple[int, int]:
    """Return the bytes of a hole at a position of an open file, and those of data where there is none.

    File systems that know no holes say that all is data.
    """
    if not hasattr(os, "SEEK_DATA"):
        return 0, COPY_CHUNK_BYTES
    try:
        data = os.lseek(file, begin, os.SEEK_DATA)
        return data - begin, os.lseek(file, data, os.SEEK_HOLE) - data
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data behind it; at the end of the file there is no hole either
            return max(os.fstat(file).st_size - begin, 0), COPY_CHUNK_BYTES
        return 0, COPY_CHUNK_BYTES


def write_all(target: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return len(data)


def _errnos(*names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_NO_KERNEL_COPY = _errnos("EXDEV", "ENOSYS", "EOPNOTSUPP", "EINVAL", "EPERM")


@dataclass(frozen=True)
class TensorRange:
    """One tensor of a file to be written: bytes of an existing file, or a new tensor."""

    name: str
    entry: TensorEntry
    replacement: torch.Tensor | Callable[[], torch.Tensor] | None = None  # a function makes it when it is written


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[TensorRange]],
    advance: Callable[[int], object] = lambda done: None,
    metadata: Mapping[Path, dict[str, str]] = {},
) -> None:
    """Write model.safetensors, or where there are several shards those and their index.

    Args:
        advance: is told of bytes as they are written.
        metadata: of the files that the shards are made from, which theirs begins with.
    """
    weight_map: dict[str, str] = {}
    for number, pieces in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, pieces, metadata.get(pieces[0].entry.path) or {"format": "pt"}, advance)
        weight_map |= {piece.name: name for piece in pieces}
    entries = [piece.entry for pieces in shards for piece in pieces]
    totals = {
        "total_size": sum(entry.num_bytes for entry in entries),
        "total_parameters": sum(entry.num_parameters for entry in entries),
    }
    if len(shards) > 1:
        index = {"metadata": totals, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_shard(
    path: Path, pieces: Sequence[TensorRange], metadata: dict[str, str], advance: Callable[[int], object]
) -> None:
    """Write one safetensors file. Unchanged tensors are copied as bytes, adjacent ones in one go."""
    with path.open("wb", buffering=0) as target:
        write_pieces(target.fileno(), pieces, metadata, advance)


def write_pieces(
    target: int, pieces: Sequence[TensorRange], metadata: dict[str, str], advance: Callable[[int], object]
) -> None:
    """Write tensors as safetensors has them into an open file that is empty.

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
    write_all(target, struct.pack("<Q", len(text)) + text)
    for run in _adjacent(pieces):
        if (replacement := run[0].replacement) is not None:
            write_all(target, tensor_bytes(replacement() if callable(replacement) else replacement))
            advance(run[0].entry.num_bytes)
            continue
        begin, end = run[0].entry.begin, run[-1].entry.end
        with run[0].entry.path.open("rb") as source:
            copy_range(source.fileno(), target, begin=begin, count=end - begin, advance=advance)


def replace_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write new tensors as a safetensors file, in one step; one tensor at a time is copied in memory."""
    names = {name: key for key, name in TORCH_NAMES.items()}
    pieces = []
    for name, tensor in tensors.items():
        dtype, size = names[str(tensor.dtype).removeprefix("torch.")], tensor.numel() * tensor.element_size()
        pieces.append(TensorRange(name, TensorEntry(path, dtype, tuple(tensor.shape), begin=0, end=size), tensor))
    with file_beside(path) as file:
        write_pieces(file.fileno(), pieces, metadata, advance=lambda done: None)


def _adjacent(pieces: Sequence[TensorRange]) -> Iterator[list[TensorRange]]:
    """Group pieces that lie side by side in the same source file; a replaced tensor stands alone."""
    run: list[TensorRange] = []
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
