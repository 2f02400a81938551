"""Routed checkpoints as ONNX graphs: the same tokens and layers are chosen, the same is said, under every budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from fixtures.onnx_folders import for_cuda, graphs_of, here
from fixtures.routed import add_random_router
from tiny_models import build, inputs
from transformers import AutoConfig

import exporter
from exporter import CheckFailed, InputError
from exporter.benchmark.figures import BenchOptions
from exporter.benchmark.onnx_counting import branch_of, graph_size
from exporter.benchmark.workload import Workload
from exporter.clean_room import compare_onnx, load_processor
from exporter.clean_room.onnx_components import NEW_TOKENS, undecided
from exporter.modeling.routed_places import coordinates_of
from exporter.onnx import ExportOptions, pipeline
from exporter.onnx.graphs.router import Part, parts, read_settings
from exporter.onnx.manifest import vision_settings
from exporter.onnx.pipeline import export
from exporter.onnx.runtime.places import patch_coordinates
from exporter.onnx.runtime.routed import OnnxRouteBudget
from exporter.onnx.support import support_of
from exporter.routing.settings import default_settings


@pytest.fixture(scope="module")
def routed_graphs(tmp_path_factory):
    """routed_graphs('llava', drop_at=0) is (checkpoint with a random router, ONNX folder), made once."""
    made: dict[tuple[str, int], tuple[Path, Path]] = {}

    def folders(family: str, drop_at: int = 0) -> tuple[Path, Path]:
        if (family, drop_at) not in made:
            place = tmp_path_factory.mktemp(f"routed-{family}")
            source = build(family, place / "model", layers=4)
            add_random_router(source, default_settings(AutoConfig.from_pretrained(source), drop_at))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "validate", here)
                made[family, drop_at] = source, export(source, place / "onnx")
        return made[family, drop_at]

    return folders


@pytest.mark.parametrize(
    ("family", "drop_at"),
    [("llava", 0), ("llava", 1), ("qwen2_5_vl", 0), pytest.param("llava_next", 0, marks=pytest.mark.long_tail)],
)
def test_routed_graphs_say_what_torch_says(family, drop_at, routed_graphs):
    """Under every preset of the folder: the route, logits of prompt and steps, greedy tokens; batch 1 to 3."""
    _, folder = routed_graphs(family, drop_at)
    manifest = json.loads((folder / "onnx.json").read_text())
    report = manifest["validation"]
    logits = [found["max"] for name, found in report["outputs"].items() if "logits" in name]
    assert len(logits) == 2 and max(logits) <= 1e-4
    assert report["equal_tokens"] == report["tokens"] >= 32 * (1 + len(manifest["router"]["presets"]))
    assert report["left_out"] == 0  # no choice was among equals


@pytest.mark.long_tail
def test_routed_graphs_for_cuda_say_what_torch_says(routed_graphs, tmp_path, monkeypatch):
    """In half precision choices among equals differ; what is behind a common choice does not."""
    source, _ = routed_graphs("llava", 1)
    folder = export(source, tmp_path / "onnx", for_cuda(monkeypatch))
    report = json.loads((folder / "onnx.json").read_text())["validation"]
    assert report["equal_tokens"] >= 0.9 * report["tokens"] >= 0.9 * 32
    assert report["left_out"] <= 0.1 * report["tokens"] / NEW_TOKENS


def test_a_choice_among_equals_is_no_difference():
    mine, theirs = np.array([True, False, True, False]), np.array([True, True, False, False])
    assert undecided(mine, theirs, torch.tensor([5.0, 0.001, 0.0, -4.0]), 0.01)
    assert not undecided(mine, theirs, torch.tensor([5.0, 0.1, 0.0, -4.0]), 0.01)
    assert not undecided(mine, theirs, None, 0.01)
    assert not undecided(mine, np.array([True, True, True, False]), torch.zeros(4), 0.01)  # not as many
    assert undecided(mine, mine, None, 0.01)


def test_a_budget_under_which_nothing_could_be_compared_is_refused(routed_graphs, tmp_path, monkeypatch):
    source, made = routed_graphs("llava")
    graphs_of(made, monkeypatch)
    compare_routes = vars(compare_onnx)["compare_routes"]

    def undecided_when_fast(model, runner, **others):
        problems, same = compare_routes(model, runner, **others)
        return problems, same & (runner.budget == runner.budget_for("off"))

    monkeypatch.setattr(compare_onnx, "compare_routes", undecided_when_fast)
    with pytest.raises(CheckFailed, match=r"decoder \(fast\): the router is undecided in every question"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_not_computed(routed_graphs):
    _, folder = routed_graphs("llava")
    model, given = cast(Any, exporter.onnx.load(folder)), inputs(load_processor(folder), batch=2)
    prompt = model.prompt({name: tensor.numpy() for name, tensor in given.items()})
    model.set_budget(keep_visual_tokens=5, keep_layers=2)
    _, state = model.prefill(prompt, new_tokens=4)
    # Both layers that may be skipped are: without keys and values they could not run.
    assert set(state.cache) == {f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")}
    lengths = {name: buffer.shape()[2] for name, buffer in state.cache.items()}
    assert set(lengths.values()) == {int((prompt.lengths - 25 + 5).max()) + 4}
    model.set_budget("off")
    _, state = model.prefill(prompt, new_tokens=4)
    assert set(state.cache) == set(model.cache_names)


def test_a_skipped_layer_is_a_branch_not_taken(routed_graphs):
    _, folder = routed_graphs("llava", 1)
    assert {path.stem for path in folder.glob("*.onnx")} == {
        "vision", "router", "decoder_front", "decoder"
    }  # fmt: skip
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    conditions = [node for node in graph.node if node.op_type == "If"]
    assert [node.input[0] for node in conditions] == ["active.2", "active.3"]
    for node in conditions:
        branches = {attribute.name: attribute.g.node for attribute in node.attribute}
        assert {inner.op_type for inner in branches["else_branch"]} == {"Identity"}
        inside = [inner.op_type for inner in branches["then_branch"]]
        assert inside.count("GroupQueryAttention") == 1 and "Cos" not in inside
    outside = [node.op_type for node in graph.node]
    assert outside.count("GroupQueryAttention") == 1  # layer 1; layer 0 is in front
    assert outside.count("Cos") == 1  # the rotary embedding is the same for all


def test_branches_have_integer_weights_too(routed_graphs, tmp_path, monkeypatch):
    source, whole = routed_graphs("llava", 1)
    graphs_of(whole, monkeypatch)
    folder = export(source, tmp_path / "int8", ExportOptions(quantize="int8"))
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    branches = [branch_of(node) for node in graph.node if node.op_type == "If"]
    products = [node.op_type for nodes in [graph.node, *branches] for node in nodes if "MatMul" in node.op_type]
    assert len(branches) == 2 and set(products) == {"MatMulNBits"}
    assert {path.name for path in folder.glob("*.data")} == {
        f"{path.stem}.onnx.data" for path in folder.glob("*.onnx")
    }, "weights of before are gone"
    small, large = (graph_size(place / "decoder.onnx") for place in (folder, whole))
    assert small.weights == large.weights
    assert small.branches[0].bytes < 0.4 * large.branches[0].bytes


@pytest.mark.parametrize("drop_at", [0, 1])
def test_bench_counts_what_torch_counts(drop_at, routed_graphs):
    """Keys and values exactly; FLOPs but for the router's, of which its weights alone are counted."""
    source, folder = routed_graphs("llava", drop_at)
    few = {"keep_visual_tokens": 5, "keep_layers": 3}
    options = BenchOptions(device="cpu", new_tokens=2, rounds=2, attention="sdpa")
    workload = Workload(visual_tokens=25, text_tokens=24)
    done = exporter.bench([folder, source], reference=source, budgets=[few, {"preset": "off"}], workload=workload,
                          options=options, update_cards=False)  # fmt: skip
    done.check_caches()
    whole, ours, ours_whole, theirs, theirs_whole = (model.batches[0] for model in done.models)
    for mine, other in ((ours, theirs), (ours_whole, theirs_whole), (ours_whole, whole)):
        assert mine.kv_bytes == other.kv_bytes
        assert mine.step_bytes == pytest.approx(other.step_bytes, rel=0.02)
    assert ours_whole.flops == theirs_whole.flops and ours.decode_flops == theirs.decode_flops
    assert ours.flops == pytest.approx(theirs.flops, rel=0.1) and ours.kv_bytes < 0.6 * whole.kv_bytes


