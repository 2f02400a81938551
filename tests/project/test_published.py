"""Folders that earlier releases published say what they said, under today's code and today's transformers."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from published import answers, expected, folders, new_tokens

FOLDERS = folders()
RENAMED = (5, 24)  # from here on 0.1.0's own modeling file, which lies in its folders, is wrong


def newer() -> bool:
    return tuple(int(part) for part in version("transformers").split(".")[:2]) >= RENAMED


def test_every_kind_of_every_release_is_kept():
    releases = {folder.parent.name for folder in FOLDERS}
    assert "0.1.0" in releases
    for release in releases:
        kinds = {folder.name.partition("-")[2] for folder in FOLDERS if folder.parent.name == release}
        assert kinds == {"plain", "routed", "onnx", "onnx-routed"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_published_folder_says_what_it_said(folder):
    known = expected(folder)
    made = answers(folder, [entry["arguments"] for entry in known], new_tokens(folder))
    differing = [entry["budget"] for entry, tokens in zip(known, made, strict=True) if tokens != entry["tokens"]]
    assert not differing
    assert len({json.dumps(entry["tokens"]) for entry in known}) > len(known) // 3, "budgets make a difference"


@pytest.mark.skipif(
    newer(), reason="0.1.0's modeling file does not know the name that transformers 5.24 gave the cache"
)
@pytest.mark.parametrize("folder", [path for path in FOLDERS if path.name.endswith("-routed")], ids=lambda p: p.name)
def test_a_published_routed_checkpoint_runs_by_its_own_file(folder):
    if (folder / "modeling_routed.py").exists():
        known = expected(folder)[:2]
        made = answers(folder, [entry["arguments"] for entry in known], new_tokens(folder), trust_remote_code=True)
        assert made == [entry["tokens"] for entry in known]
