"""The layout that onnxruntime-genai opens: graphs, genai_config.json, its own settings for images, tokenizer files.

What the library knows is written down here, since an export does without it: read in and run by the version below
(`make genai-test` runs it again).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...checkpoints.source import Source
from ...clean_room import load_processor
from ...errors import InputError
from ...families import family_of
from ..graphs.decoder import Embeddings
from ..graphs.graph import name_sizes, traced
from ..graphs.quantize import weight_files
from ..manifest import write_manifest
from ..runtime.genai import LAYOUT
from ..support import Support, support_of
from ..validation import validate
from .client_graphs import MARKED, MergedDecoder, client_vision
from .genai_files import TYPES, carry_for_genai, own_processor_limits, padding_id, write_settings
from .precisions import DECODER, EMBEDDINGS, PRECISIONS, SYNONYMS, VISION, converted

NAME = LAYOUT
LIBRARY = "onnxruntime-genai"
CLIENT = "0.18.0"  # of the library, that the layout was run by
FILES = {VISION: "vision.onnx", EMBEDDINGS: "embeddings.onnx", DECODER: "decoder.onnx"}
BYTES = {"fp32": 4, "fp16": 2, "q8": 2.5, "q4": 1.5, "q4f16": 1}  # of a parameter, embeddings and scales counted in


def check(source: Source, options: Any) -> None:
    """Raise InputError for a checkpoint that the library can't run, or an option that this layout has not."""
    chosen_precision(options.quantize)
    config, title = source.config, family_of(source.config).title
    support_of(config)  # or the reason why no layout has it
    if config.model_type not in TYPES:
        raise InputError(
            f"{title} can't be exported for {NAME}: {LIBRARY} {CLIENT} has no model of the type '{config.model_type}'. "
            f"Types that can: {', '.join(TYPES)}. Leave --layout out for our own runner."
        )
    if "router" in source.raw_config:
        raise InputError(
            f"{source.name} has a router, which runs in our own runner only: leave --layout out, or export the "
            "checkpoint that the router was trained on."
        )
    if options.device != "cpu" or options.dtype not in ("auto", "float32"):
        raise InputError(
            f"the layout {NAME} names its precision with --quantize, as in --quantize fp16, and leaves devices to the "
            f"library (device={options.device}, dtype={options.dtype} were asked for): leave both out."
        )
    padding_id(load_processor(source.folder))  # or the reason why no question can be put


def check_served(source: Source) -> None:
    """Raise InputError: the types that have serving routers are those whose tokens the library counts by itself."""
    raise InputError(
        f"{family_of(source.config).title} can't be exported for {NAME} with a serving router's budget: {LIBRARY} "
        f"{CLIENT} counts a picture's tokens from its rows and columns of patches, so that most budgets can't be told "
        "to it, and for the others no graphs are written. --preset off exports the plain model."
    )


def chosen_precision(quantize: str | None) -> str:
    """Return the one precision that a folder has."""
    name = SYNONYMS.get(quantize or "fp32", quantize or "fp32")
    if name not in PRECISIONS:
        raise InputError(
            f"quantize '{quantize}' is not known in the layout {NAME}: {', '.join(PRECISIONS)}. A folder has one of "
            "them."
        )
    return name


def bytes_per_parameter(quantize: str | None) -> float:
    """Estimate how many bytes a parameter takes while the graphs are written: in float32, and as they stay."""
    name = chosen_precision(quantize)
    return 4 + (BYTES[name] if name != "fp32" else 0)


def write_graphs(model: Any, support: Support, folder: Path, opset: int) -> None:
    """Write the three graphs in float32."""
    modules: dict[str, Any] = {
        VISION: client_vision(model, support),
        EMBEDDINGS: Embeddings(model, len(support.adds_after), marks=int(support.blocks == MARKED)).eval(),
        DECODER: MergedDecoder(model, support).eval(),
    }
    for name, module in modules.items():
        program = traced(module, name, "cpu", opset)
        name_sizes(program, module.dynamic())
        save(program, folder / FILES[name])


def save(program: Any, path: Path) -> None:
    import onnx_ir

    onnx_ir.save(program, str(path), external_data=f"{path.name}.data")


def convert(folder: Path, precision: str) -> None:
    """Put graphs in a precision in the place of those in float32."""
    for graph, name in FILES.items():
        path = folder / name
        program = converted(path, graph, PRECISIONS[precision])
        for file in (path, *weight_files(path)):
            file.unlink()
        save(program, path)


def finish(job: Any, stage: Path, manifest: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """Write what belongs beside the graphs, and compare them with torch, before and after they change precision."""
    carry_for_genai(job.source, stage)
    write_settings(job.source, stage, manifest)
    manifest["client"] = {
        "name": LIBRARY,
        "version": CLIENT,
        "installed": installed_version(),
        "limits": own_processor_limits(job.source),
    }
    write_manifest(stage, manifest)
    manifest["validation"] = validate(stage, job_of(job, "fp32"), inputs)
    name = chosen_precision(job.options.quantize)
    if name != "fp32":
        convert(stage, name)
        write_manifest(stage, {**manifest, "precisions": {name: None}})
        manifest["precisions"] = {name: validate(stage, job_of(job, name), inputs)}


def job_of(job: Any, precision: str) -> dict[str, Any]:
    """Return what the comparison needs to know: its tolerance follows from how weights are stored."""
    form = PRECISIONS[precision]
    settings: dict[str, Any] = job.for_validation(quantize=form.like)
    return {**settings, "dtype": "float16" if form.half else "float32"}


def installed_version() -> str | None:
    """Return the version of the library on this machine; None: it is not installed."""
    try:
        return version(LIBRARY)
    except PackageNotFoundError:
        return None
