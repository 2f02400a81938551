"""onnx.json: what the runner must know of a folder, where it comes from, and how far it is from torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..cards.licence import inherited_licence
from ..cards.model_card import base_model_of
from ..checkpoints.files import hashes
from ..checkpoints.record import BENCHMARK_HEAD, LICENCE, NOT_EMPTY, RATIOS, TIMES, replace_json
from ..checkpoints.shapes import (
    ANYTHING,
    COUNT,
    HASHES,
    INNER_PATH,
    NUMBER,
    TEXT,
    ListOf,
    MapOf,
    Maybe,
    Misfit,
    check,
    one_of,
)
from ..checkpoints.source import Source
from ..errors import InputError
from ..version import __version__
from .graphs.decoder import cache_shape
from .runtime import folder as runner
from .runtime.folder import FORMAT, MANIFEST
from .support import Support, cache_kind, support_of

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

GRAPH_FILES = ("*.onnx", "*.onnx.data")
COMPARISON = {
    "outputs": MapOf({"max": NUMBER, "mean": NUMBER}),
    "tokens": COUNT,
    "equal_tokens": COUNT,
    "left_out?": COUNT,
}
SHAPE = {
    "files": MapOf(COUNT, key=INNER_PATH),
    "sha256": HASHES,
    "model_type": TEXT,
    "device": one_of("cpu", "cuda"),
    "dtype": one_of("float32", "float16"),
    "opset": COUNT,
    "quantize": Maybe(TEXT),
    "layers": COUNT,
    "heads": COUNT,
    "head_size": COUNT,
    "hidden_size": COUNT,
    "image_token_id": COUNT,
    "pad_token_id": COUNT,
    "first_position": COUNT,
    "mrope": ANYTHING,
    "blocks": ANYTHING,
    "vision": {"kind": TEXT},
    "source": {"name": TEXT, "revision": Maybe(TEXT), "base_model": Maybe(TEXT), "license": LICENCE},
    "versions": dict.fromkeys(("lvlm-exporter", "torch", "transformers", "onnxruntime"), TEXT),
    "validation": COMPARISON,
    "quantized?": COMPARISON,
    "router?": {"presets": MapOf(ANYTHING), "default": TEXT},
    "benchmarks?": ListOf(BENCHMARK_HEAD),
}


def is_onnx(path: str | Path) -> bool:
    """The folder is one that `lvlm-exporter onnx` wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path, whole: bool = True) -> dict[str, Any]:
    """Return onnx.json, checked in full.

    Args:
        whole: raise where a graph file is missing or of another size, too.
    Raises: InputError where it is no folder of `lvlm-exporter onnx`, or a part of it is not what it should be.
    """
    manifest = runner.read_manifest(folder, whole)
    try:
        check(manifest, SHAPE)
        for name in {"validation", "quantized"} & manifest.keys():
            if not manifest[name]["outputs"]:
                raise Misfit(f"'{name}.outputs' is empty")
        for index, entry in enumerate(manifest.get("benchmarks", [])):
            _check_benchmark(entry, f"benchmarks[{index}]")
    except Misfit as misfit:
        raise InputError(f"{folder / MANIFEST} is damaged ({misfit}): export again.") from misfit
    return manifest


def _check_benchmark(entry: dict[str, Any], where: str) -> None:
    check(entry.get("models"), NOT_EMPTY, f"{where}.models")
    model = {"path": TEXT, "budget": Maybe(MapOf(ANYTHING)), "runtime": TEXT, "batches": NOT_EMPTY}
    check(entry["models"], ListOf(model), f"{where}.models")
    figures = {**TIMES, "vision_ms": NUMBER, "kv_bytes": COUNT, "ratio_to_reference": Maybe(RATIOS)}
    for number, each in enumerate(entry["models"]):
        check(each["batches"], ListOf(figures), f"{where}.models[{number}].batches")


def differing_facts(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return what a manifest says of its model otherwise than the folder's config.json, a sentence each.

    The hashes in a manifest cover every file but itself: a fact that the runner goes by has to stand in both.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text, support = config.get_text_config(), support_of(config)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        facts = {
            **model_facts(config, support),
            "layers": text.num_hidden_layers,
            "heads": heads,
            "head_size": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            "cache": cache_kind(config, manifest["dtype"], manifest["device"]),
        }
    except Exception as error:  # whatever a class of transformers makes of its settings
        return [f"its config.json is not accepted by transformers ({type(error).__name__})"]
    return [
        f"{MANIFEST} says {name}={manifest.get(name)!r:.80}, config.json {value!r:.80}"
        for name, value in facts.items()
        if manifest.get(name) != value
    ]


def model_facts(config: Any, support: Support) -> dict[str, Any]:
    """What the runner goes by and a configuration says."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return {
        "model_type": config.model_type,
        "hidden_size": config.get_text_config().hidden_size,
        "image_token_id": config.image_token_id,
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "first_position": support.first_position,
        "mrope": support.mrope,
        "blocks": support.blocks,
        "vision": vision_settings(config, support.kind),
    }


def describe(model: Any, source: Source, support: Support, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an export; `settings` are device, dtype, opset, quantize and cache."""
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
    """What the runner needs to lay out images, by kind."""
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
    elif kind == "sized":
        settings["side"] = vision.patch_size * getattr(config, "spatial_merge_size", 1)
    elif kind == "patches":
        merge = vision.spatial_merge_size
        window = getattr(vision, "window_size", 0)
        settings |= {"merge": merge, "window": window // merge // vision.patch_size}
    return settings


def onnxruntime_version() -> str:
    """Of its two distributions, the one that is imported."""
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
    manifest["files"] = {path.name: path.stat().st_size for path in files}
    if hashed:
        manifest["sha256"] = hashes(folder)
    write_record(folder, manifest)


def write_record(folder: Path, manifest: dict[str, Any]) -> None:
    """As it is: what was measured on graphs that stay the same may have been added."""
    replace_json(folder / MANIFEST, manifest)


def graph_files(folder: Path) -> Iterator[Path]:
    for pattern in GRAPH_FILES:
        yield from folder.glob(pattern)
