"""`route` and `compress --router` on types that no table names, from the command line to the clean process."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from fixtures.routed import CLOSE
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.cli.entry import main
from exporter.routing import cost
from exporter.routing.folder import load_routed
from exporter.routing.training import outcomes

CLASSES = {
    "vipllava": "RoutedVipLlavaForConditionalGeneration",
    "qwen3_vl_moe": "RoutedQwen3VLMoeForConditionalGeneration",
}


@pytest.mark.clean_process
@pytest.mark.parametrize("model_type", ["vipllava", pytest.param("qwen3_vl_moe", marks=pytest.mark.long_tail)])
def test_a_probed_type_gets_a_router_and_verifies(model_type, tiny, questions, tmp_path, capsys):
    """Written, run in a process without this package by the files in the folder, and run here by this package."""
    out = tmp_path / "routed"
    arguments = ["route", str(tiny(model_type)), "--calibration", str(questions), "--out", str(out), "--steps", "2"]
    assert main([*arguments, "--batch-size", "4", "--quiet"]) == 0
    assert "verified in a clean process" in capsys.readouterr().out
    entry = json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"]
    assert entry == f"modeling_routed.{CLASSES[model_type]}"
    model = load_routed(open_source(str(out)), "cpu", torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(tiny(model_type)).eval()
    text = {"input_ids": torch.full((1, 4), 100)}
    with torch.no_grad():
        torch.testing.assert_close(model(**text).logits, plain(**text).logits, **CLOSE)


@pytest.mark.clean_process
@pytest.mark.long_tail
@pytest.mark.parametrize("model_type", CLASSES)
def test_a_probed_type_is_compressed_with_a_router(model_type, tiny, questions, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": str(tiny(model_type)),
                "calibration": str(questions),
                "layers": [3],
                "router": {"steps": 2, "batch_size": 4},
            }
        )
    )
    assert main(["compress", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    record = read_record(tmp_path / "out").to_data()
    assert record["plan"]["drop"] == [3] and record["router"]["settings"]["candidates"]


@pytest.mark.parametrize("subcommand", ["route", "compress"])
def test_a_type_that_does_not_route_is_refused_before_anything_is_loaded(
    subcommand, tiny, questions, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("exporter.compression.job.load_model", lambda *_, **__: pytest.fail("loaded"), raising=False)
    monkeypatch.setattr("exporter.routing.with_router.load_model", lambda *_, **__: pytest.fail("loaded"))
    more = ["--drop-layers", "1", "--router"] if subcommand == "compress" else []
    arguments = [subcommand, str(tiny("qwen3_5")), "--calibration", str(questions), *more]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and not (tmp_path / "out").exists()
    assert "a qwen3_5 model can't have a router: some of its layers keep something else than keys and values" in told[0]


def test_costs_that_the_formula_does_not_count_give_no_budget_by_cost(monkeypatch, caplog):
    """Experts are no linear maps of a layer: a share of operations that is not their number is not offered."""

    samples = [SimpleNamespace(images=[1], is_seen=True)] * outcomes.FEWEST
    model = SimpleNamespace(config=CONFIG_MAPPING["vipllava"]())
    teacher = SimpleNamespace(model=model, samples=samples, question=lambda _: [None])
    learner = SimpleNamespace(teacher=teacher, router=None)
    monkeypatch.setattr(outcomes, "cost_facts", lambda *_: {})
    monkeypatch.setattr(outcomes, "is_counted_right", lambda *_: False)
    assert outcomes.fitted_budgets(learner, range(outcomes.FEWEST), 1, lambda *_: ()) == {}
    assert "presets by counts of tokens and layers, and none by flops or quality" in caplog.text


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl_moe"])
def test_a_formula_is_right_where_layers_are_linear_maps_and_attention(model_type, tiny, questions):
    from exporter.clean_room import load_processor
    from exporter.data.batches import make_batch
    from exporter.data.calibration import load_calibration

    model = AutoModelForImageTextToText.from_pretrained(tiny(model_type)).eval()
    batch = make_batch(
        load_calibration(str(questions), samples=1).samples, load_processor(tiny(model_type)), model.config
    )
    router = torch.nn.Module()
    linear = torch.nn.Linear(4, 4)
    router.out = router.qkv = router.mlp = router.down = router.place = router.token_head = router.layer_head = linear
    facts = cost.cost_facts(model, router)
    assert cost.is_counted_right(model, facts, batch) == (model_type == "llava")
