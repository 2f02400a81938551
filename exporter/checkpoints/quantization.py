"""Checkpoints whose weights are stored in fewer bits: recognised before anything is loaded, and decoded or refused.

What can be decoded exactly as its format says is decoded to bfloat16, in which the result is written then; everything
else is refused. Formulas:
    fp8 with block scales: W = Q * S, one S a block of weight_block_size   (transformers, integrations/finegrained_fp8)
    compressed-tensors, fp8 and int8: W = (Q - Z) * S, S a tensor, a row or a group of columns
    compressed-tensors, packed: Q of 2 to 8 bits in int32, lowest bits first, offset by 2^(bits - 1)
    bitsandbytes, 8 bit: W = Q * SCB / 127, one SCB a row
Shapes: R rows, C columns, g columns of a group.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .json_file import parse_json
from .safetensors_ranges import TensorEntry, Weights

if TYPE_CHECKING:
    from torch import Tensor

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
    """What a user is told of a quantized checkpoint that can't be read."""
    base = base_in_card(folder)
    where = f"{base}, which its card names as base model," if base else "the checkpoint that it was made from"
    return InputError(f"{name} is quantized by {quantized.method}: {reason}. Name {where} instead.")


def base_in_card(folder: Path) -> str | None:
    """The hub id that the card's front matter names as base model."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(errors="replace").split("---", 2)
    match = BASE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return match[1] if match else None


# --- decoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """One weight as it is after decoding, computed when it is written."""

    name: str
    entry: TensorEntry  # bfloat16, by its shape
    read: Callable[[], Tensor]


def decoded_pieces(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Iterator[list[Decoded | str]]:
    """For each shard what is to be written of it: names of tensors that stay as they are, and decoded weights.

    Raises: InputError for what can't be decoded, before anything is read.
    """
    method, decode = quantized.method, DECODERS.get(quantized.method)
    if not quantized.parts:
        raise refusal(
            name,
            quantized,
            folder,
            "so says its configuration, while its weights are plain floats, which must be a mistake",
        )
    if decode is None:
        known = ", ".join(DECODERS)
        raise refusal(name, quantized, folder, f"this version reads weights quantized by {known}, not by {method}")
    plan = decode(name, quantized, folder, weights)
    used = {part for parts, _, _ in plan.values() for part in parts}
    if left := sorted(set(quantized.parts) - used - set(plan) - {n for n in quantized.parts if PASSED_OVER.search(n)}):
        raise refusal(name, quantized, folder, f"the tensor '{left[0]}' is not one that this version can decode")
    for shard in weights.shards:
        pieces: list[Decoded | str] = []
        for tensor in shard.entries:
            target = next((t for t, (parts, _, _) in plan.items() if tensor == parts[0]), None)
            if target is not None:
                _, shape, read = plan[target]
                pieces.append(Decoded(target, _bfloat16(weights.entries[tensor], shape), read))
            elif tensor not in used and not PASSED_OVER.search(tensor):
                pieces.append(tensor)
        yield pieces


PASSED_OVER = re.compile(
    r"\.(?:input_scale|input_zero_point|output_scale|weight_format|weight_shape)$"
)  # of activations
Plan = dict[str, tuple[tuple[str, ...], tuple[int, ...], Callable[[], "Tensor"]]]  # weight -> its parts, shape, reader


def _bfloat16(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    from math import prod

    return TensorEntry(entry.path, "BF16", shape, 0, 2 * prod(shape))


def _fp8(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """Block scales under .weight_scale_inv, the format of Qwen's and DeepSeek's own fp8 checkpoints."""
    plan: Plan = {}
    for weight in quantized.parts:
        scale = f"{weight}_scale_inv"
        if not weight.endswith(".weight"):
            continue
        if scale not in weights.entries or not weights.entries[weight].dtype.startswith("F8"):
            raise refusal(name, quantized, folder, f"'{weight}' has no scales ('{scale}')")
        shape = weights.entries[weight].shape
        scales = weights.entries[scale].shape
        if len(shape) != 2 or (len(scales) not in (0, 2) and scales != (1,)):
            raise refusal(name, quantized, folder, f"'{scale}' has the shape {list(scales)} for {list(shape)}")
        block = quantized.settings.get("weight_block_size") or list(shape)
        if len(scales) == 2 and [-(-size // side) for size, side in zip(shape, block, strict=True)] != list(scales):
            raise refusal(
                name, quantized, folder, f"'{scale}' has the shape {list(scales)}, not one scale a block of {block}"
            )

        def read(weight: str = weight, scale: str = scale, block: Any = tuple(block)) -> Tensor:
            codes, factors = weights.read(weight).float(), weights.read(scale).float()
            if factors.numel() > 1:
                factors = factors.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                factors = factors[: codes.shape[0], : codes.shape[1]]
            return (codes * factors).bfloat16()

        plan[weight] = ((weight, scale), shape, read)
    return plan


def _compressed_tensors(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """Codes under .weight or .weight_packed with .weight_scale and, where asymmetric, .weight_zero_point."""
    plan: Plan = {}
    for part in quantized.parts:
        module, _, kind = part.rpartition(".")
        if kind not in ("weight", "weight_packed"):
            continue
        others = [f"{module}.{n}" for n in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")]
        parts = (part, *(other for other in others if other in weights.entries))
        if others[0] not in parts or others[3] in parts or f"{module}.weight_global_scale" in weights.entries:
            raise refusal(name, quantized, folder, f"'{part}' is in a format that this version does not decode")
        bits = _bits(quantized.settings) if kind == "weight_packed" else 0
        if kind == "weight_packed" and (bits is None or others[2] not in parts or others[1] in parts):
            raise refusal(name, quantized, folder, f"'{part}' is packed in a way that this version does not decode")
        shape = (
            weights.entries[part].shape if not bits else tuple(int(size) for size in weights.read(others[2]).tolist())
        )
        read = functools.partial(_affine, weights, parts, shape, bits or 0)
        plan[f"{module}.weight"] = (parts, shape, read)
    return plan


def _affine(weights: Weights, parts: tuple[str, ...], shape: tuple[int, ...], bits: int) -> Tensor:
    """(Q - Z) * S with S [], [1], [R, 1] or [R, C / g]."""
    by_name = {part.rpartition(".")[2]: weights.read(part) for part in parts}
    codes = by_name["weight_packed"] if bits else by_name["weight"]
    values = (unpack(codes, bits, shape[1]) if bits else codes).float()
    scale = _spread(by_name["weight_scale"].float(), shape)
    if "weight_zero_point" in by_name:
        values = values - _spread(by_name["weight_zero_point"].float(), shape)
    return (values * scale).bfloat16()


def _spread(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One value a group of columns -> one a column, where there is more than one a row."""
    if values.ndim == 2 and values.shape[1] > 1:
        return values.repeat_interleave(shape[1] // values.shape[1], 1)
    return values.reshape(-1, 1) if values.ndim == 1 else values


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Signed codes [R, C] from int32 words [R, ceil(C / (32 / bits))]."""
    import torch

    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    codes = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)  # [R, words, 32 / bits]
    return codes.flatten(1)[:, :columns] - (1 << (bits - 1))


def _bits(settings: dict[str, Any]) -> int | None:
    """The number of bits that all groups of layers share."""
    groups = settings.get("config_groups")
    found = {
        (group.get("weights") or {}).get("num_bits") for group in groups.values() if isinstance(group, dict)
    } if isinstance(groups, dict) else set()  # fmt: skip
    bits = found.pop() if len(found) == 1 else None
    return bits if bits in (4, 8) else None


def _bitsandbytes(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """8 bit: int8 codes under .weight, row maxima under .SCB."""
    plan: Plan = {}
    for weight in (part for part in quantized.parts if part.endswith(".weight")):
        scale = f"{weight.removesuffix('.weight')}.SCB"
        if scale not in weights.entries or weights.entries[weight].dtype != "I8":
            raise refusal(name, quantized, folder, "this version reads its 8-bit format, not its 4-bit one")

        def read(weight: str = weight, scale: str = scale) -> Tensor:
            return (weights.read(weight).float() * weights.read(scale).float()[:, None] / 127).bfloat16()

        plan[weight] = ((weight, scale), weights.entries[weight].shape, read)
    return plan


DECODERS: dict[str, Callable[[str, Quantized, Path, Weights], Plan]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
