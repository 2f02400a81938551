"""Plans, budgets and what they do to config.json."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from exporter.checkpoints.pruned_config import pruned_config
from exporter.errors import InputError
from exporter.plan import LayerBudget, make_plan


def test_plan_renumbers_and_groups():
    plan = make_plan(8, (6, 2, 3))
    assert plan.drop == (2, 3, 6)
    assert plan.keep == (0, 1, 4, 5, 7)
    assert plan.new_index == {0: 0, 1: 1, 4: 2, 5: 3, 7: 4}
    assert plan.gaps == ((2, 3), (6,))


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (LayerBudget(drop_layers=3), 3),
        (LayerBudget(drop_ratio=0.25), 3),
        (LayerBudget(drop_ratio=0.33), 4),
        (LayerBudget(drop_ratio=0.0), 0),
        (LayerBudget(target_params=1000), 1),
        (LayerBudget(target_params=900), 2),
        (LayerBudget(target_params=5000), 0),
        (LayerBudget(layers=(8, 9)), 2),
    ],
)
def test_budgets_become_layer_counts(budget, count):
    assert budget.count([100] * 12, other_parameters=-100, protect=()) == count


def text_config(**values) -> SimpleNamespace:
    text = SimpleNamespace(model_type="llama", **values, to_dict=lambda: values)
    return SimpleNamespace(model_type="llava", text_config=text, get_text_config=lambda: text)


def test_per_layer_entries_follow_the_kept_layers():
    loaded = text_config(
        num_hidden_layers=6,
        layer_types=["s", "s", "f", "s", "s", "f"],
        mlp_only_layers=[0, 3, 4],
        max_window_layers=4,
        first_k_dense_replace=2,
    )
    raw = {
        "model_type": "x",
        "text_config": {"num_hidden_layers": 6, "max_window_layers": 4, "first_k_dense_replace": 2, "kept": 1},
    }
    text = pruned_config(raw, loaded, make_plan(6, (1, 3)))["text_config"]
    assert text["num_hidden_layers"] == 4
    assert text["layer_types"] == ["s", "f", "s", "f"]  # derived by default, but not by what a shorter default gives
    assert text["mlp_only_layers"] == [0, 2]
    assert text["max_window_layers"] == 2
    assert text["first_k_dense_replace"] == 1
    assert text["kept"] == 1
    assert raw["text_config"]["num_hidden_layers"] == 6


def test_flat_configurations_are_edited_in_place():
    loaded = text_config(num_hidden_layers=4, layer_types=["f"] * 4)
    assert pruned_config({"num_hidden_layers": 4, "vision_config": {}}, loaded, make_plan(4, (0,))) == {
        "num_hidden_layers": 3,
        "vision_config": {},
    }


def test_structure_that_a_gap_would_shift_is_refused():
    with pytest.raises(InputError, match="decoder_sparse_step=2, which dropping layers would break"):
        pruned_config({}, text_config(num_hidden_layers=4, decoder_sparse_step=2), make_plan(4, (1,)))
    shared = text_config(num_hidden_layers=4, num_kv_shared_layers=2)
    assert pruned_config({}, shared, make_plan(4, (0, 2)))["num_kv_shared_layers"] == 1
    with pytest.raises(InputError, match="'odd_entries', a list of 4 entries"):
        pruned_config({}, text_config(num_hidden_layers=4, odd_entries=[1, 2, 3, 4]), make_plan(4, (1,)))


def test_a_router_does_not_outlive_the_layers_that_it_chose_among():
    raw = {"num_hidden_layers": 4, "router": {"drop_at": 0}, "auto_map": {"AutoModelForImageTextToText": "m.R"}}
    for drop in ((1,), ()):
        pruned = pruned_config(raw, text_config(num_hidden_layers=4), make_plan(4, drop))
        assert pruned == {"num_hidden_layers": 4 - len(drop)}
    assert "router" in raw
