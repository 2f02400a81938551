"""The promises of SECURITY.md, each with its test."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.made_folders import edit, plain_folder, rehash, routed_copy
from loopback_hub import OWNER

import exporter
from exporter.checkpoints import verification
from exporter.checkpoints.record import check_updatable, read_record, write_record
from exporter.checkpoints.source import open_source
from exporter.checkpoints.trust import foreign_code, warn_of_foreign_code
from exporter.checkpoints.verification import verify
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.models.loading import load_model
from exporter.publishing.push import push
from exporter.recipe import load_recipe
from exporter.routing.folder import load_routed

ROOT = Path(__file__).parents[2]
AUTO = "AutoModelForImageTextToText"


def test_each_promise_names_tests_that_exist():
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 8
    for row in rows:
        named = re.findall(r"`tests/([\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert named, row
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


@pytest.fixture(scope="module")
def made(tiny, questions, tmp_path_factory) -> Path:
    return plain_folder(tiny, questions, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def routed(made, tmp_path_factory) -> Path:
    return routed_copy(made, tmp_path_factory.mktemp("routed") / "routed")


@pytest.fixture
def folder(routed, tmp_path) -> Path:
    return Path(shutil.copytree(routed, tmp_path / "small"))


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """The folders that were loaded in a clean process, which does not run here."""
    started: list[Path] = []

    def note(folder: Path, device: str) -> tuple[tuple[str, ...], dict[str, Any]]:
        started.append(folder)
        return (), {}

    monkeypatch.setattr(verification, "_in_clean_process", note)
    return started


def evil(place: Path) -> str:
    """Python that leaves a trace where it runs."""
    return f"open({str(place / 'RAN')!r}, 'w')\nfrom transformers import LlavaForConditionalGeneration as Evil\n"


def with_evil(name: str = "evil.py", auto_map: str | None = "evil.Evil") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(evil(folder.parent))
        if auto_map is not None:
            edit(folder / "config.json", lambda config: config.update(auto_map={AUTO: auto_map}))

    return change


def tampered(folder: Path) -> None:
    path = folder / "modeling_routed.py"
    path.write_text(path.read_text() + evil(folder.parent))


def named_in(file: str, value: Any, *inside: str) -> Callable[[Path], None]:
    """A configuration that names code."""

    def change(folder: Path) -> None:
        def put(data: dict[str, Any]) -> None:
            for key in inside:
                data = data.setdefault(key, {})
            data["auto_map"] = value

        edit(folder / file, put)

    return change


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a class of its own": (with_evil(), "evil.py is not a file that a release"),
    "a tampered modeling file": (tampered, "modeling_routed.py is not a file that a release"),
    "a module beside it": (with_evil("routed_more.py", None), "routed_more.py is not a file that a release"),
    "generate replaced": (with_evil("custom_generate/generate.py", None), "custom_generate/generate.py is not a file"),
    "another repository": (
        named_in("config.json", {AUTO: "user/other--modeling.Evil"}),
        "config.json names code of another repository (user/other--modeling.Evil)",
    ),
    "a tokenizer": (
        named_in("tokenizer_config.json", {"AutoTokenizer": ["user/x--t.Slow", None]}),
        "tokenizer_config.json names code of another repository (user/x--t.Slow)",
    ),
    "an image processor": (
        named_in("processor_config.json", {"AutoImageProcessor": "gone.Evil"}, "image_processor"),
        "processor_config.json names code that is not in the folder (gone.Evil)",
    ),
    "a path": (
        named_in("config.json", {AUTO: "../evil.Evil"}),
        "config.json names code that is not in the folder (../evil.Evil)",
    ),
    "a kernel": (
        lambda f: edit(f / "config.json", lambda config: config.update(attn_implementation="user/kernel")),
        "config.json asks for the kernel user/kernel of the hub",
    ),
    "a library": (lambda f: (f / "router/x.so").write_bytes(b"\x7fELF"), "router/x.so is not a file that a release"),
    "a key in disguise": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json")
            .read_text()
            .replace('"modeling_routed.', '"user/x--m.')
            .replace("auto_map", r"auto\u005fmap")
        ),
        "config.json names code of another repository (user/x--m.",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_code_is_found_and_not_run(what, folder, loaded, capsys):
    change, problem = FOREIGN[what]
    assert foreign_code(folder) == [] and verify(folder).holds and loaded == [folder]
    change(folder)
    rehash(folder)  # the record is a stranger's, too
    found = verify(folder)
    assert any(problem in told and "--trust-remote-code" in told for told in found.problems), found.problems
    for command in (["verify", folder], ["push", folder, f"{OWNER}/name", "--dry-run"]):
        assert main([str(part) for part in command]) == 1
        assert problem in capsys.readouterr().err
    assert loaded == [folder] and not (folder.parent / "RAN").exists()


def test_a_stranger_who_knows_the_format(made, tmp_path):
    """The case that was seen: a key in the record and an auto_map. Nothing here stands in for the clean process."""
    folder = Path(shutil.copytree(made, tmp_path / "small"))
    with_evil()(folder)
    edit(folder / "config.json", lambda config: config.update(router={}))
    edit(folder / "compression.json", lambda record: record.update(router=routed_record(record)))
    rehash(folder)
    assert [told for told in verify(folder).problems if "evil.py" in told]
    assert not (tmp_path / "RAN").exists()


def routed_record(record: dict[str, Any]) -> dict[str, Any]:
    settings = {"drop_at": 1, "candidates": [3], "presets": {}, "default": "off"}
    counts = {"parameters": 1, "questions": 8, "held_out": 1}
    return {"settings": settings, **counts, "curve": [{"step": 0, "loss": 1}], "reference": record["reference"]}


def test_trust_has_to_be_given(folder, loaded):
    tampered(folder)
    assert not verify(folder, trust_remote_code=True).holds  # the hash is another: that is no question of trust
    rehash(folder)
    assert not verify(folder).holds and loaded == []
    assert verify(folder, trust_remote_code=True).holds and loaded == [folder]
    assert main(["verify", str(folder)]) == 1
    assert push(folder, f"{OWNER}/name", dry_run=True, trust_remote_code=True).files["modeling_routed.py"]
    with pytest.raises(exporter.CheckFailed, match=r"modeling_routed\.py is not a file that a release"):
        push(folder, f"{OWNER}/name", dry_run=True)


def test_onnx_runs_no_foreign_code(folder, loaded, tmp_path, capsys):
    tampered(folder)
    rehash(folder)
    assert main(["onnx", str(folder), "--out", str(tmp_path / "onnx")]) == 2
    assert "modeling_routed.py is not a file that a release" in capsys.readouterr().err
    assert loaded == [] and not (tmp_path / "RAN").exists() and not (tmp_path / "onnx").exists()


def test_opening_a_folder_runs_nothing_of_it(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llava"), tmp_path / "model"))
    (folder / "evil.py").write_text(evil(tmp_path))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(evil(tmp_path))
    classes = {
        "AutoConfig": "evil.Evil",
        AUTO: "evil.Evil",
        "AutoProcessor": "evil.Evil",
        "AutoTokenizer": ["evil.Evil"] * 2,
    }
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        edit(folder / name, lambda data: data.update(auto_map=classes))
    source = open_source(str(folder))
    load_model(source, "cpu", source.config.dtype)
    load_routed(source, "cpu", source.config.dtype)
    load_processor(folder)
    assert not (tmp_path / "RAN").exists()


def test_nothing_is_loaded_without_a_word_on_trust():
    """An Auto class asks on the terminal where it is told nothing; each call of ours says what it trusts."""
    for path in (ROOT / "exporter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                loads_by_name = "Auto" in ast.unparse(node.func) or ast.unparse(node.func).startswith("auto.")
                told = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
                assert told or not loads_by_name, (path.name, ast.unparse(node))


def test_pickled_weights_are_not_read(tiny, tmp_path, made, loaded):
    folder = Path(shutil.copytree(tiny("llava"), tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds pickled weights only"):
        open_source(str(folder))
    folder = Path(shutil.copytree(made, tmp_path / "small"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    rehash(folder)
    assert "pytorch_model.bin is nothing that lvlm-exporter writes" in verify(folder).problems[0] and not loaded


def test_recipes_make_no_objects(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: !!python/object/apply:os.system ['touch RAN']\n")
    with pytest.raises(InputError, match="is no YAML"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["README.md", "compression.json", "assets", "assets/layer_scores.png"])
def test_cards_and_records_are_not_written_through_links(name, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "small"))
    theirs = tmp_path / "theirs"
    (folder / name).rename(theirs)
    (folder / name).symlink_to(theirs)
    before = theirs.stat().st_mtime_ns
    with pytest.raises(InputError, match="is a link that leads out of the folder"):
        exporter.card(folder)
    with pytest.raises(InputError, match="is a link that leads out of the folder"):
        check_updatable(folder)  # evaluate and bench ask before the work
    write_record(folder, read_record(folder).to_data())  # it takes the link's place
    assert theirs.stat().st_mtime_ns == before and not (folder / "compression.json").is_symlink()


@pytest.mark.parametrize("name", ["README.md", "NOTICE", "assets/mine.png", "tokenizer.json", "more.md"])
def test_push_follows_no_link(name, here, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "small"))
    (tmp_path / "secret").write_text("s")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"small/{name} is a link that leads out of the folder"):
        push(folder, f"{OWNER}/name")
    assert here.repos == {}


@pytest.mark.parametrize("name", ["README.md", "NOTICE", "assets/mine.png"])
def test_push_waits_for_no_pipe(name, here, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "small"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"small/{name} is no regular file, not a file to publish"):
        push(folder, f"{OWNER}/name")
    assert here.repos == {}


def test_push_publishes_what_was_made_and_nothing_else(here, made, tmp_path, capsys):
    folder = Path(shutil.copytree(made, tmp_path / "small"))
    for name in ("notes.txt", "core", "secrets.json", ".env", "results.csv", "NOTICE"):
        (folder / name).write_text("x")
    (folder / "linked").symlink_to("/etc")
    assert main(["push", str(folder), f"{OWNER}/name"]) == 0
    published = set(here.repos[f"{OWNER}/name"].files())
    recorded = set(json.loads((folder / "compression.json").read_text())["measured"]["files"])
    documents = {"README.md", "NOTICE", "compression.json", "assets/layer_scores.png", ".gitattributes"}
    assert published == recorded | documents
    told = capsys.readouterr().out
    assert (
        "not published, since they are no part of the checkpoint: core, linked, notes.txt, results.csv, secrets.json"
        in told
    )


def test_who_measures_is_told_that_the_folders_code_is_another(folder, caplog):
    warn_of_foreign_code(folder, "small")
    assert not caplog.messages
    tampered(folder)
    warn_of_foreign_code(folder, "small")
    assert "small: modeling_routed.py is not a file that a release" in caplog.messages[0]
    (folder / "modeling_routed.py").unlink()  # as it is downloaded by those who run it by the package's own
    warn_of_foreign_code(folder, "small")
    assert len(caplog.messages) == 1
