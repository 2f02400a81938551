"""The export, top to bottom: check, trace, quantise, validate, rename into place."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration import DEFAULT_PROMPT, load_calibration, make_batches
from ..checkpoint import RECORD, check_space, check_target, staged
from ..clean_room import load_processor
from ..errors import InputError
from ..source import Source, compute_dtype, load_model, open_source
from ..verification import verify
from .decoder import Embeddings, GrowingDecoder, SharedDecoder, group_query_attention
from .graph import check_opset, trace
from .manifest import describe, write_manifest
from .quantize import check_quantize, quantize
from .runtime.model import check_provider
from .support import SHARED, Support, cache_kind, support_of
from .validation import validate
from .vision import vision_module

DEFAULT_OPSET = 20
DTYPES = ("float32", "float16")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    device: str = "cpu"
    dtype: str = "auto"  # float32 on the CPU, float16 on CUDA
    quantize: str | None = None  # int8, int4
    opset: int | None = None
    calibration: str | None = None  # questions to validate on, beside those that every export is validated on
    samples: int = 8


def export(model: str | Path, out: str | Path, options: ExportOptions | None = None) -> Path:
    """Write a checkpoint as a folder of ONNX graphs that ONNX Runtime runs as torch runs the model, or raise."""
    options, out = options or ExportOptions(), Path(out)
    check_environment(options)
    source = open_verified(str(model))
    support = support_of(source.config)
    dtype = chosen_dtype(options)
    check_target(out)
    check_space(out, needed_bytes(source, dtype, options.quantize))
    inputs = questions(source, options)
    torch_model, _ = load_model(source, "cpu", compute_dtype(dtype, source.config, "cpu"))
    cache = cache_kind(source.config, dtype, options.device)
    settings = {"device": options.device, "dtype": dtype, "opset": options.opset or DEFAULT_OPSET}
    job = {"source": str(source.folder.absolute()), **settings}
    manifest = describe(torch_model, source, support, settings | {"quantize": options.quantize, "cache": cache})
    with staged(out) as stage:
        write_graphs(torch_model, support, cache, stage, options)
        del torch_model  # the clean process loads it again: there is memory for one
        carry(source, stage)
        write_manifest(stage, manifest)
        manifest["validation"] = validate(stage, {**job, "quantize": None}, inputs)
        if options.quantize:
            quantize(stage, options.quantize, options.device)
            write_manifest(stage, manifest)
            manifest["quantized"] = validate(stage, {**job, "quantize": options.quantize}, inputs)
        write_manifest(stage, manifest, hashed=True)
    return out


# --- before anything expensive starts ---------------------------------------------------------------------------------


def check_environment(options: ExportOptions) -> None:
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(
            f"{missing[0]} is not installed, which exporting to ONNX needs: pip install lvlm-exporter[onnx] "
            "(lvlm-exporter[onnx-gpu] for CUDA)."
        )
    check_provider(options.device)
    check_opset(options.opset)
    check_quantize(options.quantize)
    if options.dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype '{options.dtype}' is not exported to ONNX: auto, {', '.join(DTYPES)}.")


def open_verified(model: str) -> Source:
    """The source; one of ours only if it verifies, so that a damaged checkpoint is not blamed on ONNX."""
    source = open_source(model)
    if "router" in source.raw_config:
        raise InputError(
            f"{model} has a router, and graphs that leave tokens and layers out are not exported yet: export the plain "
            "checkpoint that it was made from."
        )
    if (source.folder / RECORD).exists():
        result = verify(source.folder)
        if not result.holds:
            raise InputError(f"{model} does not verify and is not exported: {'; '.join(result.problems)}.")
    return source


def chosen_dtype(options: ExportOptions) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "float32" if options.device == "cpu" else "float16"


def needed_bytes(source: Source, dtype: str, quantize: str | None) -> int:
    """Graphs hold every weight once, a tied head twice; while quantising the decoder is there in both forms."""
    text = source.config.get_text_config()
    parameters = source.weights.num_parameters + text.vocab_size * text.hidden_size
    return int(parameters * (4 if dtype == "float32" else 2) * (1.5 if quantize else 1))


def questions(source: Source, options: ExportOptions) -> list[dict[str, Any]]:
    if options.calibration is None:
        return []
    calibration = load_calibration(options.calibration, samples=options.samples, prompt=DEFAULT_PROMPT)
    processor = load_processor(source.folder)
    return [batch.inputs for batch in make_batches(calibration.samples, processor, source.config, 4)]


# --- the folder -------------------------------------------------------------------------------------------------------


def write_graphs(model: Any, support: Support, cache: str, folder: Path, options: ExportOptions) -> None:
    opset = options.opset or DEFAULT_OPSET
    trace(vision_module(model, support.kind), folder / "vision.onnx", options.device, opset)
    trace(Embeddings(model).eval(), folder / "embeddings.onnx", options.device, opset)
    decoder = (SharedDecoder if cache == SHARED else GrowingDecoder)(model, support).eval()
    with group_query_attention(decoder) if cache == SHARED else contextlib.nullcontext():
        trace(decoder, folder / "decoder.onnx", options.device, opset)


def carry(source: Source, folder: Path) -> None:
    """Processor, tokenizer, generation settings, licence texts, and config.json, which processors are found by."""
    for path in (Path("config.json"), *source.companions()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / path, folder / path)
