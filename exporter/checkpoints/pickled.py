"""Weights of a source of either kind: safetensors as byte ranges, and pickles as tensors alone, where that is allowed.

A pickle is a program. torch reads one with `weights_only=True`, which knows tensors and containers and refuses every
other name, so that nothing of a file runs; the file is mapped, and a tensor's bytes are read when they are written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .json_file import read_json
from .safetensors_ranges import INDEX, LFS_POINTER, SINGLE, TensorEntry, TensorRange
from .weight_files import inside, no_weights, open_weights

if TYPE_CHECKING:
    import torch

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLE_FILES = ("pytorch_model*.bin", PICKLE_INDEX)  # of a repository, to download
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a source under its own names, file by file."""

    files: tuple[tuple[TensorRange, ...], ...]
    paths: tuple[Path, ...]  # of the files

    @functools.cached_property
    def pieces(self) -> dict[str, TensorRange]:
        return {piece.name: piece for pieces in self.files for piece in pieces}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU, in its own dtype."""
        return tensor_of(self.pieces[name])


def tensor_of(piece: TensorRange) -> torch.Tensor:
    """Return what a piece will be written as: its bytes in a safetensors file, or what takes their place.

    The piece must have the name that its file knows it by.
    """
    from safetensors import safe_open

    if callable(piece.replacement):
        return piece.replacement()
    if piece.replacement is not None:
        return piece.replacement
    with safe_open(piece.entry.path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(piece.name)
        return tensor


def open_stored(name: str, folder: Path, allow_pickle: bool) -> StoredTensors:
    """Read what tensors a folder holds.

    Args:
        name: as the user wrote it.
        allow_pickle: read pytorch_model.bin where there are no safetensors files.
    Raises: InputError.
    """
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        weights = open_weights(folder)
        files = tuple(
            tuple(TensorRange(tensor, entry) for tensor, entry in shard.entries.items()) for shard in weights.shards
        )
        return StoredTensors(files, tuple(shard.path for shard in weights.shards))
    paths = pickle_paths(folder)
    if not paths:
        raise InputError(no_weights(name, [path.name for path in folder.iterdir() if path.is_file()]))
    if not allow_pickle:
        raise InputError(
            f"{name} holds pickled weights only ({paths[0].name}), and a pickle can run code. Read nothing but its "
            "tensors with --allow-pickle (torch.load with weights_only=True), or name a revision that has safetensors "
            "files."
        )
    files = tuple(_pickled_pieces(path) for path in paths)
    names = [piece.name for pieces in files for piece in pieces]
    if len(names) > len(set(names)):
        twice = next(tensor for tensor in names if names.count(tensor) > 1)
        raise InputError(f"{name} holds '{twice}' in two of its files: download it again.")
    return StoredTensors(files, tuple(paths))


def pickle_paths(folder: Path) -> list[Path]:
    """Return the pickled shards of a folder, [] where it has none. Raises InputError where one is missing."""
    if not (folder / PICKLE_INDEX).exists():
        return [folder / PICKLE] if (folder / PICKLE).exists() else []
    weight_map = read_json(folder / PICKLE_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / PICKLE_INDEX} has no 'weight_map' of tensors: download it again.")
    names = sorted({inside(file, str(folder / PICKLE_INDEX)) for file in weight_map.values()})
    if missing := [file for file in names if not (folder / file).exists()]:
        raise InputError(f"{folder} lacks {len(missing)} of its {len(names)} pickled shards: {', '.join(missing)}.")
    return [folder / file for file in names]


def _pickled_pieces(path: Path) -> tuple[TensorRange, ...]:
    """Return the tensors of one pickle; nothing of it is held in memory where torch can map it."""
    tensors = _load(path)
    pieces = []
    for name, tensor in tensors.items():
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise InputError(f"{path} holds '{name}' as {tensor.dtype}, which safetensors files do not hold.")
        size = tensor.numel() * tensor.element_size()
        pieces.append(TensorRange(name, TensorEntry(path, dtype, shape=tuple(tensor.shape), begin=0, end=size), tensor))
    return tuple(pieces)


def _load(path: Path) -> dict[str, Any]:
    """Return a pickle's tensors by name. Raises InputError for anything else that it holds."""
    import torch

    if not path.is_file():
        raise InputError(f"{path} is no regular file.")
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
    zipped = head.startswith(b"PK")  # files of torch before 1.6 are no archives, and can't be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever the unpickler meets
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"{path} can't be read as tensors alone ({reason}): it is damaged, or it would run code."
        ) from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds a {type(content).__name__}, not tensors by name.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path} holds {type(tensor).__name__} under {name!r:.80}, not a tensor by name.")
    return content
