"""What goes along with the weights, where links lead, and where a folder is made."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from fixtures.checkpoints import recipe
from fixtures.made_folders import edit
from transformers import AutoModelForImageTextToText

from exporter.checkpoints import files
from exporter.checkpoints.files import (
    companions,
    hashes,
    is_document,
    leads_out,
    left_behind,
    replace_text,
    without_auto_map,
)
from exporter.checkpoints.source import open_source
from exporter.checkpoints.staging import check_space, check_target, staged, staging_directory
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.recipe import Method

STALE = (
    "params.json",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors.index.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "trainer_state.json",
    "training_args.json",
    "wandb_credentials.json",
    "my_secret_notes.txt",
    "requirements.txt",
    "tokenizer.json.bak",
    "evil.py",
    "vocab_of_mine.json",
)
WANTED = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/tools.jinja",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "tekken.json",
    "chat_template.jinja",
)


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny("llava"), tmp_path / "model"))


def compressed(model: Path, questions: Path, out: Path) -> Path:
    made = recipe(model, questions, budget=LayerBudget(layers=(3,)), fold=Method("none"))
    return compress(made, out)


# --- companions -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unverified")
def test_only_what_transformers_reads_goes_along(model, questions, tmp_path, caplog):
    for name in (*STALE, *WANTED[:-1]):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    template = json.loads((model / "chat_template.json").read_text())["chat_template"]
    (model / "chat_template.jinja").write_text(template)
    (model / "chat_template.json").unlink()  # transformers wants one form only
    before = {name: (model / name).read_bytes() for name in WANTED}
    with caplog.at_level(logging.WARNING):
        out = compressed(model, questions, tmp_path / "out")
    assert not [name for name in STALE if (out / name).exists()]
    assert {name: (out / name).read_bytes() for name in WANTED} == before
    (line,) = [message for message in caplog.messages if "left behind" in message]
    assert "evil.py, hf_quant_config.json" in line and line.endswith("and 4 more")


def test_vocabulary_files_that_the_tokenizer_class_names(model):
    edit(model / "tokenizer_config.json", lambda data: data.update(tokenizer_class="BertJapaneseTokenizer"))
    for name in ("vocab.txt", "spiece.model", "notes.txt"):
        (model / name).write_text("x")
    (model / "emoji.json").write_text("{}")
    edit(model / "tokenizer_config.json", lambda data: data.update(tokenizer_class="GPTNeoXJapaneseTokenizer"))
    kept = companions(model).kept
    assert {"vocab.txt", "emoji.json"} <= set(kept) and "notes.txt" not in kept


def test_nothing_is_said_where_nothing_stays_behind(tiny):
    assert left_behind(companions(tiny("llava")).left) == ""
    assert left_behind(["README.md", "assets/a.png", "model.safetensors", "x/a", "x/b"]).endswith(": x/")


@pytest.mark.usefixtures("unverified")
def test_an_auto_map_does_not_go_along_without_its_file(model, questions, tmp_path):
    """A natively supported model: the plain class is what is verified, and what trust_remote_code loads, too."""
    names = {"AutoConfig": "configuration_x.X", "AutoModelForImageTextToText": "user/other--modeling_x.X"}
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        edit(model / file, lambda data: data.update(auto_map=names))
    for module in ("configuration_x", "modeling_x"):
        (model / f"{module}.py").write_text("raise SystemExit('it was run')")
    out = compressed(model, questions, tmp_path / "out")
    assert not [path for path in out.rglob("*.json") if '"auto_map"' in path.read_text()] and not list(out.glob("*.py"))
    AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    untouched = json.loads((model / "processor_config.json").read_text())
    assert json.loads((out / "processor_config.json").read_text()) == without_auto_map(untouched)
    assert without_auto_map({"a": [{"b": 1, "auto_map": 2}], "auto_map": 3}) == {"a": [{"b": 1}]}


def test_hashes_leave_the_record_and_documents_out(tmp_path):
    for name in ("README.md", "compression.json", "notes.txt", "a.png", ".hidden", "x.partial"):
        (tmp_path / name).write_text("x")
    for name in ("config.json", "merges.txt", "LICENSE", "router/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert set(hashes(tmp_path)) == {"config.json", "merges.txt", "LICENSE", "router/model.safetensors"}


@pytest.mark.parametrize(
    ("name", "document"),
    [("README.md", True), ("LICENSE", True), ("LICENSE.py", False), ("NOTICE.json", False), ("vocab.txt", False),
     ("assets/a.PNG", True), ("a.safetensors", False), ("x.md.py", False), ("chat_template.jinja", False)],
)  # fmt: skip
def test_documents(name, document):
    assert is_document(name) is document


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_the_hubs_cache_is_one_folder(tmp_path):
    repository = tmp_path / "models--user--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "b").write_text("x")
    (tmp_path / "c").write_text("x")
    (snapshot / "inside").symlink_to("../../blobs/b")
    (snapshot / "outside").symlink_to("../../../c")
    assert not leads_out(snapshot / "inside", snapshot) and leads_out(snapshot / "outside", snapshot)
    copy = Path(shutil.copytree(snapshot, tmp_path / "copy", symlinks=True))
    (copy / "inside").unlink()
    (copy / "inside").symlink_to(repository / "blobs" / "b")
    assert leads_out(copy / "inside", copy)  # no snapshot itself


def test_a_companion_that_is_a_link_out_of_the_folder(model, tmp_path):
    (tmp_path / "secret").write_text("s")
    (model / "shadow.json").symlink_to("/etc/passwd")
    assert "shadow.json" in companions(model).left
    (model / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"merges.txt is a link that leads out of the folder: put the file itself"):
        open_source(str(model)).companions()


def test_writing_does_not_follow_a_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "mine").symlink_to(tmp_path / "theirs")
    replace_text(tmp_path / "mine", "new")
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / "mine").read_text() == "new"
    assert not (tmp_path / "mine").is_symlink() and len(list(tmp_path.iterdir())) == 2


# --- where a folder is made -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dangling", [False, True])
def test_a_target_that_is_a_link_is_made_where_it_leads(dangling, tmp_path):
    (tmp_path / "large").mkdir()
    real, link = tmp_path / "large" / "disk", tmp_path / "out"
    if not dangling:
        real.mkdir()
    link.symlink_to(real)
    with staged(link) as stage:
        assert stage.parent == tmp_path / "large"
        (stage / "file").write_text("x")
    assert link.is_symlink() and (link / "file").read_text() == "x" and list((tmp_path / "large").iterdir()) == [real]


def test_links_that_can_be_no_target_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "out").symlink_to("full")
    with pytest.raises(InputError, match=f"{tmp_path}/out exists already"):
        check_target(tmp_path / "out")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError, match="circle is a link that leads nowhere"):
        check_target(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "a" / "b")
    with pytest.raises(InputError, match=f"{tmp_path}/a is no folder: make it first"):
        check_target(tmp_path / "nowhere")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(InputError, match="disk is a mount point"):
        check_target(tmp_path / "disk")


@pytest.mark.usefixtures("unverified")
def test_compress_into_a_link(model, questions, tmp_path, capsys):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to("big")
    arguments = ["--drop-layers", "1", "--localizer", "last", "--fold", "none", "--calibration", str(questions)]
    assert main(["compress", str(model), "--out", str(tmp_path / "out"), *arguments, "--samples", "2"]) == 0
    assert (tmp_path / "big" / "config.json").exists() and (tmp_path / "out").is_symlink()
    assert "partial" not in capsys.readouterr().err


def test_messages_name_no_temporary_folder(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with staging_directory(tmp_path / "out") as room, pytest.raises(InputError, match=r"^inner needs 0\.00 GB"):
        check_space(room / "inner", 10)


def test_a_hash_is_remembered_as_long_as_the_file_stays(tmp_path, monkeypatch):
    path, read = tmp_path / "file", []
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or str(len(read)))
    path.write_text("one")
    now = path.stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: now + 1000)  # a moment later: a change now would not show
    assert [files.hash_once(path) for _ in range(2)] == ["1", "2"]
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**9)
    assert [files.hash_once(path) for _ in range(2)] == ["3", "3"]
    path.write_text("more")
    assert files.hash_once(path) == "4"
