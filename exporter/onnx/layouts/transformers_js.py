"""The layout that transformers.js opens, and hubs call "the ONNX version" of a model.

What the client knows is written down here, since an export has no Node: read in and run by the version below
(`make js-test` runs it again).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.source import Source
from ...errors import InputError
from ...families import family_of
from ..graphs.graph import name_sizes, traced
from ..manifest import write_manifest
from ..runtime.client import LAYOUT
from ..serving import Serving
from ..support import SQUARE, Support, support_of
from ..validation import validate
from .client_files import COUNTED_BY, PROCESSORS, carry_for_client, processor_class, readable_vocabulary, write_config
from .client_graphs import EmbedTokens, MergedDecoder, client_vision, rename_inputs, served_vision
from .precisions import (
    DECODER,
    EMBEDDINGS,
    FOLDER,
    PRECISIONS,
    VISION,
    chosen_precisions,
    convert,
    graph_path,
    save,
)

NAME = LAYOUT
CLIENT = "4.3.2"  # of @huggingface/transformers, that the layout was run by
TEXT_MODELS = (  # whose layers and heads the client counts in these settings
    "llama", "mistral", "ministral3", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "granite", "cohere", "olmo", "smollm3", "starcoder2",
)  # fmt: skip
BYTES = {"fp16": 2, "q8": 1.5, "q4": 1, "q4f16": 1}  # of a parameter, embeddings and scales counted in


def check(source: Source, options: Any) -> None:
    """Raise InputError for a checkpoint that the client can't open, or an option that this layout has not."""
    chosen_precisions(options.quantize)
    config, family = source.config, family_of(source.config)
    support_of(config)  # or the reason why no layout has it
    if config.model_type not in PROCESSORS:
        raise InputError(
            f"{family.title} can't be exported for {NAME}: version {CLIENT} does not know its type "
            f"'{config.model_type}'. Types that can: {', '.join(PROCESSORS)}. Leave --layout out for our own runner."
        )
    if support_of(config, NAME).kind == SQUARE:
        check_one_tile(config, family.title)
    text = config.get_text_config().model_type
    if text not in TEXT_MODELS:
        raise InputError(
            f"this {family.title} can't be exported for {NAME}: version {CLIENT} is not known to count the layers of "
            f"a text model '{text}'. Types that are: {', '.join(TEXT_MODELS)}."
        )
    if "router" in source.raw_config:
        raise InputError(
            f"{source.name} has a router, which runs in our own runner only: leave --layout out, or export the "
            "checkpoint that the router was trained on."
        )
    if options.device != "cpu" or options.dtype not in ("auto", "float32"):
        raise InputError(
            f"the layout {NAME} has the client's own devices and precisions (device={options.device}, "
            f"dtype={options.dtype} were asked for): leave both out, and name precisions with --quantize, as in "
            "--quantize fp16,q4."
        )
    if (path := source.folder / "tokenizer.json").is_file():
        readable_vocabulary(json.loads(path.read_text())["model"])


def check_served(source: Source) -> None:
    """Raise InputError unless the client can be told how many tokens a serving router leaves of a picture."""
    kind = processor_class(source.config)
    if kind != COUNTED_BY:
        raise InputError(
            f"{family_of(source.config).title} can't be exported for {NAME} with a serving router's budget: version "
            f"{CLIENT} counts a picture's tokens from its rows and columns of patches ({kind}), so that most budgets "
            "can't be told to it, and for the others no graphs are written. --preset off exports the plain model."
        )


def check_one_tile(config: Any, title: str) -> None:
    """Raise InputError unless the model may be shown a picture as one tile, as the client can."""
    side = config.vision_config.image_size
    grids = [list(grid) for grid in config.image_grid_pinpoints]
    if [side, side] not in grids:
        raise InputError(
            f"this {title} can't be exported for {NAME}: the client cuts no tiles and shows a picture as one, and its "
            f"image_grid_pinpoints have none of {side} x {side} pixels ({', '.join(map(str, grids))}). Leave --layout "
            "out for our own runner."
        )


def bytes_per_parameter(quantize: str | None) -> float:
    """Estimate how many bytes a parameter takes, over all precisions."""
    return 4 + sum(BYTES[name] for name in chosen_precisions(quantize))


def write_graphs(
    model: Any, support: Support, folder: Path, opset: int, serving: Serving | None = None
) -> dict[str, int]:
    """Write the three graphs in float32. Returns: with a serving router, a picture's rows and how many stay."""
    (folder / FOLDER).mkdir()
    vision = client_vision(model, support)
    if serving is not None:
        vision = served_vision(vision, support, serving)
    modules: dict[str, Any] = {
        VISION: vision,
        EMBEDDINGS: EmbedTokens(model, support).eval(),
        DECODER: MergedDecoder(model, support).eval(),
    }
    for name, module in modules.items():
        program = traced(module, name, "cpu", opset)
        name_sizes(program, module.dynamic())
        rename_inputs(program, model.config.model_type)
        save(program, graph_path(folder, name, "fp32"))
    return {} if serving is None else {"rows": vision.rows, "stays": vision.stays}


def finish(job: Any, stage: Path, manifest: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """Write what belongs beside the graphs, and compare each precision with torch as it is made."""
    names = chosen_precisions(job.options.quantize)
    carry_for_client(job.source, stage, tokens=manifest.get("serving", {}).get("stays"))
    write_config(job.source, stage, names)
    write_manifest(stage, manifest)
    manifest["validation"] = validate(stage, job_of(job, "fp32"), inputs)
    manifest["precisions"] = {}
    for name in names:
        convert(stage, name)
        write_manifest(stage, {**manifest, "precisions": dict.fromkeys([*manifest["precisions"], name])})
        manifest["precisions"][name] = validate(stage, job_of(job, name), inputs)
    write_config(job.source, stage, names)  # again: now every file of weights is there to be counted


def job_of(job: Any, precision: str) -> dict[str, Any]:
    """Return what the comparison needs to know: its tolerance follows from how weights are stored."""
    form = PRECISIONS[precision]
    settings: dict[str, Any] = job.for_validation(quantize=form.like)
    return {**settings, "dtype": "float16" if form.half else "float32", "precision": precision}
