"""The export, top to bottom: check, trace, quantise, validate, rename into place."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.files import without_auto_map
from ..checkpoints.record import RECORD
from ..checkpoints.source import Source, open_source
from ..checkpoints.staging import check_space, check_target, staged
from ..checkpoints.verification import verify
from ..checkpoints.writer import carry_companions
from ..clean_room import load_processor
from ..data.batches import make_batches
from ..data.calibration import DEFAULT_PROMPT, load_calibration
from ..data.samples import Sample
from ..data.uses import check_not_kept_aside
from ..errors import InputError
from ..modeling.routed_route import RouterSettings
from ..models.loading import compute_dtype, load_model
from ..plain_data import paths_as_text
from .card import card
from .graphs.graph import check_exporter, check_opset
from .graphs.quantize import check_quantize, quantize
from .graphs.router import describe_router, load_router, read_settings, write_routed
from .layouts import genai, transformers_js
from .manifest import describe, write_manifest
from .rows import GROWING, SQUARE, Support, cache_of
from .runtime.folder import check_provider
from .serving import Serving, serving_of
from .tracing import write_plain_graphs, write_vision
from .trial import check_exported
from .validation import validate

DEFAULT_OPSET = 20
DTYPES = ("float32", "float16")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LAYOUTS = {layout.NAME: layout for layout in (transformers_js, genai)}


@dataclass(frozen=True)
class ExportOptions:
    """Settings of an export."""

    device: str = "cpu"
    dtype: str = "auto"  # float32 on the CPU, float16 on CUDA
    quantize: str | None = None  # int8, int4; fp16 and others in a client's layout, in transformers.js several
    opset: int | None = None
    layout: str | None = None  # transformers.js, genai; None: that of our own runner
    preset: str | None = None  # of a serving router, whose budget the graphs then have; None: the folder's default
    keep_visual_tokens: int | float | None = None  # the same as a count (144) or a share (0.25) of each picture
    calibration: str | None = None  # questions to validate on, beside those that every export is validated on
    samples: int = 8
    trust_remote_code: bool = False  # run Python of the checkpoint to verify it, where it is none that we shipped

    def __post_init__(self) -> None:
        paths_as_text(self, "calibration")


def export(model: str | Path, out: str | Path, options: ExportOptions | None = None) -> Path:
    """Write a checkpoint as ONNX graphs, and raise unless ONNX Runtime gives what torch gives."""
    options, out = options or ExportOptions(), Path(out)
    check_environment(options)
    job = prepare(str(model), options)
    check_target(out)
    check_space(out, needed_bytes(job.source, job.dtype, options))
    inputs = questions(job)
    with staged(out) as stage:
        manifest = traced_manifest(job, stage)
        if job.layout is not None:
            job.layout.finish(job, stage, manifest=manifest, inputs=inputs)
        else:
            finish(job, stage, manifest=manifest, inputs=inputs)
        write_manifest(stage, manifest, hashed=True)
        card(stage, out.name)
    return out


def traced_manifest(job: ExportJob, stage: Path) -> dict[str, Any]:
    """Write the graphs. The model is gone when this returns: the clean process loads it again, with room for one.

    Returns: the manifest, without what is found later.
    """
    torch_model, _ = load_model(job.source, "cpu", compute_dtype(job.dtype, job.source.config, "cpu"))
    manifest = describe(torch_model, job.source, job.support, job.settings())
    if job.route is not None:
        manifest["router"] = describe_router(job.source.config, job.route)
    if job.layout is not None:
        manifest["layout"] = job.layout.NAME
        with_router = {"serving": job.serving} if job.serving is not None and job.serving.router is not None else {}
        counts = job.layout.write_graphs(torch_model, job.support, stage, job.opset, **with_router)
        if job.serving is not None:
            manifest["serving"] = job.serving.facts(**(counts or {}))
    else:
        write_graphs(torch_model, job, stage)
    return manifest


def finish(job: ExportJob, stage: Path, manifest: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """Write what belongs beside the graphs, compare them with torch, and quantise them if that is asked for."""
    carry(job.source, stage)
    write_manifest(stage, manifest)
    manifest["validation"] = validate(stage, job.for_validation(quantize=None), inputs)
    if job.options.quantize:
        quantize(stage, job.options.quantize, job.options.device)
        write_manifest(stage, manifest)
        manifest["quantized"] = validate(stage, job.for_validation(quantize=job.options.quantize), inputs)


@dataclass(frozen=True)
class ExportJob:
    """An export with everything that it names opened and checked."""

    source: Source
    options: ExportOptions
    support: Support
    dtype: str
    cache: str  # a kind of `support.cache_kind`
    route: RouterSettings | None  # of a routed checkpoint
    layout: Any = None  # a module of LAYOUTS; None: that of our own runner
    serving: Serving | None = None  # the budget of a serving router

    @property
    def opset(self) -> int:
        return self.options.opset or DEFAULT_OPSET

    def settings(self) -> dict[str, Any]:
        """Return the settings as they stand in the manifest."""
        options = self.options
        return {
            "device": options.device,
            "dtype": self.dtype,
            "opset": self.opset,
            "quantize": options.quantize if self.layout is None else None,
            "cache": self.cache,
        }

    def for_validation(self, quantize: str | None) -> dict[str, Any]:
        budget = self.serving.budget if self.serving else None
        served = {"keep_visual_tokens": budget} if budget is not None else {}
        return {**self.settings(), "source": str(self.source.folder.absolute()), "quantize": quantize, **served}


def prepare(model: str, options: ExportOptions) -> ExportJob:
    source = open_verified(model, options.trust_remote_code)
    dtype = chosen_dtype(options)
    layout = layout_of(options.layout)
    if layout is not None:
        layout.check(source, options)
    support = check_exported(source.config, options.layout)
    if support.pictures is not None and "router" in source.raw_config:
        raise InputError(
            f"{source.name} has a router, and routed graphs are written for the types of a table only: export the "
            "checkpoint that the router was trained on."
        )
    serving = serving_of(source, options.layout, options.preset, options.keep_visual_tokens)
    if serving is not None and serving.budget is not None:
        layout.check_served(source)
    cache = GROWING if layout is not None else cache_of(support, dtype, options.device)
    route = read_settings(source.config, source.name, cache) if "router" in source.raw_config else None
    return ExportJob(
        source=source,
        options=options,
        support=support,
        dtype=dtype,
        cache=cache,
        route=route,
        layout=layout,
        serving=serving,
    )


def layout_of(name: str | None) -> Any:
    """Return a layout's module; None for our own. Raises: InputError for one that is not known."""
    if name is None:
        return None
    if name not in LAYOUTS:
        raise InputError(f"layout '{name}' is not known: {', '.join(LAYOUTS)}. Leave it out for our own runner's.")
    return LAYOUTS[name]


