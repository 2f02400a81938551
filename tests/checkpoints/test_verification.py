"""What is verified is what was made: every file by its hash, before anything of the folder is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.made_folders import edit, plain_folder, rehash, routed_copy
from safetensors.torch import load_file, save_file

import exporter
from exporter.checkpoints import verification
from exporter.checkpoints.verification import verify
from exporter.cli.entry import main
from exporter.onnx import verification as onnx_verification


@pytest.fixture(scope="module")
def made(tiny, questions, tmp_path_factory) -> Path:
    return plain_folder(tiny, questions, tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "small"))


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """The folders that were loaded in a clean process, which does not run here."""
    started: list[Path] = []

    def note(folder: Path, device: str) -> tuple[tuple[str, ...], dict[str, object]]:
        started.append(folder)
        return (), {}

    monkeypatch.setattr(verification, "_in_clean_process", note)
    return started


def scaled(folder: Path) -> None:
    """Every weight of an MLP is another, by a hundredth of a per cent."""
    path = folder / "model.safetensors"
    save_file({name: w * 1.0001 if "mlp" in name else w for name, w in load_file(path).items()}, path, {"format": "pt"})


def linked(name: str) -> Callable[[Path], object]:
    """The file lies outside of the folder, with the very same content, and a link leads there."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def emptied(record: dict) -> None:
    record["measured"]["files"].clear()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (scaled, "model.safetensors is not the file that was made: its SHA-256 is another"),
    "template": (
        lambda f: (f / "chat_template.json").write_text("{}"),
        "chat_template.json is not the file that was made",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not the file that was made"),
    "configuration": (
        lambda f: edit(f / "config.json", lambda data: data.update(bos_token_id=5)),
        "config.json is not the file that was made",
    ),
    "settings": (lambda f: (f / "generation_config.json").unlink(), "generation_config.json is missing"),
    "processor": (lambda f: (f / "processor_config.json").unlink(), "processor_config.json is missing"),
    "more weights": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"),
        "model-2.safetensors has no SHA-256 in the record",
    ),
    "another template": (
        lambda f: (f / "chat_template.jinja").write_text("x"),
        "chat_template.jinja has no SHA-256 in the record",
    ),
    "a template in a folder": (
        lambda f: (
            (f / "additional_chat_templates").mkdir() or (f / "additional_chat_templates/tools.jinja").write_text("x")
        ),
        "additional_chat_templates/tools.jinja has no SHA-256 in the record",
    ),
    "vocabulary": (lambda f: (f / "merges.txt").write_text("a b"), "merges.txt has no SHA-256 in the record"),
    "code": (lambda f: (f / "evil.py").write_text("1"), "evil.py has no SHA-256 in the record"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json is nothing that lvlm-exporter writes",
    ),
    "pickle": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
        "pytorch_model.bin is nothing that lvlm-exporter",
    ),
    "link": (linked("tokenizer.json"), "tokenizer.json leads out of the folder by a link"),
    "linked weights": (linked("model.safetensors"), "model.safetensors leads out of the folder by a link"),
    "link to a folder": (lambda f: (f / "assets2").symlink_to("/tmp"), "assets2 leads out of the folder by a link"),
    "pipe": (lambda f: os.mkfifo(f / "vocab.json"), "vocab.json is no regular file"),
    "no hashes": (
        lambda f: edit(f / "compression.json", emptied),
        "its record has the SHA-256 of 0 of its 8 files, as records of lvlm-exporter 0.1.0 do: make it again",
    ),
    "one hash less": (
        lambda f: edit(f / "compression.json", lambda record: record["measured"]["files"].pop("tokenizer.json")),
        "tokenizer.json has no SHA-256 in the record",
    ),
    "a hash too many": (
        lambda f: edit(f / "compression.json", lambda record: record["measured"]["files"].update({"x.json": "0" * 64})),
        "x.json is missing",
    ),
    "a router that is nowhere": (
        lambda f: edit(f / "config.json", lambda data: data.update(router={}, auto_map={})) or rehash(f),
        "a router is named in config.json only",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_folder_that_is_not_what_was_made(what, folder, loaded):
    change, problem = DAMAGE[what]
    change(folder)
    found = verify(folder)
    assert not found.holds and any(problem in told for told in found.problems), found.problems
    assert not loaded, "it was loaded all the same"


EDITS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda f: None,
    "card": lambda f: (f / "README.md").write_text("mine"),
    "no card": lambda f: (f / "README.md").unlink(),
    "picture": lambda f: (f / "assets/mine.png").write_bytes(b"x"),
    "no pictures": lambda f: shutil.rmtree(f / "assets"),
    "licence": lambda f: (f / "LICENSE").write_text("MIT"),
    "notes": lambda f: (f / "notes.txt").write_text("x"),
    "attributes": lambda f: (f / ".gitattributes").write_text("* text"),
    "git": lambda f: (f / ".git").mkdir() or (f / ".git/config").write_text("x"),
    "upper case": lambda f: edit(f / "compression.json", upper),
    "a figure": lambda f: edit(f / "compression.json", lambda record: record["measured"].update(seconds=1.0)),
    "a link inside": lambda f: (f / "copy.md").symlink_to("README.md"),
}


def upper(record: dict) -> None:
    record["measured"]["files"] = {name: digest.upper() for name, digest in record["measured"]["files"].items()}


@pytest.mark.parametrize("what", EDITS)
def test_what_a_person_may_edit(what, folder, loaded):
    EDITS[what](folder)
    assert verify(folder).problems == ()
    assert loaded == [folder]


