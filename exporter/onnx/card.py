"""The card of an ONNX folder: README.md, rendered from its onnx.json and nothing else."""

from __future__ import annotations

from pathlib import Path

from ..cards.card_file import write_card
from ..cards.licence import licence_sentence
from ..cards.model_card import budget_name, hub_metadata, ratio_cell, shown_name, template
from .layouts.client_files import takes_picture_first
from .manifest import OnnxRecord, read_manifest
from .report import differences_table, serving_sentence
from .runtime.client import LAYOUT as TRANSFORMERS_JS
from .runtime.genai import LAYOUT as GENAI

TEMPLATES = {None: "onnx.md.jinja", TRANSFORMERS_JS: "transformers-js.md.jinja", GENAI: "genai.md.jinja"}
# What the hub shows a folder as, by layout: the library that opens it, and further tags.
LIBRARIES = {None: ("onnx", ()), TRANSFORMERS_JS: (TRANSFORMERS_JS, ("onnx",)), GENAI: ("onnx", ("onnxruntime-genai",))}


def card(folder: Path, name: str | None = None) -> Path:
    """Render README.md; what a person wrote into it stays.

    Args:
        name: under which the folder is or will be loaded; its own where there is none.
    Raises: InputError where it is no folder of `lvlm-exporter onnx`.
    """
    manifest = read_manifest(folder, whole=False)
    name = name or shown_name(folder)
    source = manifest.data["source"]
    text = template(TEMPLATES[manifest.layout]).render(
        manifest.to_data(),
        title=name,
        base=source["base_model"] or Path(source["name"]).name,
        on_hub=source["base_model"] is not None,
        megabytes=sum(manifest.files.values()) / 1e6,
        differences=differences_table(manifest),
        licence_sentence=licence_sentence(source),
        budget_name=budget_name,
        ratio=ratio_cell,
        routed=manifest.router is not None,
        picture_first=manifest.layout == TRANSFORMERS_JS and takes_picture_first(manifest.model_type),
        dtypes=dtypes(manifest),
        serving_sentence=serving_sentence(manifest.serving) if manifest.serving else None,
    )
    tags = ["lvlm-exporter", "onnxruntime", *([manifest.quantize] if manifest.quantize else [])]
    library, further = LIBRARIES[manifest.layout]
    metadata = hub_metadata(
        source,
        name,
        library=library,
        tags=[*tags, *further],
        relation="quantized" if manifest.quantize or manifest.layout else "finetune",
    )
    return write_card(folder, metadata, text)


def dtypes(manifest: OnnxRecord) -> list[str]:
    """Return the precisions that a folder has: in the layout genai one, in that of transformers.js several."""
    names = list(manifest.precisions or {})
    return names if names and manifest.layout == GENAI else ["fp32", *names]
