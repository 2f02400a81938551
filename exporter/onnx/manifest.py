"""onnx.json: what the runner must know of a folder, where it comes from, and how far it is from torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from ..cards.licence import inherited_licence
from ..cards.model_card import base_model_of
from ..checkpoints.files import hashes
from ..checkpoints.measurement_types import OnnxBenchmark
from ..checkpoints.record import replace_json
from ..checkpoints.record_types import (
    ComparisonPart,
    InnerPath,
    OnnxClientPart,
    OnnxRouterPart,
    OnnxServingPart,
    OnnxSourcePart,
    OnnxVersions,
    Sha256,
    VisionPart,
)
from ..checkpoints.shapes import Misfit, one_of
from ..checkpoints.source import Source
from ..checkpoints.typed import OR_MISSING, Count, Text, from_data, named
from ..errors import InputError
from ..families import visual_token_ids
from ..version import __version__
from .graphs.decoder import cache_shape, stated_heads
from .graphs.quantize import BITS
from .runtime import folder as runner
from .runtime.client import LAYOUT as TRANSFORMERS_JS
from .runtime.client import SUFFIXES
from .runtime.folder import FORMAT, MANIFEST
from .runtime.genai import LAYOUT as GENAI
from .support import GROWING, SQUARE, Support, cache_kind, support_of

__all__ = [
    "GRAPH_FILES",
    "MANIFEST",
    "describe",
    "graph_files",
    "is_onnx",
    "read_manifest",
    "write_manifest",
    "write_record",
]

CHECKPOINT_TYPE = "checkpoint_type"  # in a config.json that names another type, which a client knows
GRAPH_FILES = ("*.onnx", "*.onnx.data", "onnx/*.onnx", "onnx/*.onnx_data*")


@dataclass(frozen=True)
class OnnxRecord:
    """An ONNX folder's record. Its parts are typed; `to_data` is what the file holds, with what no part names."""

    files: dict[InnerPath, Count]  # bytes of each graph file
    sha256: dict[InnerPath, Sha256]
    model_type: Text
    device: Annotated[str, one_of("cpu", "cuda")]
    dtype: Annotated[str, one_of("float32", "float16")]
    opset: Count
    quantize: Annotated[str, one_of(*BITS)] | None
    layers: Count
    heads: Count
    head_size: Count
    hidden_size: Count
    image_token_id: Count
    pad_token_id: Count
    first_position: Count
    mrope: Any
    blocks: Any
    vision: VisionPart
    source: OnnxSourcePart
    versions: OnnxVersions
    validation: ComparisonPart
    quantized: Annotated[ComparisonPart | None, OR_MISSING] = None
    layout: Annotated[Annotated[str, one_of(TRANSFORMERS_JS, GENAI)] | None, OR_MISSING] = None
    precisions: Annotated[dict[Annotated[str, one_of(*SUFFIXES)], ComparisonPart] | None, OR_MISSING] = None
    client: Annotated[OnnxClientPart | None, OR_MISSING] = None
    router: Annotated[OnnxRouterPart | None, OR_MISSING] = None
    serving: Annotated[OnnxServingPart | None, OR_MISSING] = None
    benchmarks: tuple[OnnxBenchmark, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata=named(None))

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> OnnxRecord:
        """Read a record's JSON. Raises: Misfit where any part of it is missing or not what it should be."""
        read = from_data(cls, data)
        object.__setattr__(read, "data", data)
        for name in ("validation", "quantized"):
            if (part := getattr(read, name)) is not None and not part.outputs:
                raise Misfit(f"'{name}.outputs' is empty")
        for name, part in (read.precisions or {}).items():
            if not part.outputs:
                raise Misfit(f"'precisions.{name}.outputs' is empty")
        for index, entry in enumerate(read.benchmarks):
            if not entry.models:
                raise Misfit(f"'benchmarks[{index}].models' is not a list that is not empty")
            for number, model in enumerate(entry.models):
                if not model.batches:
                    raise Misfit(f"'benchmarks[{index}].models[{number}].batches' is not a list that is not empty")
        return read

    def to_data(self) -> dict[str, Any]:
        """Return a copy of the JSON, to be changed and written."""
        return copy.deepcopy(dict(self.data))

    @property
    def outcome(self) -> ComparisonPart:
        """Return the comparison with torch of the folder's graphs, the quantised ones if there are any."""
        return self.quantized or self.validation


