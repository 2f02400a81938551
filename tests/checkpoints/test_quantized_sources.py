"""Sources of fewer bits: decoded to bfloat16 exactly as their format says, or refused before anything is loaded."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.damage import Change, both, check, config, tensors, write
from safetensors.torch import load_file
from torch import Tensor

from exporter.checkpoints.dequantization import unpack
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.cli.entry import main

Tensors = dict[str, Tensor]
SKIPPED = ["vision_tower", "multi_modal_projector", "lm_head", "model.vision_tower", "model.multi_modal_projector"]
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [16, 16],
    "modules_to_not_convert": SKIPPED,
}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": SKIPPED}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


def compressed(kind: str, bits: int, number: str, strategy: str, group: int | None = None) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    weights = {"num_bits": bits, "type": number, "symmetric": True, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def blocks(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    tiles = weight.reshape(rows // 16, 16, columns // 16, 16)
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    codes = (tiles / scale).to(torch.float8_e4m3fn).reshape(rows, columns)
    return {name: codes, f"{name}_scale_inv": scale.reshape(rows // 16, columns // 16).float()}


def rows_in_fp8(name: str, weight: Tensor) -> Tensors:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def rows_in_int8(name: str, weight: Tensor) -> Tensors:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    return {name: (weight / scale).round().clamp(-128, 127).to(torch.int8), f"{name}_scale": scale}


def packed(name: str, weight: Tensor) -> Tensors:
    """Groups of 16 columns in 4 bits, eight of them to a word."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 16, 16)
    scale = groups.abs().amax(2, keepdim=True) / 7
    codes = ((groups / scale).round().clamp(-8, 7).to(torch.int64) + 8).reshape(rows, columns // 8, 8)
    words = (codes << torch.arange(0, 32, 4)).sum(2).to(torch.uint32).view(torch.int32)
    scales = scale.squeeze(2).bfloat16()
    return {f"{name}_packed": words, f"{name}_scale": scales, f"{name}_shape": torch.tensor([rows, columns])}


def row_maxima(name: str, weight: Tensor) -> Tensors:
    most = weight.abs().amax(1)
    module = name.removesuffix(".weight")
    return {
        name: (weight / most[:, None] * 127).round().to(torch.int8),
        f"{module}.SCB": most.float(),
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def in_four_bits(name: str, weight: Tensor, nested: bool = True, stored: torch.dtype = torch.uint8) -> Tensors:
    """As bitsandbytes does: blocks of 64 values, two codes to a byte, the first one in the high bits."""
    levels, blocks = torch.linspace(-1, 1, 16), weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {"quant_map": levels}
    if nested:  # in blocks of 8, around their mean
        inner, mean = torch.linspace(-1, 1, 256), float(absmax.mean())
        padded = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % 8)).reshape(-1, 8)
        outer = padded.abs().amax(1)
        codes = ((padded / outer[:, None] + 1) * 127.5).round().to(torch.uint8).flatten()[: len(absmax)]
        absmax = inner[codes.long()] * outer.repeat_interleave(8)[: len(absmax)] + mean
        state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": mean}
        parts |= {"absmax": codes, "nested_absmax": outer, "nested_quant_map": inner}
    else:
        parts["absmax"] = absmax
    codes = ((blocks / absmax[:, None] + 1) * 7.5).round().clamp(0, 15).to(torch.uint8).reshape(-1, 2)
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    words = (codes[:, 0] << 4 | codes[:, 1]).view(stored)[:, None]
    return {name: words, **{f"{name}.{part}": tensor for part, tensor in parts.items()}}


def in_words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes of a row to a word, that at order[i] in the i-th four bits."""
    eights = codes.reshape(len(codes), -1, 8).to(torch.int64)[:, :, order]
    return (eights << torch.arange(0, 32, 4)).sum(2).to(torch.uint32).view(torch.int32)


def in_groups(weight: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, C] of 4 bits, with zero points and scales [G, R]."""
    members = [weight[:, group == index] for index in range(int(group.max()) + 1)]
    low, high = (torch.stack([pick(one, 1) for one in members]).half() for pick in (torch.amin, torch.amax))
    scales = ((high - low) / 14).half()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = (weight / scales.T[:, group].float() + zeros.T[:, group].float()).round().clamp(0, 15)
    return codes, zeros, scales