# --- before anything expensive starts ---------------------------------------------------------------------------------


def check_environment(options: ExportOptions) -> None:
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(
            f"{missing[0]} is not installed, which exporting to ONNX needs: pip install lvlm-exporter[onnx] "
            "(lvlm-exporter[onnx-gpu] for CUDA)."
        )
    check_exporter()
    check_provider(options.device)
    check_opset(options.opset)
    if layout_of(options.layout) is None:
        check_quantize(options.quantize)
    if options.dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype '{options.dtype}' is not exported to ONNX: auto, {', '.join(DTYPES)}.")


def open_verified(model: str, trust_remote_code: bool = False) -> Source:
    """Return the source; one of ours only if it verifies, so that a damaged checkpoint is not blamed on ONNX."""
    source = open_source(model)
    if (source.folder / RECORD).exists():
        result = verify(model, trust_remote_code=trust_remote_code)
        if not result.holds:
            raise InputError(f"{model} does not verify and is not exported: {'; '.join(result.problems)}.")
    return source


def chosen_dtype(options: ExportOptions) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "float32" if options.device == "cpu" else "float16"


def needed_bytes(source: Source, dtype: str, options: ExportOptions) -> int:
    """Estimate the size: every weight once, a tied head twice, and the decoder in both forms while quantising."""
    text = source.config.get_text_config()
    parameters = source.weights.num_parameters + text.vocab_size * text.hidden_size
    if (layout := layout_of(options.layout)) is not None:
        return int(parameters * layout.bytes_per_parameter(options.quantize))
    return int(parameters * (4 if dtype == "float32" else 2) * (1.5 if options.quantize else 1))


def questions(job: ExportJob) -> list[dict[str, Any]]:
    source, options = job.source, job.options
    if options.calibration is None:
        return []
    check_not_kept_aside(str(options.calibration), "calibration")
    samples = load_calibration(options.calibration, samples=options.samples, prompt=DEFAULT_PROMPT).samples
    if with_video := next((sample for sample in samples if sample.videos), None):
        raise InputError(
            f"{with_video.origin}: ONNX graphs take images and no videos: name questions about images with "
            "--calibration."
        )
    if job.support.kind == SQUARE:
        samples = tuple(made_square(sample, source.config.vision_config.image_size) for sample in samples)
    processor = load_processor(source.folder)
    return [batch.inputs for batch in make_batches(samples, processor, source.config, 4)]


def made_square(sample: Sample, side: int) -> Sample:
    """Return a question about pictures of side x side pixels, which a processor makes one tile of."""
    return replace(sample, images=tuple(image.resize((side, side)) for image in sample.open_images()))


# --- the folder -------------------------------------------------------------------------------------------------------


def write_graphs(model: Any, job: ExportJob, folder: Path) -> None:
    device, support = job.options.device, job.support
    if job.route is not None:
        write_vision(model, support, folder, device=device, opset=job.opset)
        router = load_router(job.source.folder, job.source.config, job.route, model.dtype)
        write_routed(model, router, settings=job.route, support=support, folder=folder, target=device, opset=job.opset)
        return
    write_plain_graphs(model, support, folder, cache=job.cache, device=device, opset=job.opset)


def carry(source: Source, folder: Path) -> None:
    """Copy processor, tokenizer, generation settings, licence texts, and config.json, which processors are found by."""
    # Without the mention of a modeling file, which stays behind: AutoProcessor would ask whether it may be trusted.
    (folder / "config.json").write_text(json.dumps(without_auto_map(source.raw_config), indent=2) + "\n")
    carry_companions(source, folder)
