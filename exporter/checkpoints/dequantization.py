"""Weights of fewer bits decoded to bfloat16, in which the result is written: exactly as their format says, or refused.

Formulas:
    fp8 with block scales: W = Q * S, one S a block of weight_block_size   (transformers, integrations/finegrained_fp8)
    compressed-tensors, fp8 and int8: W = (Q - Z) * S, S a tensor, a row or a group of columns
    compressed-tensors, packed: Q of 4 or 8 bits in int32, lowest bits first, offset by 2^(bits - 1)
    bitsandbytes, 8 bit: W = Q * SCB / 127, one SCB a row
    bitsandbytes, 4 bit: W = map[Q] * absmax, one absmax a block of the flattened weight, the first code of a byte in
        its high bits; absmax may be codes itself: absmax = nested_map[code] * nested_absmax + offset (QLoRA, 3)
    GPTQ: W = (Q - (Z + 1)) * S, in its format gptq_v2 (Q - Z) * S, packed along the columns of W, one Z and S a row and
        a group; g_idx names the group of each column                                        (AutoGPTQ, qlinear_cuda)
    AWQ, gemm: W = (Q - Z) * S, packed along the rows of W, eight in the order 0 2 4 6 1 3 5 7  (AutoAWQ, packing_utils)
Shapes: R rows, C columns, G groups, g columns of a group.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .quantization import FLOATS, Quantized, refusal
from .safetensors_ranges import TensorEntry, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decoded:
    """One weight as it is after decoding, computed when it is written."""

    name: str
    entry: TensorEntry  # bfloat16, by its shape
    read: Callable[[], Tensor]


def decoded_pieces(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Iterator[list[Decoded | str]]:
    """Yield for each shard what is written of it: names of tensors that stay as they are, and decoded weights.

    Raises: InputError for what can't be decoded, before anything is read.
    """
    method, decode = quantized.method, DECODERS.get(quantized.method)
    if not quantized.parts:
        raise refusal(
            name,
            quantized,
            folder,
            "its configuration says so, but its weights are plain floats",
        )
    if decode is None:
        known = ", ".join(DECODERS)
        raise refusal(name, quantized, folder, f"this version reads weights quantized by {known}, not by {method}")
    plan = decode(name, quantized, folder, weights)
    used = {part for parts, _, _ in plan.values() for part in parts}
    if left := sorted(set(quantized.parts) - used - set(plan) - {n for n in quantized.parts if PASSED_OVER.search(n)}):
        raise refusal(name, quantized, folder, f"the tensor '{left[0]}' is not one that this version can decode")
    targets = {parts[0]: target for target, (parts, _, _) in plan.items()}
    for shard in weights.shards:
        pieces: list[Decoded | str] = []
        for tensor in shard.entries:
            if (target := targets.get(tensor)) is not None:
                _, shape, read = plan[target]
                pieces.append(Decoded(target, _bfloat16(weights.entries[tensor], shape), read))
            elif tensor not in used and not PASSED_OVER.search(tensor):
                pieces.append(tensor)
        yield pieces


PASSED_OVER = re.compile(
    r"\.(?:input_scale|input_zero_point|output_scale|weight_format|weight_shape)$"
)  # of activations
PlanEntry = tuple[tuple[str, ...], tuple[int, ...], Callable[[], "Tensor"]]  # its parts, shape, reader
Plan = dict[str, PlanEntry]  # by the weight's name


def _bfloat16(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(path=entry.path, dtype="BF16", shape=shape, begin=0, end=2 * prod(shape))


def _fp8(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """Decode block scales under .weight_scale_inv, the format of Qwen's and DeepSeek's own fp8 checkpoints."""
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
    """Decode codes under .weight or .weight_packed with .weight_scale, and .weight_zero_point where asymmetric."""
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
    """Compute (Q - Z) * S with S [], [1], [R, 1] or [R, C / g]."""
    stored = {part.rpartition(".")[2]: weights.read(part) for part in parts}
    codes = stored["weight_packed"] if bits else stored["weight"]
    values = (unpack(codes, bits)[:, : shape[1]] - (1 << (bits - 1)) if bits else codes).float()
    scale = _spread(stored["weight_scale"].float(), shape)
    if "weight_zero_point" in stored:
        values = values - _spread(stored["weight_zero_point"].float(), shape)
    return (values * scale).bfloat16()


def _spread(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Spread one value a group of columns to one a column, where there is more than one a row."""
    if values.ndim == 2 and values.shape[1] > 1:
        return values.repeat_interleave(shape[1] // values.shape[1], 1)
    return values.reshape(-1, 1) if values.ndim == 1 else values


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes [R, W * 32 / bits], not negative, from int32 words [R, W], the first in the lowest bits."""
    import torch

    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _bits(settings: dict[str, Any]) -> int | None:
    """Return the number of bits that all groups of layers share."""
    groups = settings.get("config_groups")
    widths = {
        (group.get("weights") or {}).get("num_bits") for group in groups.values() if isinstance(group, dict)
    } if isinstance(groups, dict) else set()  # fmt: skip
    bits = widths.pop() if len(widths) == 1 else None
    return bits if bits in (4, 8) else None


def _bitsandbytes(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """Decode 8 bit (codes .weight, row maxima .SCB) and 4 bit (bytes .weight, the rest under its name)."""
    plan: Plan = {}
    for absmax in (part for part in quantized.parts if part.endswith(".weight.absmax")):
        weight = absmax.removesuffix(".absmax")
        plan[weight] = _four_bits(name, quantized, folder=folder, weights=weights, weight=weight)
    for weight in (part for part in quantized.parts if part.endswith(".weight") and part not in plan):
        scale = f"{weight.removesuffix('.weight')}.SCB"
        if scale not in weights.entries or weights.entries[weight].dtype != "I8":
            raise refusal(name, quantized, folder, f"'{weight}' has neither row maxima ('{scale}') nor block maxima")
        plan[weight] = ((weight, scale), weights.entries[weight].shape, functools.partial(_by_rows, weights, weight))
    return plan


def _by_rows(weights: Weights, weight: str) -> Tensor:
    scale = weights.read(f"{weight.removesuffix('.weight')}.SCB").float()
    return (weights.read(weight).float() * scale[:, None] / 127).bfloat16()


def _four_bits(name: str, quantized: Quantized, folder: Path, weights: Weights, weight: str) -> PlanEntry:
    """Return one weight of bitsandbytes' nf4 or fp4, whose settings lie beside it as JSON in bytes."""
    parts = tuple(part for part in quantized.parts if part.startswith(f"{weight}."))
    states = [part for part in parts if ".quant_state.bitsandbytes__" in part]
    try:
        state = json.loads(bytes(weights.read(states[0]).tolist()))
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested = int(state["nested_blocksize"]) if f"{weight}.nested_absmax" in parts else 0
        offset = float(state["nested_offset"]) if nested else 0.0
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise refusal(name, quantized, folder, f"'{weight}' does not say how it is quantized") from error
    count, sizes = prod(shape), {part: weights.entries[part].num_parameters for part in parts}
    blocks = -(-count // block) if block > 0 else -1
    expected = {f"{weight}.absmax": blocks, f"{weight}.quant_map": 16}
    if nested:
        expected |= {f"{weight}.nested_absmax": -(-blocks // max(nested, 1)), f"{weight}.nested_quant_map": 256}
    stored = weights.entries[weight].num_bytes
    if any(sizes.get(part) != size for part, size in expected.items()) or stored != -(-count // 2):
        raise refusal(
            name, quantized, folder, f"'{weight}' has {stored:,} bytes, and parts that do not fit {list(shape)}"
        )
    return (weight, *parts), shape, functools.partial(_looked_up, weights, weight, shape, block, nested, offset)


def _looked_up(weights: Weights, weight: str, shape: tuple[int, ...], block: int, nested: int, offset: float) -> Tensor:
    """Return map[Q] * absmax, by the two codes of a byte at a time.

    Args:
        block: values that share an absmax.
        nested: absmaxes that share a nested one; 0: they are no codes.
    """
    import torch

    def part(entry: str) -> Tensor:
        return weights.read(f"{weight}.{entry}")

    levels, absmax = part("quant_map").float(), part("absmax")
    if nested:
        outer = part("nested_absmax").float().repeat_interleave(nested)[: len(absmax)]
        inner = part("nested_quant_map").float().index_select(0, absmax.int())
        absmax = inner * outer + offset
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # [256, 2]
    stored = weights.read(weight).contiguous().view(torch.uint8).flatten()
    values = pairs.index_select(0, stored.int()).flatten()[: prod(shape)]
    padded = torch.nn.functional.pad(values, (0, -len(values) % block))
    scaled = padded.view(len(absmax), -1) * absmax.float()[:, None]
    return scaled.flatten()[: len(values)].reshape(shape).bfloat16()


# --- packed in words of 32 bits --------------------------------------------------------------------------------------

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the code of each of its eight rows lies


def _gptq(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """Decode .qweight [C * bits / 32, R], zero points .qzeros [G, R * bits / 32], .scales [G, R], groups .g_idx [C]."""
    form = str(quantized.settings.get("checkpoint_format") or quantized.settings.get("format") or "gptq")
    bits = quantized.settings.get("bits")
    if form not in ("gptq", "gptq_v2") or bits not in (2, 4, 8):
        raise refusal(
            name, quantized, folder, f"this version reads 2, 4 and 8 bits of gptq and gptq_v2, not {bits} of {form}"
        )
    plan: Plan = {}
    for module in _modules(quantized):
        words, zeros, scales, index = _entries(name, quantized, folder=folder, weights=weights, module=module)
        columns, rows = words[0] * 32 // bits, words[1]
        groups = scales[0]
        if zeros != (groups, rows * bits // 32) or scales != (groups, rows) or index not in ((columns,), None):
            raise refusal(
                name, quantized, folder, f"'{module}' has parts that do not fit {bits} bits of [{rows}, {columns}]"
            )
        if index is None and (quantized.settings.get("desc_act") or columns % groups):
            raise refusal(name, quantized, folder, f"'{module}' has no g_idx, which says the group of each column")
        if (
            index is not None
            and not 0 <= int((group := weights.read(f"{module}.g_idx")).min()) <= int(group.max()) < groups
        ):
            raise refusal(name, quantized, folder, f"'{module}.g_idx' names groups that there are not ({groups})")
        if form == "gptq" and bool((unpack(weights.read(f"{module}.qzeros"), bits) == (1 << bits) - 1).any()):
            raise refusal(name, quantized, folder, f"'{module}.qzeros' has a zero point beyond {bits} bits")
        read = functools.partial(_of_gptq, weights, module, bits, form == "gptq", index is not None)
        plan[f"{module}.weight"] = (_parts(weights, module), (rows, columns), read)
    return plan


def _of_gptq(weights: Weights, module: str, bits: int, less_one: bool, indexed: bool) -> Tensor:
    import torch

    codes = unpack(weights.read(f"{module}.qweight").T, bits).float()  # [R, C]
    scales = weights.read(f"{module}.scales").float()  # [G, R]
    zeros = unpack(weights.read(f"{module}.qzeros"), bits).float() + less_one  # [G, R]
    each = torch.arange(codes.shape[1]) // (codes.shape[1] // len(scales))
    group = weights.read(f"{module}.g_idx").long() if indexed else each  # [C]
    return ((codes - zeros.T[:, group]) * scales.T[:, group]).bfloat16()


def _awq(name: str, quantized: Quantized, folder: Path, weights: Weights) -> Plan:
    """Decode codes .qweight [C, R / 8], zero points .qzeros [G, R / 8], .scales [G, R]."""
    bits, form = quantized.settings.get("bits", 4), str(quantized.settings.get("version", "gemm")).lower()
    if bits != 4 or form != "gemm":
        raise refusal(name, quantized, folder, f"this version reads 4 bits of the version gemm, not {bits} of {form}")
    plan: Plan = {}
    for module in _modules(quantized):
        words, zeros, scales, _ = _entries(name, quantized, folder=folder, weights=weights, module=module)
        columns, rows, groups = words[0], words[1] * 8, scales[0]
        if zeros != (groups, words[1]) or scales != (groups, rows) or not groups or columns % groups:
            raise refusal(
                name, quantized, folder, f"'{module}' has parts that do not fit 4 bits of [{rows}, {columns}]"
            )
        plan[f"{module}.weight"] = (
            _parts(weights, module), (rows, columns), functools.partial(_of_awq, weights, module)
        )  # fmt: skip
    return plan


def _of_awq(weights: Weights, module: str) -> Tensor:
    def rows(part: str) -> Tensor:
        codes = unpack(weights.read(f"{module}.{part}"), 4)
        return codes.view(len(codes), -1, 8)[:, :, AWQ_ORDER].flatten(1).float()

    codes, zeros, scales = rows("qweight"), rows("qzeros"), weights.read(f"{module}.scales").float()
    columns = len(codes) // len(scales)  # of a group
    each = ((codes.view(len(scales), columns, -1) - zeros[:, None]) * scales[:, None]).flatten(0, 1)  # [C, R]
    return each.T.contiguous().bfloat16()


def _modules(quantized: Quantized) -> list[str]:
    return [part.removesuffix(".qweight") for part in quantized.parts if part.endswith(".qweight")]


def _parts(weights: Weights, module: str) -> tuple[str, ...]:
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    return tuple(name for name in names if name in weights.entries)


def _entries(name: str, quantized: Quantized, folder: Path, weights: Weights, module: str) -> list[Any]:
    """Return shapes of a module's qweight, qzeros, scales and g_idx, None for what is not there."""
    entries = [weights.entries.get(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
    kinds = [entry and (entry.dtype, len(entry.shape)) for entry in entries]
    fits = kinds[:2] == [("I32", 2)] * 2 and kinds[2] and kinds[2][0] in FLOATS and kinds[2][1] == 2
    if not fits or (kinds[3] and kinds[3] != ("I32", 1)):
        raise refusal(name, quantized, folder, f"'{module}' lacks codes, zero points or scales of the usual kind")
    return [entry and entry.shape for entry in entries]


DECODERS: dict[str, Callable[[str, Quantized, Path, Weights], Plan]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
}
