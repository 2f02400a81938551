"""Model types that no table names: found by a probe, compressed like the others; and the probe against the table."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exporter.errors import InputError
from exporter.families import DECODERS, FAMILIES, is_listed, leaned_on, protected_layers
from exporter.plan import attention_period, best_in_period, breaks_period, make_plan
from exporter.probe.opened import written_by
from exporter.probe.stack import build
from exporter.probe.tiny_config import tiny_config
from exporter.survey.table import as_data, markdown, try_types
from exporter.survey.trial import try_type

# One of each kind: experts, linear attention beside full, sliding windows with layers of other sizes, states that
# layers share, features added between layers.
KINDS = ("glm4v_moe", "qwen3_5", "gemma4", "hy_v4_vl", "mllama", "granite4_vision")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_a_type_of_each_kind_compresses(model_type):
    """Cut by nothing the same bytes and logits; by two layers the logits of the model they were cut from."""
    found = try_type(model_type)
    assert not found.listed
    assert found.compress is None


@pytest.mark.parametrize("family", ["llava", "gemma3", "glm4v", "qwen2_vl"])
def test_the_probe_finds_what_the_table_says(family):
    """The same maps, the same norms behind them."""
    config = tiny_config(CONFIG_MAPPING[family](), 2)
    row, found = DECODERS[config.get_text_config().model_type], written_by(build(config))
    assert is_listed(config) and family in FAMILIES
    assert (found.unfoldable is not None) == row.post_norm
    if not row.post_norm:
        assert found.maps == ((row.o_proj, row.down_proj),) * 2
    assert "a norm (post_" in (found.unfoldable or "a norm (post_")


def test_what_writes_in_layers_of_different_kinds():
    """Linear attention writes by another map than full attention; experts by none that a fold could change."""
    hybrid = written_by(build(tiny_config(CONFIG_MAPPING["qwen3_5"](), 4)))
    assert hybrid.unfoldable is None
    assert hybrid.maps[2:] == (("linear_attn.out_proj", "mlp.down_proj"), ("self_attn.o_proj", "mlp.down_proj"))
    assert hybrid.maps_of(0, ["o_proj", "down_proj"]) == ["linear_attn.out_proj", "mlp.down_proj"]
    experts = written_by(build(tiny_config(CONFIG_MAPPING["qwen3_vl_moe"](), 2)))
    assert "in 2 of 2 layers no single matrix writes the MLP's output (experts, or a gate)" in (
        experts.unfoldable or ""
    )
    scaled = tiny_config(CONFIG_MAPPING["granite4_vision"](), 3)
    scaled.get_text_config().residual_multiplier = 0.25
    assert written_by(build(scaled)).factor == 0.25


def test_layers_that_others_lean_on_stay():
    text = SimpleNamespace(
        num_hidden_layers=8,
        layer_types=["a", "a", "b", "a", "b", "a", "b", "a"],
        num_kv_shared_layers=3,  # layers 5 to 7 read from the last 'a' and the last 'b' before them
        indexer_types=["full", "full", "shared", "shared", "full", "full", "shared", "full"],
        kv_source_layers=[0, 1, 2, 3, 0, 5, 6, 7],
    )
    assert leaned_on(text) == {0, 1, 3, 4, 5}
    assert 11 in protected_layers(tiny_config(CONFIG_MAPPING["gemma4"](), 12))  # its class makes any last layer full


def test_the_best_layers_that_keep_the_period():
    config = {"layer_types": ["sliding", "sliding", "full"] * 4}
    values = [0, 0, 0, 0, 5, 4, 3, 0, 0, 9, 1, 0]
    assert attention_period(config) == ("layer_types", 3)
    allowed = [
        drop
        for drop in itertools.combinations(range(12), 3)
        if 5 not in drop and breaks_period(config, make_plan(12, drop).keep) is None
    ]
    drop = best_in_period(config, values, 3, (5,))
    assert drop in allowed
    assert sum(values[layer] for layer in drop) == max(sum(values[layer] for layer in other) for other in allowed)
    assert best_in_period(config, values, 1, ()) == (11,)  # the last
    with pytest.raises(InputError, match="without 1 layers the period of 3 layers in layer_types can't be kept"):
        best_in_period(config, values, 1, (11,))


@pytest.mark.slow
def test_the_table_says_why_not():
    findings = try_types(["florence2", "got_ocr2"])
    text = markdown(findings)
    assert "| got_ocr2 |  | yes | yes | yes | yes | yes |" in text and "`got_ocr2`: routed with" not in text
    assert "`florence2`: nothing works: it is an encoder and a decoder, whose layers attend to each other" in text
    assert json.loads(json.dumps(as_data(findings)))["types"][1]["compress"] is None
    with pytest.raises(InputError, match="has no image-text-to-text type 'gpt2'"):
        try_types(["gpt2"])
