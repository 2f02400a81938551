"""A folder of graphs on disk: its manifest, and sessions of ONNX Runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .model import PROVIDERS
from .prepare import InputError

MANIFEST = "onnx.json"
FORMAT = 3  # 2 had the embeddings of routed folders apart, 1 a graph for every layer that may be skipped


def located(folder: Path | str) -> Path:
    """Return a folder that is there as it is; what could be a repository's name instead, from the hub."""
    if Path(folder).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)):
        return Path(folder)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(folder)))
    except (ImportError, OSError, ValueError) as error:  # a server's own words may quote the token: only the kind
        reason = type(error).__name__
    raise InputError(f"there is no folder {folder}, and the hub gives no repository of that name ({reason}).")


def read_manifest(folder: Path, whole: bool = True) -> dict[str, Any]:
    """Read onnx.json. `whole`: InputError where a file that it lists is missing or of another size."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: it is no folder that `lvlm-exporter onnx` wrote.")
    try:
        manifest = json.loads(path.read_text(), parse_constant=_no_constant)
        json.dumps(manifest, ensure_ascii=False).encode()  # half of a character is in no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): export again.") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is damaged (it is no JSON object): export again.")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: export again.")
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"{path} is damaged (it lists no files): export again.")
    for name, size in manifest["files"].items() if whole else ():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            actual = f"{file.stat().st_size} bytes" if file.is_file() else "not there"
            raise InputError(f"{file} is {actual} instead of {size} bytes: the folder is incomplete, copy it again.")
    return manifest


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def check_provider(device: str) -> None:
    if device not in PROVIDERS:
        raise InputError(f"device '{device}' is not known: {', '.join(PROVIDERS)}.")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime is not installed: pip install onnxruntime (onnxruntime-gpu for CUDA).") from error
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} has no {PROVIDERS[device]}: pip uninstall onnxruntime, then "
            "pip install onnxruntime-gpu."
        )
