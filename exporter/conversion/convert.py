"""The story of `convert`: a checkpoint in its authors' own format, written as one that this package reads."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cards.model_card import card
from ..checkpoints.config_file import ORIGINAL_LLAVA
from ..checkpoints.files import companions, hashes, is_licence
from ..checkpoints.hub_access import download, resolve
from ..checkpoints.json_file import read_json
from ..checkpoints.own_types import carry_modeling_files, own_type
from ..checkpoints.pickled import PICKLE_FILES, StoredTensors, open_stored
from ..checkpoints.record import write_record
from ..checkpoints.safetensors_ranges import INDEX, SINGLE, write_shards
from ..checkpoints.source import Source, open_source
from ..checkpoints.staging import check_space, check_target, staged
from ..checkpoints.verification import require
from ..clean_room import load_processor, reference_answer
from ..errors import InputError
from ..models.loading import compute_dtype, load_model, pick_device
from ..progress import Progress, counting_bytes, silent
from .llava import convert_llava
from .mplug_owl2 import convert_mplug_owl2
from .parts import Converted, Original
from .qwen_vl import convert_qwen_vl
from .record import describe_conversion


def convert(
    model: str | Path,
    out: Path | str,
    *,
    vision_tower: str | Path | None = None,
    allow_pickle: bool = False,
    base_model: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    progress: Progress = silent,
) -> Path:
    """Convert an original LLaVA, a Qwen-VL or an mPLUG-Owl2; describe and verify the result as any other checkpoint.

    Args:
        model: folder or hub id.
        vision_tower: folder or hub id of the CLIP tower, where the checkpoint holds none or not its settings.
        allow_pickle: read pytorch_model.bin, as tensors alone, where there are no safetensors files.
        base_model: hub id for the card, if `model` is a folder.
    Returns: the folder. Raises: InputError for wrong input, CheckFailed where the result does not verify; in both
    cases nothing is left at `out`.
    """
    begin, out = time.monotonic(), Path(out)
    check_target(out)
    chosen = pick_device(device)
    original = open_original(str(model), None if vision_tower is None else str(vision_tower), allow_pickle)
    converted = format_of(original.name, original.raw)(original)
    check_space(out, sum(piece.entry.num_bytes for shard in converted.shards for piece in shard))
    named = {"vision_tower": original.tower[0] if original.tower else None, "allow_pickle": allow_pickle}
    if base_model is not None:
        named["base_model"] = base_model
    with staged(out) as stage:
        write_converted(converted, original.folder, stage, progress)
        source = open_source(str(stage))
        used = compute_dtype(dtype, source.config, chosen)
        reference = _reference(source, chosen, used)
        record = describe_conversion(
            original, converted, config=source.config, dtype=used, reference=reference, flags=named
        )
        record["measured"] = {
            "parameters": source.weights.num_parameters,
            "bytes": source.weights.num_bytes,
            "seconds": round(time.monotonic() - begin, 2),
            "kv_bytes_per_token": record["source"]["kv_bytes_per_token"],
            "files": hashes(stage),
        }
        write_record(stage, record)
        card(stage, out.name)
        require(stage, chosen)
    return out


def format_of(name: str, raw: dict[str, Any]) -> Callable[[Original], Converted]:
    """Return what converts a checkpoint, by its config.json. Raises InputError where it is in no such format."""
    written = raw.get("architectures")
    classes = [entry for entry in written if isinstance(entry, str)] if isinstance(written, list) else []
    if any(ORIGINAL_LLAVA.match(entry) for entry in classes) or "mm_vision_tower" in raw:
        return convert_llava
    if raw.get("model_type") == "qwen" and own_type(raw) is None:
        return convert_qwen_vl
    if raw.get("model_type") == "mplug_owl2" and own_type(raw) is None:
        return convert_mplug_owl2
    raise InputError(
        f"{name} (model_type {raw.get('model_type')!r:.60}) is in no format that is converted: the original LLaVA's, "
        "Qwen-VL's and mPLUG-Owl2's are. What transformers loads needs no conversion."
    )


def open_original(name: str, vision_tower: str | None, allow_pickle: bool) -> Original:
    """Open a checkpoint and, where one is named, its vision tower. Raises InputError."""
    folder, revision = resolve(name)
    raw = read_json(folder / "config.json")
    format_of(name, raw)
    companions(folder)  # links that lead out of it are refused before anything is read
    stored = _stored(name, folder, revision, allow_pickle)
    tower = None
    if vision_tower is not None:
        place, commit = resolve(vision_tower)
        tower = (vision_tower, place, _stored(vision_tower, place, commit, allow_pickle))
    return Original(name, revision, folder=folder, raw=raw, stored=stored, tower=tower)


def _stored(name: str, folder: Path, commit: str | None, allow_pickle: bool) -> StoredTensors:
    """Open a folder's tensors; without safetensors files in a repository, its pickles are fetched where allowed."""
    if allow_pickle and commit is not None and not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        download(name.removeprefix("hub:").split("@")[0], commit, list(PICKLE_FILES))
    return open_stored(name, folder, allow_pickle)


def write_converted(converted: Converted, source: Path, folder: Path, progress: Progress = silent) -> None:
    """Write weights, configuration, tokenizer, processor and licence texts into an existing folder."""
    num_bytes = sum(piece.entry.num_bytes for shard in converted.shards for piece in shard)
    with counting_bytes(progress, "write", num_bytes) as advance:
        write_shards(folder, converted.shards, advance)
    for name, content in {"config.json": converted.config, **converted.json_files}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if converted.tokenizer is not None:
        converted.tokenizer.save_pretrained(folder)
    for name, text in converted.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if converted.our_type is not None:
        carry_modeling_files(converted.our_type, folder)
    licences = [path for path in source.iterdir() if path.is_file() and is_licence(path.name)]
    for path in (*converted.copied, *licences):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _reference(source: Source, device: str, dtype: Any) -> dict[str, Any]:
    """Return the converted model's answer to the reference question."""
    model, _ = load_model(source, device, dtype)
    return reference_answer(model, load_processor(source.folder))