def as_gptq(name: str, weight: Tensor, second: bool = False) -> Tensors:
    """As AutoGPTQ packs, with columns in the order of their activations; zero points are stored as one less."""
    columns, module = weight.shape[1], name.removesuffix(".weight")
    group = (torch.arange(columns) // 16)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    codes, zeros, scales = in_groups(weight, group)
    parts = {"qweight": in_words(codes).T, "qzeros": in_words(zeros if second else zeros - 1)}
    parts |= {"scales": scales, "g_idx": group.to(torch.int32)}
    return {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def as_awq(name: str, weight: Tensor) -> Tensors:
    """As AutoAWQ packs its version gemm."""
    order, module = (0, 2, 4, 6, 1, 3, 5, 7), name.removesuffix(".weight")
    codes, zeros, scales = in_groups(weight, torch.arange(weight.shape[1]) // 16)
    parts = {"qweight": in_words(codes.T, order), "qzeros": in_words(zeros, order), "scales": scales}
    return {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def quantized(settings: dict[str, Any], encode: Callable[[str, Tensor], Tensors]) -> Change:
    """The decoder's matrices by `encode`, everything else in bfloat16."""

    def change(content: Tensors) -> None:
        for name, tensor in list(content.items()):
            if "language_model.model.layers" in name and tensor.ndim == 2:
                content |= encode(name, content.pop(name))
            else:
                content[name] = tensor.bfloat16()

    return both(tensors(change), config(quantization_config=settings))


FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Tensors], float]] = {  # and the error it may make
    "fp8": (FP8, blocks, 0.07),
    "fp8 by rows": (compressed("float-quantized", 8, "float", "channel"), rows_in_fp8, 0.07),
    "int8 by rows": (compressed("int-quantized", 8, "int", "channel"), rows_in_int8, 0.02),
    "int4 packed": (compressed("pack-quantized", 4, "int", "group", 16), packed, 0.15),
    "bitsandbytes int8": (BNB8, row_maxima, 0.02),
    "bitsandbytes nf4": (BNB4, in_four_bits, 0.15),
    "bitsandbytes nf4, not nested": (BNB4, functools.partial(in_four_bits, nested=False), 0.15),
    "bitsandbytes nf4, stored as bfloat16": (BNB4, functools.partial(in_four_bits, stored=torch.bfloat16), 0.15),
    "gptq": (GPTQ, as_gptq, 0.15),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, functools.partial(as_gptq, second=True), 0.15),
    "awq": (AWQ, as_awq, 0.15),
}


