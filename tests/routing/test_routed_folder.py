"""Routed folders on disk: their default preset, and modeling files of earlier releases."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.routed import Case, copied, make_case
from published import PUBLISHED
from transformers import AutoModelForImageTextToText

import exporter
from exporter.checkpoints.source import open_source
from exporter.errors import InputError
from exporter.modeling.released import RELEASED
from exporter.routing.folder import (
    MODELING_FILES,
    MODELING_FOLDER,
    has_earlier_code,
    load_routed,
    update_modeling_files,
    with_current_code,
)


@pytest.fixture(scope="module")
def case(tiny, tmp_path_factory) -> Case:
    return make_case("llava", tiny("llava"), tmp_path_factory.mktemp("routed") / "model", drop_at=1)


@pytest.fixture
def folder(case, tmp_path) -> Path:
    return copied(case.folder, tmp_path / "model")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_record(folder: Path, **files: str) -> None:
    """Write the record of another routed checkpoint, with the files of this one."""
    record = json.loads((PUBLISHED / "0.1.0" / "llava-routed" / "compression.json").read_text())
    record["source"]["files"] = {"config.json": "0" * 64}
    record["measured"]["files"] = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()} | files
    record["router"]["settings"]["default"] = "off"
    (folder / "compression.json").write_text(json.dumps(record))


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


# --- the default ------------------------------------------------------------------------------------------------------


def test_a_default_is_what_calls_without_a_budget_run_under(case, folder):
    before = read(folder)
    exporter.set_default(folder, "fast")
    after = read(folder)
    assert after["router"].pop("default") == "fast" and before["router"].pop("default") == "off"
    assert after == before
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    batch = case.prompts()
    expected = case.model.generate(**batch, preset="fast", max_new_tokens=4)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), expected)
    exporter.set_default(str(folder), "off")
    assert read(folder)["router"]["default"] == "off"


def test_the_record_follows_the_default(folder):
    write_record(folder)
    exporter.set_default(folder, "quality")
    record = read(folder, "compression.json")
    assert record["measured"]["files"]["config.json"] == sha256(folder / "config.json")
    assert record["source"]["files"]["config.json"] == "0" * 64  # of another file
    assert record["router"]["settings"]["default"] == "quality"
    assert record["router"]["reference"]["preset"] == "off"  # under which its tokens were answered
    exporter.set_default(folder, "fast")
    assert read(folder, "compression.json")["router"]["reference"]["preset"] == "off"
    assert not list(folder.glob("*.partial"))


def test_an_edited_configuration_is_not_made_to_verify(folder):
    write_record(folder, **{"config.json": "1" * 64})
    before = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"config\.json is not the file that compression\.json records"):
        exporter.set_default(folder, "fast")
    assert before == {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        (
            "nonsense",
            {},
            r"preset 'nonsense' is not known: .* has off, quality, balanced, fast, token-only, layer-only",
        ),
        ("fast", {"router": None}, "has no router, and therefore no presets"),
        ("fast", {"router": {"presets": 3}}, "has no router"),
    ],
)
def test_a_default_that_cannot_be_set_is_refused(preset, change, message, folder):
    config = read(folder) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        exporter.set_default(folder, preset)
    assert read(folder) == config


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        exporter.set_default(tmp_path / "nowhere", "fast")
    with pytest.raises(InputError, match=r"has no config\.json"):
        exporter.set_default(tmp_path, "fast")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list, not a JSON object"):
        exporter.set_default(tmp_path, "fast")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        exporter.set_default(tmp_path, "fast")


# --- modeling files of earlier releases -------------------------------------------------------------------------------


@pytest.fixture
def published(folder, monkeypatch) -> Path:
    """A folder with the one modeling file of an earlier release, which does not run any more."""
    for name in MODELING_FILES:
        (folder / name).unlink()
    old = folder / MODELING_FILES[0]
    old.write_text("raise SystemExit('this was run')\n")
    monkeypatch.setitem(RELEASED, sha256(old), (old.name, "0.0.1"))
    write_record(folder)
    return folder


def test_a_published_folder_runs_with_the_present_code(case, published):
    """What this package loads, it runs by its own code; others get a view of the folder with that code in it."""
    batch = case.prompts()
    expected = case.model.generate(**batch, preset="fast", max_new_tokens=4)
    model = load_routed(open_source(str(published)), "cpu", torch.float32)
    assert torch.equal(model.generate(**batch, preset="fast", max_new_tokens=4), expected)
    assert has_earlier_code(published) and not has_earlier_code(case.folder)
    with with_current_code(published) as view:
        assert sha256(view / MODELING_FILES[0]) == sha256(MODELING_FOLDER / MODELING_FILES[0])
        model = AutoModelForImageTextToText.from_pretrained(view, trust_remote_code=True)
        assert torch.equal(model.generate(**batch, preset="fast", max_new_tokens=4), expected)
    assert not view.exists() and "this was run" in (published / MODELING_FILES[0]).read_text()


def test_a_folder_with_other_code_is_shown_as_it_is(case, folder):
    with with_current_code(folder) as view:
        assert view == folder
    (folder / MODELING_FILES[0]).write_text("raise SystemExit('this was run')\n")
    assert not has_earlier_code(folder)
    with with_current_code(folder) as view:
        assert view == folder


def test_modeling_files_are_brought_up_to_date(case, published):
    assert update_modeling_files(published) == list(MODELING_FILES)
    files = read(published, "compression.json")["measured"]["files"]
    for name in MODELING_FILES:
        assert (published / name).read_bytes() == (MODELING_FOLDER / name).read_bytes()
        assert files[name] == sha256(published / name)
    assert update_modeling_files(published) == []
    model = AutoModelForImageTextToText.from_pretrained(published, trust_remote_code=True)
    batch = case.prompts()
    assert torch.equal(model.generate(**batch, max_new_tokens=4), case.model.generate(**batch, max_new_tokens=4))


def test_files_that_no_release_shipped_are_left_alone(folder, tiny):
    (folder / MODELING_FILES[0]).write_text("print('mine')\n")
    with pytest.raises(InputError, match="is no file that a release shipped: it was edited, and is left alone"):
        update_modeling_files(folder)
    assert (folder / MODELING_FILES[0]).read_text() == "print('mine')\n"
    plain = shutil.copytree(tiny("llava"), folder.parent / "plain")
    with pytest.raises(InputError, match="has no router, and therefore no modeling files"):
        update_modeling_files(plain)