def test_the_record_holds_the_hash_of_every_file(made):
    recorded = json.loads((made / "compression.json").read_text())["measured"]["files"]
    there = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert set(recorded) == {
        name for name in there if name not in ("README.md", "compression.json") and "assets" not in name
    }
    assert {"config.json", "tokenizer.json", "generation_config.json", "chat_template.json"} <= set(recorded)


def test_a_record_that_leads_out_of_the_folder(folder, loaded, capsys):
    (folder.parent / "secret").write_text("s")
    edit(folder / "compression.json", lambda record: record["measured"]["files"].update({"../secret": "0" * 64}))
    assert main(["verify", str(folder)]) == 2
    assert "names '../secret', which is not a file below the folder" in capsys.readouterr().err
    assert not loaded


def test_files_of_a_router(made, tmp_path, loaded):
    folder = routed_copy(made, tmp_path / "routed")
    assert verify(folder).problems == () and loaded == [folder]
    weights = bytearray((folder / "router/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "router/model.safetensors").write_bytes(weights)
    assert "router/model.safetensors is not the file that was made" in verify(folder).problems[0]
    (folder / "router").rename(folder / "router2")
    problems = verify(folder).problems
    assert "router/model.safetensors is missing" in problems
    assert "router2/model.safetensors has no SHA-256" in "".join(problems)


def test_an_index_that_leads_elsewhere(tiny, questions, tmp_path, loaded, unverified):
    from fixtures.checkpoints import recipe

    folder = exporter.compress(recipe(tiny("llava", max_shard_size="100KB"), questions), tmp_path / "small")
    assert verify(folder).holds
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001', 1))
    assert "model.safetensors.index.json is not the file that was made" in verify(folder).problems[0]
    assert len(loaded) == 1


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported("llava")[1], tmp_path / "onnx"))


ONNX_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(b""), "tokenizer.json is not the file that was"),
    "processor": (lambda f: (f / "processor_config.json").unlink(), "processor_config.json is missing"),
    "no hashes": (
        lambda f: edit(f / "onnx.json", lambda data: data["sha256"].clear()),
        "its record has the SHA-256 of 0 of its",
    ),
    "only graphs": (
        lambda f: edit(
            f / "onnx.json",
            lambda data: data.update(
                sha256={k: v for k, v in data["sha256"].items() if k.endswith((".onnx", ".data"))}
            ),
        ),
        "files, as records of lvlm-exporter 0.1.0 do: make it again for one that can be verified (lvlm-exporter onnx",
    ),
    "graph": (
        lambda f: (f / "decoder.onnx").write_bytes((f / "decoder.onnx").read_bytes()[::-1]),
        "decoder.onnx is not the file that was made",
    ),
    "code": (lambda f: (f / "evil.py").write_text("1"), "evil.py"),
    "one more graph": (lambda f: shutil.copy(f / "decoder.onnx", f / "x.onnx"), "x.onnx has no SHA-256 in the record"),
}


@pytest.mark.clean_process
@pytest.mark.parametrize("what", ONNX_DAMAGE)
def test_graphs_that_are_not_what_was_made(what, graphs):
    assert exporter.verify(graphs).holds
    change, problem = ONNX_DAMAGE[what]
    change(graphs)
    found = exporter.verify(graphs)
    assert not found.holds and any(problem in told for told in found.problems), found.problems
    assert main(["verify", str(graphs)]) == 1


def test_an_onnx_folder_needs_a_processor_that_loads(graphs, monkeypatch):
    (graphs / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(onnx_verification, "compared", lambda *_: [])
    assert exporter.verify(graphs).problems[0].startswith("its processor does not load: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("validation", 3, "'validation' is no JSON object"),
        ("validation", {"outputs": {}, "tokens": 1, "equal_tokens": 1}, "'validation.outputs' is empty"),
        ("sha256", {"../x": "0" * 64}, "'sha256' names '../x', which is not a file below the folder"),
        ("source", None, "'source' is no JSON object"),
        ("quantize", "x", "'quantize' is not 'int8' or 'int4'"),
        ("quantize", float("inf"), "it holds Infinity, which is no number of JSON"),
        (
            "validation",
            {"outputs": {"decoder: present.1.valuex": {"max": 0, "mean": 0}}, "tokens": 1, "equal_tokens": 1},
            "'validation.outputs' names 'decoder: present.1.valuex', which is not \"PART: OUTPUT\" of the graphs",
        ),
        (
            "validation",
            {
                "outputs": {"vision: image_features": {"max": 0, "mean": 0, "scale": "0"}},
                "tokens": 1,
                "equal_tokens": 1,
            },
            "'validation.outputs.vision: image_features.scale' is not a number from 0 up",
        ),
        ("versions", {}, "'versions' has no 'lvlm-exporter'"),
        ("benchmarks", [{}], "'benchmarks[0]' has no 'budget'"),
        ("layers", 10**400, "'layers' is not a whole number"),
    ],
)
@pytest.mark.parametrize("subcommand", [["verify"], ["card"], ["push", "a/b", "--dry-run"]], ids=lambda s: s[0])
def test_a_damaged_manifest_is_a_sentence(subcommand, key, value, message, graphs, capsys):
    edit(graphs / "onnx.json", lambda data: data.update({key: value}))
    assert main([subcommand[0], str(graphs), *subcommand[1:]]) == 2
    assert f"onnx.json is damaged ({message}" in capsys.readouterr().err
