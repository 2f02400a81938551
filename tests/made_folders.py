"""Folders as they come out of compress, route and onnx, and what a stranger or an accident does to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_compress import recipe

from exporter.checkpoints.files import hashes
from exporter.modeling.modeling_routed import class_name
from exporter.modeling.released import shipped_files
from exporter.pipeline import compress
from exporter.routing.folder import AUTO_CLASS


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


def rehash(folder: Path) -> None:
    """What a stranger does who knows the format: the record holds the hashes of whatever lies there."""
    edit(folder / "compression.json", lambda record: record["measured"].update(files=hashes(folder)))


def plain_folder(tiny: Any, questions: Path, place: Path) -> Path:
    """A compressed checkpoint that has not been verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.pipeline.require", lambda *_: None)
        return compress(recipe(tiny("llava"), questions), place / "small")


def routed_copy(plain: Path, folder: Path) -> Path:
    """A copy with all that a routed folder consists of but trained weights: nothing in it is loaded in a test."""
    shutil.copytree(plain, folder)
    for path in shipped_files():
        shutil.copy(path, folder)
    name = f"modeling_routed.{class_name('llava')}"
    edit(folder / "config.json", lambda config: config.update(auto_map={AUTO_CLASS: name}, router={"format": 1}))
    (folder / "router").mkdir()
    shutil.copy(min(folder.glob("model*.safetensors")), folder / "router" / "model.safetensors")
    router = {
        "settings": {"drop_at": 1, "candidates": [3], "presets": {"fast": {"keep_layers": 3}}, "default": "fast"},
        "parameters": 10,
        "questions": 8,
        "held_out": 2,
        "curve": [{"step": 0, "loss": 1.0}],
        "reference": {"tokens": [1], "margins": [0.5]},
    }
    edit(folder / "compression.json", lambda record: record.update(router=router))
    rehash(folder)
    return folder
