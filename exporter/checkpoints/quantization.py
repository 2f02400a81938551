"""Checkpoints whose weights are stored in fewer bits: recognised before anything is loaded.

How they are decoded stands in `dequantization`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .json_file import parse_json
from .safetensors_ranges import Weights

FLOATS = ("F64", "F32", "F16", "BF16")
CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8", "I32", "U32")
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json")
ENTRIES = ("quantization_config", "compression_config")
# Tensors that only a quantized checkpoint has beside its weights.
PARTS = re.compile(
    r"\.(?:weight_scale(?:_inv|_2)?|weight_zero_point|weight_packed|weight_shape|weight_g_idx|weight_global_scale|"
    r"input_scale|input_zero_point|output_scale|qweight|qzeros|scales|g_idx|SCB|weight_format|"
    r"weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+|SCB|_data|_scale))$"
)
BASE = re.compile(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Quantized:
    """That a checkpoint is quantized, and how it says so."""

    method: str  # quant_method of config.json, or what gives it away
    settings: dict[str, Any]
    parts: tuple[str, ...]  # tensors that are codes, scales and the like; none: only the configuration claims it


def find_quantization(raw: dict[str, Any], folder: Path, weights: Weights) -> Quantized | None:
    """Recognise a quantized checkpoint by its configuration, a file beside it or its tensors; None: it is not one."""
    parts = tuple(
        name
        for name, entry in weights.entries.items()
        if PARTS.search(name) or (entry.dtype in CODES and name.endswith((".weight", "_proj", "_experts")))
    )
    for place in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for entry in ENTRIES:
            if place.get(entry):
                settings = place[entry] if isinstance(place[entry], dict) else {}
                return Quantized(str(settings.get("quant_method", "an unnamed method")), settings, parts)
    for name in SIDE_FILES:
        if (folder / name).exists() and (settings := parse_json(folder / name)):
            return Quantized(f"the method of {name}", {}, parts)
    return Quantized("an unnamed method", {}, parts) if parts else None


def refusal(name: str, quantized: Quantized, folder: Path, reason: str) -> InputError:
    """Return what a user is told of a quantized checkpoint that can't be read."""
    base = base_in_card(folder)
    where = f"{base}, which its card names as base model," if base else "the checkpoint that it was made from"
    return InputError(f"{name} is quantized by {quantized.method}: {reason}. Name {where} instead.")


def base_in_card(folder: Path) -> str | None:
    """Return the hub id that the card's front matter names as base model."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(errors="replace").split("---", 2)
    match = BASE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return match[1] if match else None
