"""One command, every family: what comes out stands alone, is what the plan says, and is nothing else."""

from __future__ import annotations

import hashlib
import json
from itertools import cycle, islice

import pytest
import torch
from fixtures.checkpoints import FAMILIES, recipe, snapshot, verify_in_this_process
from fixtures.made_folders import edit
from transformers import AutoModelForImageTextToText

from exporter.checkpoints.source import open_source
from exporter.checkpoints.staging import staged
from exporter.checkpoints.weight_files import open_weights
from exporter.checkpoints.writer import write_checkpoint
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.methods import FOLDS, LOCALIZERS
from exporter.models.loading import text_decoder
from exporter.pipeline import compress
from exporter.plan import LayerBudget, make_plan
from exporter.publishing.reproduction import reproduce
from exporter.recipe import Method, RunOptions

CLEAN = ("llava", "qwen3_vl")  # whose checkpoints are verified in a clean process, which takes seconds
EACH_ONCE = set(islice(zip(cycle(LOCALIZERS), cycle(FOLDS)), max(len(LOCALIZERS), len(FOLDS))))
PAIRS = [
    (localizer, fold) if (localizer, fold) in EACH_ONCE else pytest.param(localizer, fold, marks=pytest.mark.long_tail)
    for localizer in LOCALIZERS
    for fold in FOLDS
]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_nothing_changes_nothing_bit_for_bit(family, tiny, questions, tmp_path):
    source = open_source(str(tiny(family)))
    with staged(tmp_path / "same") as stage:
        write_checkpoint(source, make_plan(source.num_layers, ()), {}, stage)
    copy = open_weights(tmp_path / "same")
    assert copy.entries.keys() == source.weights.entries.keys()
    for name in copy.entries:
        assert torch.equal(copy.read(name), source.weights.read(name)), name
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == source.raw_config

    processor = load_processor(source.folder)
    batch = make_batch(load_calibration(str(questions), samples=3).samples, processor, source.config)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (source.folder, tmp_path / "same")
    )
    with torch.no_grad():
        assert torch.equal(before(**batch.inputs).logits, after(**batch.inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.clean_process) if name in CLEAN else name for name in FAMILIES]
)
def test_compressed_checkpoint_is_the_source_without_those_layers(family, tiny, questions, tmp_path, monkeypatch):
    """compress verifies it, two families' in a clean process; here it is compared with the source, layer by layer."""
    if family not in CLEAN:
        verify_in_this_process(monkeypatch)
    source = open_source(str(tiny(family)))
    before = snapshot(source.folder)
    out = compress(recipe(source.folder, questions, fold=Method("reconstruction")), tmp_path / "small")
    assert snapshot(source.folder) == before
    record = json.loads((out / "compression.json").read_text())
    keep = record["plan"]["keep"]
    assert len(keep) == source.num_layers - 2
    for protected in record["protect"]:
        assert protected in keep

    written = open_weights(out)
    folded = set(record["fold"]["tensors"])
    assert folded
    changed = set()
    for name, entry in written.entries.items():
        layer = source.layer_of(name)
        original = name
        if layer is not None:
            inside = name.removeprefix(f"{source.layer_prefix}{layer}.")
            original = f"{source.layer_prefix}{keep[layer]}.{inside}"
        assert entry.dtype == source.weights.entries[original].dtype
        if not torch.equal(written.read(name), source.weights.read(original)):
            changed.add(f"layer {keep[layer]}'s {inside}")
    assert changed == folded
    for path in source.companions():
        assert (out / path).read_bytes() == (source.folder / path).read_bytes()


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("family", ("qwen2_vl", "gemma3", "llava_onevision"))
def test_layers_keep_their_own_attention_type(family, tiny, questions, tmp_path):
    """Lists are sliced by kept index: a layer that sees a window must not become one that sees everything."""
    source = open_source(str(tiny(family)))
    types = source.config.get_text_config().layer_types
    out = compress(
        recipe(source.folder, questions, budget=LayerBudget(layers=(2, 3)), fold=Method("none")), tmp_path / "s"
    )
    kept = open_source(str(out)).config.get_text_config().layer_types
    assert kept == [types[layer] for layer in (0, 1, 4, 5)]


@pytest.mark.clean_process
def test_reproduce_is_bit_for_bit(tiny, questions, tmp_path):
    out = compress(recipe(tiny("llava"), questions), tmp_path / "one")
    again = reproduce(out, tmp_path / "two")
    assert again.identical
    weights = [hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_reproduce_says_whether_the_record_is_wrong_or_the_result(tiny, questions, tmp_path, capsys):
    out = compress(recipe(tiny("llava"), questions), tmp_path / "one")

    def reproduced(name: str, *files: str) -> str:
        edit(out / "compression.json", lambda r: r["measured"]["files"].update(dict.fromkeys(files, "0" * 64)))
        assert main(["reproduce", str(out), "--out", str(tmp_path / name), "--quiet"]) == 1
        return capsys.readouterr().err

    told = reproduced("two", "config.json")
    assert "the record of" in told and "has another SHA-256 of config.json: the record is damaged" in told
    (out / "chat_template.json").write_text("{}")
    told = reproduced("three", "chat_template.json")
    assert "chat_template.json" in told and "all weights are equal: another version" in told


@pytest.mark.usefixtures("unverified")
def test_shards_keep_their_order_and_the_index_fits(tiny, questions, tmp_path):
    source = open_source(str(tiny("llava", max_shard_size="100KB")))
    assert len(source.weights.shards) > 2
    out = compress(recipe(source.folder, questions), tmp_path / "small")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weights = open_weights(out)  # checks the index against the shards
    assert index["metadata"]["total_size"] == weights.num_bytes
    assert index["metadata"]["total_parameters"] == weights.num_parameters


@pytest.mark.usefixtures("unverified")
def test_tied_head_is_written_once(tiny, questions, tmp_path):
    out = compress(recipe(tiny("qwen3_vl"), questions), tmp_path / "small")
    assert not [name for name in open_weights(out).entries if "lm_head" in name]


@pytest.mark.usefixtures("unverified")
def test_half_precision_is_kept(tiny, questions, tmp_path):
    out = compress(recipe(tiny("llava", dtype=torch.bfloat16), questions), tmp_path / "small")
    assert {entry.dtype for entry in open_weights(out).entries.values()} == {"BF16"}


@pytest.mark.slow
@pytest.mark.parametrize(("localizer", "fold"), PAIRS)
@pytest.mark.usefixtures("unverified")
def test_every_localizer_goes_with_every_fold(localizer, fold, tiny, questions, tmp_path):
    made = recipe(tiny("llava"), questions, localizer=Method(localizer), fold=Method(fold))
    out = compress(made, tmp_path / "small")
    assert text_decoder(AutoModelForImageTextToText.from_pretrained(out)).config.num_hidden_layers == 4


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_a_model_larger_than_memory_is_streamed_from_disk(tiny, questions, task_memory, tmp_path):
    """The same layers and the same bytes as with all of it in memory."""
    whole = compress(recipe(tiny("llava"), questions), tmp_path / "whole")
    streamed = compress(recipe(tiny("llava"), questions), tmp_path / "streamed", RunOptions(memory=task_memory))
    weights = [open_weights(folder) for folder in (whole, streamed)]
    for name in weights[0].entries:
        torch.testing.assert_close(weights[0].read(name), weights[1].read(name), atol=1e-6, rtol=1e-5)


@pytest.fixture
def task_memory(tiny) -> str:
    """Two thirds of the tiny model."""
    return f"{open_weights(tiny('llava')).num_bytes * 2 // 3 / 1e6:.2f}MB"
