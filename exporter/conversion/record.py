"""What compression.json says of a conversion: where the tensors come from, and that none was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cards.licence import inherited_licence
from ..cards.model_card import base_model_of
from ..checkpoints.files import companions, file_hash
from ..clean_room import REFERENCE_QUESTION
from ..models.flops import kv_bytes_per_token
from ..version import versions
from .parts import Converted, Original

NO_QUESTIONS = {"data": "none", "samples": 0, "of": 0, "fingerprint": "none", "tokens": {}}


def describe_conversion(
    original: Original, converted: Converted, config: Any, dtype: Any, reference: dict[str, Any], flags: dict[str, Any]
) -> dict[str, Any]:
    """Return the record of a conversion, which drops and folds nothing.

    Args:
        config: of the model that was written; dtype: in which it gave the `reference` answer.
        flags: what the user named beside the source, by which it can be done again.
    """
    layers = list(range(config.get_text_config().num_hidden_layers))
    base_model = base_model_of(original.name, original.folder, flags.get("base_model"))
    named = str(dtype).removeprefix("torch.")
    entries = [piece.entry for piece in original.stored.pieces.values()]
    return {
        "format": 1,
        "recipe": {"model": original.name, "convert": flags},
        "run": {"device": "cpu", "dtype": named, "batch_size": 1, "memory": None},
        "source": {
            "name": original.name,
            "revision": original.revision,
            "model_type": config.model_type,
            "base_model": base_model,
            "license": inherited_licence(original.folder, base_model),
            "parameters": sum(entry.num_parameters for entry in entries),
            "bytes": sum(entry.num_bytes for entry in entries),
            "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
            "files": source_hashes(original),
        },
        "calibration": NO_QUESTIONS,
        "protect": [],
        "scores": {"method": "first", "values": [0.0] * len(layers), "drop": [], "details": {}},
        "plan": {"num_layers": len(layers), "drop": [], "keep": layers, "broken_period": None},
        "fold": {"name": "none", "options": {}, "reason": "", "tensors": []},
        "reference": {**reference, "question": REFERENCE_QUESTION, "dtype": named},
        "evaluations": [],
        "versions": versions(),
        "conversion": {"format": converted.title, "notes": list(converted.notes), **flags},
    }


def source_hashes(original: Original) -> dict[str, str]:
    """Return the SHA-256 of every file that the result depends on; a vision tower's under vision_tower/."""
    hashes = _hashes(original.folder, original.stored.paths)
    if original.tower is None:
        return hashes
    _, folder, stored = original.tower
    return hashes | {f"vision_tower/{name}": digest for name, digest in _hashes(folder, stored.paths).items()}


def _hashes(folder: Path, weights: tuple[Path, ...]) -> dict[str, str]:
    names = {"config.json", *companions(folder).kept, *(path.relative_to(folder).as_posix() for path in weights)}
    return {name: file_hash(folder / name) for name in sorted(names) if (folder / name).is_file()}
