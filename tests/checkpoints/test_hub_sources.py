"""Checkpoints by their name on the hub (a loopback one): every file that is needed comes along, or one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import Blob, LoopbackHub, Repo
from tiny_models import build

from exporter.checkpoints.source import open_source
from exporter.errors import InputError

NAME = "user/model"


def put(server: LoopbackHub, folder: Path, leave_out: str = "", **more: bytes) -> None:
    """A repository of the folder's files, some left out by a pattern, some more by their names (__ for a dot)."""
    files = {
        path.name: path.read_bytes() for path in folder.iterdir() if not (leave_out and re.search(leave_out, path.name))
    }
    files |= {name.replace("__", "."): content for name, content in more.items()}
    repository = Repo(NAME, False)
    repository.commit("main", {name: Blob(content, False) for name, content in files.items()}, "x")
    server.repos[NAME] = repository


def test_shards_of_any_name_are_downloaded(here, tmp_path):
    folder = build("llava", tmp_path / "model", max_shard_size="300KB")
    index = folder / "model.safetensors.index.json"
    for path in folder.glob("model-*.safetensors"):
        path.rename(folder / path.name.replace("model-", "pytorch_model-"))
    index.write_text(index.read_text().replace("model-0", "pytorch_model-0"))
    put(here, folder)
    on_hub = open_source(NAME)
    assert on_hub.weights.entries.keys() == open_source(str(folder)).weights.entries.keys()
    assert on_hub.revision == here.repos[NAME].refs["main"]


@pytest.mark.parametrize(
    ("leave_out", "more", "expected"),
    [
        ("safetensors", {"pytorch_model__bin": b"x"}, "user/model holds pickled weights only"),
        ("safetensors", {"model-q4__gguf": b"x"}, "user/model holds GGUF weights only"),
        (
            "safetensors",
            {"adapter_config__json": b"{}", "adapter_model__safetensors": b"x"},
            "an adapter .* no weights",
        ),
        ("", {"adapter_config__json": b"{}"}, "weights and an adapter beside them"),
        ("safetensors", {}, "user/model holds no weights"),
        ("config", {}, "no config.json"),
    ],
)
def test_what_a_repository_has_instead_of_weights(leave_out, more, expected, here, tiny):
    put(here, tiny("llava"), leave_out, **more)
    with pytest.raises(InputError, match=expected):
        open_source(NAME)


def test_a_token_that_no_header_takes(here, tiny, monkeypatch):
    token = "hf_schlüssel"
    put(here, tiny("llava"))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match="your token for the hub holds a character") as refused:
        open_source(NAME)
    assert token not in str(refused.value)


def test_offline(here: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(here, tiny("llava"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"not in the local hub cache|HF_HUB_OFFLINE is set"):
        open_source(NAME)
