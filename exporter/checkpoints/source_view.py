"""A source as it should be: a temporary folder of links to its files, in which some are mended or decoded.

Everything that reads a source reads the view, and what goes along is copied from it, so that a repair holds in memory
and in the written checkpoint. The source itself is never touched.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError
from .dequantization import Decoded, decoded_pieces
from .json_file import parse_json
from .quantization import SIDE_FILES, Quantized
from .safetensors_ranges import INDEX, SINGLE, TensorRange, Weights, write_shards
from .temporary import LOCK, folder_of_process


def make_view(folder: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """Return a folder of links to everything in `folder`, with entries of some JSON files set (None: taken out)."""
    view = folder_of_process("source", folder)
    for path in folder.iterdir():
        if path.name not in changes and path.name != LOCK:
            (view / path.name).symlink_to(path.absolute())
    for name, entries in changes.items():
        path = folder / name
        content = (parse_json(path) if path.exists() else {}) | entries
        content = {key: value for key, value in content.items() if value is not None or key not in entries}
        (view / name).write_text(json.dumps(content, indent=2) + "\n")
    return view


def make_decoded_view(name: str, folder: Path, raw: dict[str, Any], quantized: Quantized, weights: Weights) -> Path:
    """Return a folder as `make_view` does, with the quantized weights decoded to bfloat16 and config.json saying so.

    Raises: InputError for a format that can't be decoded, and where the temporary disk is too small.
    """
    shards = list(decoded_pieces(name, quantized, folder, weights))
    view = make_view(folder, {"config.json": {}})
    for leave_out in (SINGLE, INDEX, *SIDE_FILES, *(str(shard.path.relative_to(folder)) for shard in weights.shards)):
        (view / leave_out).unlink(missing_ok=True)
    (view / "config.json").write_text(json.dumps(_unquantized(raw), indent=2) + "\n")
    _check_space(name, view, shards, weights)
    write_shards(view, [[_range_of(piece, weights) for piece in pieces] for pieces in shards])
    return view


def _range_of(piece: Decoded | str, weights: Weights) -> TensorRange:
    """Return a tensor that is decoded when it is written, or one of the source by its name, copied as it is."""
    if isinstance(piece, Decoded):
        return TensorRange(piece.name, piece.entry, piece.read)
    return TensorRange(piece, weights.entries[piece])


def _unquantized(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without a word of quantization, at any depth."""
    left_out = {"quantization_config", "compression_config", "transformers_weights"}
    config = {
        key: _unquantized(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in left_out
    }
    return config | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}


def _check_space(name: str, view: Path, shards: list[list[Decoded | str]], weights: Weights) -> None:
    needed = sum(
        piece.entry.num_bytes if isinstance(piece, Decoded) else weights.entries[piece].num_bytes
        for pieces in shards
        for piece in pieces
    )
    free = shutil.disk_usage(view).free
    if free < needed + (64 << 20):
        raise InputError(
            f"{name} is quantized: decoding it needs {needed / 1e9:.2f} GB for temporary files, "
            f"{tempfile.gettempdir()} has {free / 1e9:.2f} GB free. Free some space, or name another disk with TMPDIR."
        )
