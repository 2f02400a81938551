"""Layers that are named, without a fold: headers are read, ranges copied, and no model is loaded."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from fixtures.checkpoints import FAMILIES

import exporter
from exporter.checkpoints import memory
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.plan import LayerBudget
from exporter.recipe import NO_QUESTIONS, Method, Recipe

sys.path[:0] = [str(Path(__file__).parents[2] / "examples" / "recipes")]

import hollow  # noqa: E402


def named(folder, *layers: int) -> Recipe:
    return Recipe(str(folder), NO_QUESTIONS, LayerBudget(layers=layers), fold=Method("none"), protect=())


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Fail where the model is loaded in this process."""

    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("exporter.compression.job.load_model", loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_the_source_without_those_layers(family, tiny, tmp_path, no_model, verified_here):
    source = open_source(str(tiny(family)))
    layer = source.num_layers - 2
    small = exporter.compress(named(source.folder, layer), tmp_path / "small")
    written = open_weights(small)
    assert len(written.entries) < len(source.weights.entries)
    for name in written.entries:
        of = source.layer_of(name)
        original = name if of is None or of < layer else name.replace(f"layers.{of}.", f"layers.{of + 1}.")
        assert torch.equal(written.read(name), source.weights.read(original)), name
    record = json.loads((small / "compression.json").read_text())
    assert len(record["reference"]["tokens"]) == 12 and record["verification"] == {"loaded": True, "reason": ""}
    assert exporter.verify(small).details["tokens"] == record["reference"]["tokens"]


@pytest.mark.clean_process
def test_a_result_that_does_not_fit_is_verified_in_its_structure(tiny, tmp_path, no_model, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    out = tmp_path / "small"
    command = ["compress", str(tiny("llava")), "--layers", "1,2", "--fold", "none", "--out", str(out)]
    assert main(command) == 0
    assert "its structure was verified, it was not loaded: that takes" in capsys.readouterr().out
    record = json.loads((out / "compression.json").read_text())
    assert record["reference"] is None and not record["verification"]["loaded"]
    assert main(["verify", str(out)]) == 0
    assert "verifies in its structure: every file as recorded, LlavaForConditional" in capsys.readouterr().out
    monkeypatch.undo()
    assert exporter.verify(out).holds  # where it fits, it is loaded, and has no answer to compare with

    config = json.loads((out / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (out / "config.json").write_text(json.dumps(config))
    record["measured"]["files"]["config.json"] = exporter.checkpoints.files.sha256(out / "config.json")
    (out / "compression.json").write_text(json.dumps(record))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert "mismatched keys" in exporter.verify(out).problems[0]


def test_a_dry_run_reads_headers_only(tiny, tmp_path, no_model, monkeypatch, capsys):
    folder = str(tiny("llava"))
    monkeypatch.setattr(exporter.checkpoints.safetensors_ranges.Weights, "read", no_model)
    command = ["compress", folder, "--layers", "1,2", "--fold", "none", "--out", str(tmp_path / "x"), "--dry-run"]
    assert main(command) == 0
    assert "headers are read and ranges copied: no model is loaded" in capsys.readouterr().out


def test_what_needs_the_model_needs_questions(tiny, tmp_path):
    recipe = Recipe(str(tiny("llava")), NO_QUESTIONS, LayerBudget(layers=(1,)))
    with pytest.raises(
        InputError, match=r"questions about images are needed to choose layers and to fold: .* and --fold is none"
    ):
        exporter.compress(recipe, tmp_path / "small")


def test_sizes_are_read():
    assert memory.parse_size("12GB") == 12_000_000_000 and memory.parse_size("1.5 KiB") == 1536
    with pytest.raises(InputError, match="is no size like 12GB"):
        memory.parse_size("a lot")
    assert memory.available_bytes() > 1 << 20
    assert memory.why_too_large(10**12, 2, "3GB") == "that takes 2400.0 GB, and 3.0 GB is allowed (--memory)"


@pytest.fixture
def narrow(monkeypatch):
    """What is public of Qwen3-VL-235B-A22B, its 94 layers with few experts and all of them narrow; several shards."""
    row = hollow.published("qwen3-vl-235b-a22b")
    text = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8, "num_experts": 4}
    text |= {"num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    row["config"]["text_config"] |= text
    row["config"]["text_config"]["rope_scaling"]["mrope_section"] = [4, 2, 2]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    row["config"]["vision_config"] |= vision
    monkeypatch.setattr(hollow, "SHARD_BYTES", 700_000)
    return row


@pytest.mark.slow
@pytest.mark.usefixtures("no_model", "unverified")
def test_of_weights_the_ranges_that_stay_are_read_and_no_others(narrow, tmp_path, monkeypatch):
    """The names of what stays are taken from the headers here, by another pattern than the package's."""
    folder = hollow.write_hollow(narrow, tmp_path / "model")
    weights = open_weights(folder)
    for shard in weights.shards:
        begin, end = min(e.begin for e in shard.entries.values()), max(e.end for e in shard.entries.values())
        with shard.path.open("r+b") as file:
            file.seek(begin)
            file.write(os.urandom(end - begin))
    read: list[tuple[str, int, int]] = []  # file, begin, end
    in_kernel = os.copy_file_range

    def copied(source: int, target: int, count: int, offset_src: int) -> int:
        done = in_kernel(source, target, count, offset_src=offset_src)
        read.append((Path(os.readlink(f"/proc/self/fd/{source}")).name, offset_src, offset_src + done))
        return done

    monkeypatch.setattr(os, "copy_file_range", copied)
    gone = set(range(60, 83))
    small = exporter.compress(named(folder, *gone), tmp_path / "small")
    stays = []
    for name, entry in weights.entries.items():
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) not in gone:
            stays.append((entry.path.name, entry.begin, entry.end))
    assert joined(read) == joined(stays) and sum(end - begin for _, begin, end in read) == open_weights(small).num_bytes


def joined(ranges: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Return ranges of files in order, those that touch as one."""
    found: list[tuple[str, int, int]] = []
    for name, begin, end in sorted(ranges):
        if found and found[-1][0] == name and found[-1][2] >= begin:
            found[-1] = (name, found[-1][1], max(end, found[-1][2]))
        else:
            found.append((name, begin, end))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("no_model", "unverified")
def test_holes_stay_holes(narrow, tmp_path):
    folder = hollow.write_hollow(narrow, tmp_path / "model")
    written = open_weights(exporter.compress(named(folder, 60, 61), tmp_path / "small"))
    on_disk = sum(512 * shard.path.stat().st_blocks for shard in written.shards)
    assert on_disk < written.num_bytes / 4
    assert not written.read("model.language_model.layers.91.self_attn.q_proj.weight").any()