def test_budgets_of_a_call(routed_graphs):
    _, folder = routed_graphs("llava")
    model, given = cast(Any, exporter.onnx.load(folder)), inputs(load_processor(folder))
    fast = model.generate(**given, preset="fast", max_new_tokens=6)
    presets = json.loads((folder / "onnx.json").read_text())["router"]["presets"]
    assert np.array_equal(fast, model.generate(**given, **presets["fast"], max_new_tokens=6))
    with pytest.raises(InputError, match="preset 'slow' is not known: this model has off, quality"):
        model.generate(**given, preset="slow")
    with pytest.raises(InputError, match="give either preset='fast' or keep_visual_tokens and keep_layers"):
        model.generate(**given, preset="fast", keep_layers=3)
    with pytest.raises(InputError, match="keep_layers=1 is out of range: of the 4 layers 2 may be skipped"):
        model.generate(**given, keep_layers=1)
    with pytest.raises(InputError, match="keep_visual_tokens=0 is neither a count from 1"):
        model.generate(**given, keep_visual_tokens=0)


def test_budgets_count_as_in_torch():
    from exporter.modeling.routed_route import Budget as TorchBudget

    available = np.array([0, 1, 3, 5, 25, 37, 576])
    for asked in (None, 1, 4, 30, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        expected = TorchBudget(asked).tokens_of(torch.from_numpy(available))
        assert np.array_equal(OnnxRouteBudget(asked).tokens_of(available), expected)


@pytest.mark.parametrize("tokens", [np.int64(5), np.float32(0.25), np.array(7), torch.tensor(6), torch.tensor(0.5)])
@pytest.mark.parametrize("layers", [None, np.int32(4), torch.tensor(5)])
def test_numbers_of_numpy_and_torch_are_budgets(tokens, layers):
    budget = OnnxRouteBudget(tokens, layers)
    budget.check(num_layers=6, free=2)
    assert budget == OnnxRouteBudget(tokens.item(), layers and layers.item())


@pytest.mark.parametrize("asked", [True, np.bool_(True), "144", [3], np.array([3]), float("nan"), -1, 1.5, np.int64(0)])
def test_what_is_no_number_is_refused(asked):
    for wrong in (OnnxRouteBudget(asked), OnnxRouteBudget(keep_layers=asked)):
        with pytest.raises(InputError, match=r"is neither a count from 1|keep_layers=.* is out of range"):
            wrong.check(num_layers=6, free=2)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl", "mistral3", "qwen2_5_vl"])
def test_visual_tokens_lie_where_the_router_learnt_that_they_lie(family, tiny):
    folder = tiny(family)
    config = AutoConfig.from_pretrained(folder)
    given = inputs(load_processor(folder), batch=3, images=[2, 0, 1])
    visual = given["input_ids"] == config.image_token_id
    expected = coordinates_of(config, visual, given)
    vision = config.vision_config
    size = vision.image_size if isinstance(getattr(vision, "image_size", None), int) else 0
    side = size // vision.patch_size if size else 0
    manifest = {
        "vision": vision_settings(config, support_of(config).kind),
        "router": {"tile_lengths": [getattr(config, "image_seq_length", 0), side * side]},
    }
    real = [mask.bool() for mask in given["attention_mask"]]
    rows = [row[keep].numpy() for row, keep in zip(visual, real, strict=True)]
    found = patch_coordinates(manifest, rows, {name: tensor.numpy() for name, tensor in given.items()})
    for row, keep in enumerate(real):
        np.testing.assert_allclose(found[row], expected[row][keep], atol=1e-6)


def test_parts_are_cut_where_something_may_be_left_out(tiny):
    config = AutoConfig.from_pretrained(tiny("llava"))  # 6 layers
    config.router = {**default_settings(config, drop_at=1), "read_at": 1, "candidates": [3, 5]}
    found = parts(read_settings(config, "m", "shared"), 6)
    assert found == [Part((0,)), Part((1, 2)), Part((3,), 0), Part((4,)), Part((5,), 1)]


def test_routes_that_graphs_can_not_follow(tiny):
    config = AutoConfig.from_pretrained(tiny("llava"))
    config.router = default_settings(config, drop_at=2)
    with pytest.raises(InputError, match="needs an attention mask, which routed graphs do not take"):
        read_settings(config, "m", "growing")
    config.router["read_at"] = 0
    with pytest.raises(InputError, match="reads at layer 0 and tokens leave at layer 2: in routed graphs the two must"):
        read_settings(config, "m", "shared")
    config.router["read_at"] = 2
    config.text_config.sliding_window = 16
    with pytest.raises(InputError, match="this routed model has sliding windows"):
        read_settings(config, "m", "shared")


def test_a_router_that_did_not_come_along(routed_graphs, tmp_path):
    source = shutil.copytree(routed_graphs("llava")[0], tmp_path / "model")
    shutil.rmtree(source / "router")
    with pytest.raises(InputError, match=r"names a router in config\.json, but has no router/model\.safetensors"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
