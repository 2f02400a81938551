"""Whose code a folder would run: found before anything of it is loaded.

A folder's own Python runs only where `trust_remote_code=True` is given to transformers. What this package writes names
its own modeling files there, and those are known by their SHA-256: whatever else a folder would run is foreign.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..modeling.released import is_released
from .files import RECORDS, leads_out, listed

logger = logging.getLogger(__name__)
HOW_TO_TRUST = "it is not run without --trust-remote-code"
NATIVE_CODE = (".so", ".pyd", ".dll", ".dylib")
NEVER_WRITTEN = ("adapter_config.json",)  # with it transformers loads another model, the adapter's base
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
LARGE = ("tokenizer.json", "vocab.json", "model.safetensors.index.json", *RECORDS)  # in which nobody looks for code


def foreign_code(folder: Path) -> list[str]:
    """Return what a folder would run that no release of this package shipped, a sentence each; [] if nothing."""
    return foreign_files(folder) + foreign_names(folder)


def foreign_files(folder: Path) -> list[str]:
    """Return the folder's own files that are foreign code."""
    return [
        f"{name} is not a file that a release of lvlm-exporter shipped: {HOW_TO_TRUST}"
        for name, path in listed(folder).items()
        if (path.suffix.lower() == ".py" and not (_inside(path, folder) and is_released(path)))
        or path.suffix.lower() in NATIVE_CODE
    ]


def foreign_names(folder: Path) -> list[str]:
    """Return what configurations of the folder name that is code from elsewhere, or code that is not there."""
    names = []
    for name, path in listed(folder).items():
        if path.suffix == ".json" and path.name not in LARGE and _inside(path, folder):
            names += [f"{name} {reason}: {HOW_TO_TRUST}" for reason in dict.fromkeys(_named_code(path, folder))]
    return names


def warn_of_foreign_code(folder: Path, name: str) -> None:
    """Log that what is measured is this package's code, where a user of the folder would run other code."""
    if names := foreign_files(folder):
        logger.warning("%s: %s; what runs here is lvlm-exporter's own modeling file", name, names[0])


def _inside(path: Path, folder: Path) -> bool:
    return path.is_file() and not leads_out(path, folder)


def replaced_weights(folder: Path) -> list[str]:
    """Return what would be loaded in place of the safetensors files or on top of them, a sentence each."""
    return [
        f"{name} is nothing that lvlm-exporter writes: it changes what is loaded"
        for name, path in listed(folder).items()
        if path.name in NEVER_WRITTEN or path.suffix.lower() in PICKLES or path.name.startswith("adapter_model.")
    ]


def _named_code(path: Path, folder: Path) -> Iterator[str]:
    """Yield what a JSON file names that is code from elsewhere, or code that is not there."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return  # it is loaded by nobody as it is
    for key, value in _entries(data):
        if key == "auto_map":
            yield from (reason for name in _texts(value) if (reason := _elsewhere(name, folder)))
        elif key.endswith("_implementation"):
            yield from (f"asks for the kernel {name} of the hub" for name in _texts(value) if "/" in name)


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth."""
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value: a class's name, or those of a slow and a fast tokenizer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _elsewhere(name: str, folder: Path) -> str | None:
    """Return what is wrong with a class that an auto_map names, None if it is in a file of the folder."""
    if "--" in name:
        return f"names code of another repository ({name})"
    module = name.rpartition(".")[0]
    if not module.isidentifier() or not (folder / f"{module}.py").is_file():
        return f"names code that is not in the folder ({name})"
    return None
