"""Publishing ONNX graphs: refused once they are not those that were compared with torch, loaded by name otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures.hub import NAME, pushed, refused
from tiny_models import inputs

import exporter
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.errors import InputError


@pytest.fixture
def graphs(exported) -> Path:
    return exported("llava")[1]


@pytest.fixture
def damaged(graphs, tmp_path) -> Path:
    """One bit of a weight is another."""
    folder = Path(shutil.copytree(graphs, tmp_path / "damaged"))
    weights = bytearray((folder / "decoder.onnx.data").read_bytes())
    weights[100] ^= 1
    (folder / "decoder.onnx.data").write_bytes(weights)
    return folder


def test_graphs_are_published_and_loaded_by_name(here, graphs, capsys):
    assert NAME in pushed(capsys, graphs, NAME)
    published = here.repos[NAME].files()
    assert {"vision.onnx", "decoder.onnx", "onnx.json", "tokenizer.json", "config.json"} <= set(published)
    card = published["README.md"].decode()
    assert f'exporter.onnx.load("{NAME}")' in card and f'AutoProcessor.from_pretrained("{NAME}"' in card
    assert "library_name: onnx" in card
    batch = inputs(load_processor(graphs), batch=2)
    answers = [exporter.onnx.load(place).generate(**batch, max_new_tokens=4) for place in (graphs, NAME)]
    assert np.array_equal(*answers)
    assert "nothing to push" in pushed(capsys, graphs, NAME)
    assert exporter.verify(NAME).holds


def test_a_card_edited_by_hand_is_loaded_by_its_new_name(here, graphs, capsys, tmp_path):
    folder = shutil.copytree(graphs, tmp_path / "mine")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMine.\n")
    assert "edited by hand" in pushed(capsys, folder, NAME)
    card = here.repos[NAME].files()["README.md"].decode()
    assert card.endswith("Mine.\n") and f'exporter.onnx.load("{NAME}")' in card


def test_graphs_that_torch_was_not_compared_with(here, damaged, capsys):
    assert "decoder.onnx.data is not the file that was made" in refused(capsys, damaged, NAME, code=1)
    assert NAME not in here.repos


@pytest.mark.clean_process
def test_verify_knows_graphs(graphs, damaged, capsys):
    assert main(["verify", str(graphs)]) == 0
    assert "those that were compared with torch (best token equal in" in capsys.readouterr().out
    assert main(["verify", str(damaged)]) == 1
    assert "decoder.onnx.data" in capsys.readouterr().err
    assert exporter.verify(graphs).holds and not exporter.verify(damaged).holds
    assert exporter.card(graphs).read_text().startswith("---")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[2]", "it is no JSON object"),
        ('{"format": 3}', "it lists no files"),
        ('{"format": 3, "files": {}}', "it has no 'sha256'"),
    ],
)
def test_a_manifest_with_gaps(content, message, here, tmp_path, capsys):
    (tmp_path / "onnx.json").write_text(content)
    assert main(["verify", str(tmp_path)]) == 2
    assert f"onnx.json is damaged ({message}): export again" in capsys.readouterr().err
    assert message in refused(capsys, tmp_path, NAME)


def test_a_checkpoint_is_not_overwritten_by_graphs(here, graphs, capsys):
    pushed(capsys, graphs, NAME)
    main_branch = here.repos[NAME].refs["main"]
    files = here.repos[NAME].commits[main_branch].files
    files["compression.json"] = files.pop("onnx.json")
    assert "holds a checkpoint (compression.json): name another" in refused(capsys, graphs, NAME)


def test_a_name_that_is_neither_folder_nor_repository(here):
    with pytest.raises(InputError, match=r"no folder tester/nothing, and the hub gives no repository .*NotFound"):
        exporter.onnx.load("tester/nothing")
    with pytest.raises(InputError, match="no folder that `lvlm-exporter onnx` wrote"):
        exporter.onnx.load("nothing")