def is_onnx(path: str | Path) -> bool:
    """Return whether the folder is one that `lvlm-exporter onnx` wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path, whole: bool = True) -> OnnxRecord:
    """Return onnx.json, checked in full.

    Args:
        whole: raise where a graph file is missing or of another size, too.
    Raises: InputError where it is no folder of `lvlm-exporter onnx`, or a part of it is not what it should be.
    """
    data = runner.read_manifest(folder, whole)
    try:
        return OnnxRecord.from_data(data)
    except Misfit as misfit:
        raise InputError(f"{folder / MANIFEST} is damaged ({misfit}): export again.") from misfit


def differing_facts(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return what a manifest says of its model otherwise than the folder's config.json, a sentence each.

    The hashes in a manifest cover every file but itself: a fact that the runner goes by has to stand in both.
    """
    from transformers import AutoConfig

    try:
        config = checkpoint_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        text, support = config.get_text_config(), support_of(config, manifest.get("layout"))
        heads, head_size = stated_heads(text)
        facts = {
            **model_facts(config, support),
            "layers": text.num_hidden_layers,
            "heads": heads,
            "head_size": head_size,
            "cache": GROWING if manifest.get("layout") else cache_kind(config, manifest["dtype"], manifest["device"]),
        }
    except Exception as error:  # whatever a class of transformers makes of its settings
        return [f"its config.json is not accepted by transformers ({type(error).__name__})"]
    return [
        f"{MANIFEST} says {name}={manifest.get(name)!r:.80}, config.json {value!r:.80}"
        for name, value in facts.items()
        if manifest.get(name) != value
    ]


def checkpoint_config(config: Any) -> Any:
    """Return a folder's configuration as that of the checkpoint, where a client was told of another type."""
    if (model_type := getattr(config, CHECKPOINT_TYPE, None)) is None:
        return config
    from transformers import AutoConfig

    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return AutoConfig.for_model(model_type, **settings)


def model_facts(config: Any, support: Support) -> dict[str, Any]:
    """Return the facts of a configuration that the runner goes by."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    hidden_size = config.get_text_config().hidden_size
    return {
        "model_type": config.model_type,
        "hidden_size": hidden_size,
        "image_token_id": visual_token_ids(config)[0],
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "first_position": support.first_position,
        "mrope": support.mrope,
        "blocks": support.blocks,
        "vision": vision_settings(config, support.kind) if support.pictures is None else own_settings(config, support),
        **({"feature_size": hidden_size * (1 + len(support.adds_after))} if support.adds_after else {}),
    }


def describe(model: Any, source: Source, support: Support, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of an export; `settings` are device, dtype, opset, quantize and cache."""
    layers, heads, head_size = cache_shape(model)
    base_model = base_model_of(source.name, source.folder, None)
    return {
        "format": FORMAT,
        **settings,
        "layers": layers,
        "heads": heads,
        "head_size": head_size,
        **model_facts(source.config, support),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "base_model": base_model,
            "license": inherited_licence(source.folder, base_model),
        },
        "versions": versions(),
    }


def vision_settings(config: Any, kind: str) -> dict[str, Any]:
    """Return what the runner needs to lay out images, by kind."""
    vision = config.vision_config
    settings: dict[str, Any] = {"kind": kind}
    if kind == "anyres":
        aspect = getattr(config, "vision_aspect_ratio", None)  # 'anyres_max_9'
        settings |= {
            "grid": vision.image_size // vision.patch_size,
            "tile": vision.image_size,
            "pinpoints": [list(point) for point in config.image_grid_pinpoints],
            "max_tiles": int(aspect.rpartition("_")[2]) if aspect else None,
        }
    elif kind == SQUARE:
        settings["tile"] = vision.image_size
    elif kind == "sized":
        settings["side"] = vision.patch_size * getattr(config, "spatial_merge_size", 1)
    elif kind == "patches":
        merge = vision.spatial_merge_size
        window = getattr(vision, "window_size", 0)
        settings |= {"merge": merge, "window": window // merge // vision.patch_size}
    return settings


def own_settings(config: Any, support: Support) -> dict[str, Any]:
    """Return what the runner needs to lay out images of a type that no row knows."""
    form = support.pictures
    assert form is not None
    if support.kind in ("anyres", "sized"):
        return vision_settings(config, support.kind)
    settings: dict[str, Any] = {"kind": support.kind}
    if support.kind == "grids":
        settings |= {"grid": form.grid, "merges": form.merges, "merge": form.merge, "patch": list(form.tile)}
        settings |= {"asked": form.host_inputs()}
    return settings


def onnxruntime_version() -> str:
    """Return the version of onnxruntime, of its two distributions the one that is imported."""
    import onnxruntime

    return str(onnxruntime.__version__)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "onnx", "onnxscript")
    return {
        "lvlm-exporter": __version__,
        "onnxruntime": onnxruntime_version(),
        **{name: version(name) for name in names},
    }


def write_manifest(folder: Path, manifest: dict[str, Any], hashed: bool = False) -> None:
    """Write onnx.json with the size of every graph file; at the end with the SHA-256 of every file of the folder."""
    files = sorted(graph_files(folder))
    manifest["files"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    if hashed:
        manifest["sha256"] = hashes(folder)
    write_record(folder, manifest)


def write_record(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest as it is: what was measured on graphs that stay the same may have been added."""
    replace_json(folder / MANIFEST, manifest)


def graph_files(folder: Path) -> Iterator[Path]:
    for pattern in GRAPH_FILES:
        yield from folder.glob(pattern)