@pytest.fixture
def source(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    def make(change: Change) -> Path:
        folder = Path(shutil.copytree(tiny("llava"), tmp_path / "model"))
        change(folder)
        return folder

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_decoded(name, source, tiny, caplog):
    settings, encode, error = FORMATS[name]
    folder = source(quantized(settings, encode))
    opened = open_source(str(folder))
    assert "decoded to bfloat16" in caplog.text
    before = load_file(tiny("llava") / "model.safetensors")
    assert opened.weights.entries.keys() == before.keys()
    for tensor, weight in before.items():
        assert opened.weights.entries[tensor].dtype == "BF16"
        difference = (opened.weights.read(tensor).float() - weight).abs().max() / weight.abs().max()
        assert difference < error, tensor
    assert "quantization_config" not in opened.raw_config
    assert "quantization_config" in json.loads((folder / "config.json").read_text())


def test_fp8_is_decoded_as_transformers_does(source):
    from transformers import AutoModelForImageTextToText, FineGrainedFP8Config

    folder = source(quantized(FP8, blocks))
    theirs = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = AutoModelForImageTextToText.from_pretrained(open_source(str(folder)).folder, dtype=torch.bfloat16)
    state = ours.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


def test_words_are_unpacked_lowest_bits_first():
    word = torch.tensor([[sum(code << 4 * place for place, code in enumerate((0, 15, 8, 7, 1, 2, 3, 4)))]])
    assert unpack(word.to(torch.int32), 4).tolist() == [[0, 15, 8, 7, 1, 2, 3, 4]]


@pytest.mark.clean_process
def test_a_quantized_source_is_compressed_as_what_it_decodes_to(source, questions, tmp_path, capsys):
    folder = source(quantized(FP8, blocks))
    out = tmp_path / "out"
    arguments = ["compress", str(folder), "--calibration", str(questions), "--layers", "2,4", "--samples", "4"]
    assert main([*arguments, "--out", str(out)]) == 0  # with the default fold, verified in a clean process
    weights = open_weights(out)
    assert {entry.dtype for entry in weights.entries.values()} == {"BF16"}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    decoded = open_source(str(folder)).weights
    name = "language_model.model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(weights.read(name.format(2)), decoded.read(name.format(3)))


# --- refused ----------------------------------------------------------------------------------------------------------

CARD = "---\nlicense: apache-2.0\nbase_model: llava-hf/llava-1.5-7b-hf\n---\n# Card\n"


def claim(**settings: Any) -> Change:
    return config(quantization_config=settings)


def int_codes(name: str, dtype: torch.dtype = torch.uint8) -> Change:
    """A weight of the decoder as codes, with a scale called `name` beside it."""
    weight = "language_model.model.layers.0.mlp.down_proj.weight"

    def change(content: Tensors) -> None:
        content[weight] = content[weight].to(dtype)
        if name:
            content[weight.replace("weight", name)] = torch.ones(64)

    return tensors(change)


def changed(
    settings: dict[str, Any], encode: Callable[[str, Tensor], Tensors], part: str = "-", change: Any = None
) -> Change:
    """A quantized source with one kind of its tensors changed, or taken out."""

    def encoded(name: str, weight: Tensor) -> Tensors:
        parts = {n: change(t) if n.endswith(part) else t for n, t in encode(name, weight).items()}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    return quantized(settings, encoded)


ROWS: dict[str, tuple[Change, str]] = {
    "bitsandbytes of floats": (claim(quant_method="bitsandbytes", load_in_4bit=True), "its weights are plain floats"),
    "bitsandbytes 4 bit": (
        both(claim(quant_method="bitsandbytes", load_in_4bit=True), int_codes("weight.absmax")),
        "does not say how it is quantized",
    ),
    "nf4 of another shape": (changed(BNB4, in_four_bits, "absmax", lambda t: t[1:]), "parts that do not fit"),
    "nf4 without a map": (changed(BNB4, in_four_bits, "quant_map", lambda t: t[:9]), "parts that do not fit"),
    "nf4 in half": (changed(BNB4, in_four_bits, "proj.weight", lambda t: t[:-1]), "parts that do not fit"),
    "awq": (both(claim(quant_method="awq", bits=4), int_codes("scales", torch.int32)), "quantized by awq"),
    "awq in words of another version": (changed(AWQ | {"version": "gemv"}, as_awq), "not 4 of gemv"),
    "awq of 3 bits": (changed(AWQ | {"bits": 3}, as_awq), "not 3 of gemm"),
    "awq with too few scales": (changed(AWQ, as_awq, "scales", lambda t: t[1:]), "parts that do not fit 4 bits"),
    "awq with floats for words": (changed(AWQ, as_awq, "qzeros", lambda t: t.float()), "lacks codes"),
    "gptq": (both(claim(quant_method="gptq", bits=4), int_codes("qzeros", torch.int32)), "quantized by gptq"),
    "gptq of 3 bits": (changed(GPTQ | {"bits": 3}, as_gptq), "not 3 of gptq"),
    "gptq for marlin": (changed(GPTQ | {"checkpoint_format": "marlin"}, as_gptq), "not 4 of marlin"),
    "gptq of 8 bits in 4": (changed(GPTQ | {"bits": 8}, as_gptq), "parts that do not fit 8 bits"),
    "gptq without g_idx": (changed(GPTQ, as_gptq, "g_idx", lambda t: None), "no g_idx"),
    "gptq with a group too many": (changed(GPTQ, as_gptq, "g_idx", lambda t: t + 1), "groups that there are not"),
    "gptq with a zero point too large": (
        changed(GPTQ, functools.partial(as_gptq, second=True), "qzeros", lambda t: t | 15),
        "a zero point beyond 4 bits",
    ),
    "quanto of floats": (claim(quant_method="quanto", weights="int8"), "quantized by quanto"),
    "hqq": (both(claim(quant_method="hqq"), int_codes("")), "quantized by hqq"),
    "in the text's part": (config(text_config__quantization_config={"quant_method": "awq"}), "quantized by awq"),
    "the older entry": (config(compression_config={"quant_method": "compressed-tensors"}), "plain floats"),
    "no method": (both(claim(bits=4), int_codes("")), "an unnamed method"),
    "a method that is a list": (both(claim(quant_method=["awq"]), int_codes("")), "not by"),
    "by a file of AutoGPTQ": (write("quantize_config.json", '{"bits": 4}'), "the method of quantize_config.json"),
    "by a file of ModelOpt": (
        write("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
        "ModelOpt|hf_quant",
    ),
    "by integers": (int_codes("", torch.int8), "an unnamed method"),
    "by fp8 without a word": (int_codes("", torch.float8_e4m3fn), "an unnamed method"),
    "by scales without a word": (tensors(lambda t: t.update({"a.weight_scale": torch.ones(1)})), "an unnamed method"),
    "fp8 without scales": (both(claim(**FP8), int_codes("", torch.float8_e4m3fn)), "has no scales"),
    "fp8 with scales of another shape": (
        both(claim(**FP8), int_codes("weight_scale_inv", torch.float8_e4m3fn)),
        "has the shape",
    ),
    "fp8 with blocks of another size": (
        both(quantized(FP8, blocks), claim(**{**FP8, "weight_block_size": [8, 8]})),
        "not one scale a block of",
    ),
    "compressed in a format to come": (
        both(claim(quant_method="compressed-tensors"), int_codes("weight_packed")),
        "does not decode",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_cannot_be_decoded_is_refused(row, source):
    change, expected = ROWS[row]
    check(source(both(change, write("README.md", CARD))), f"{expected}.*Name llava-hf/llava-1.5-7b-hf")


def test_the_dry_run_refuses_what_the_run_refuses(source, questions, tmp_path, capsys):
    folder = source(claim(quant_method="awq", bits=4))
    arguments = ["compress", str(folder), "--calibration", str(questions), "--drop-layers", "2"]
    said = set()
    for flags in ([], ["--dry-run"]):
        assert main([*arguments, "--out", str(tmp_path / "out"), *flags]) == 2
        said.add(capsys.readouterr().err)
    assert len(said) == 1
    assert not (tmp_path / "out").exists()
