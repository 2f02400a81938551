"""Layers of different kinds that take turns: what still does after pruning, and what does not."""

from __future__ import annotations

import pytest
from transformers import Gemma3Config, Qwen2VLConfig

from exporter.plan import attention_period, breaks_period, may_break_period

SIX = ["sliding_attention"] * 5 + ["full_attention"]


def gemma(layers: int) -> Gemma3Config:
    return Gemma3Config(text_config={"num_hidden_layers": layers, "hidden_size": 32, "num_attention_heads": 2})


def without(layers: int, *gone: int) -> list[int]:
    return [layer for layer in range(layers) if layer not in gone]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (gemma(34), ("layer_types", 6)),
        (gemma(8), ("layer_types", 6)),  # seen once only, but the configuration says so
        (Qwen2VLConfig(), None),
        ({"text_config": {"layer_types": SIX * 3}}, ("layer_types", 6)),
        ({"layer_types": SIX}, None),
        ({"layer_types": SIX, "sliding_window_pattern": 6}, ("layer_types", 6)),
        ({"no_rope_layers": [1, 1, 1, 0] * 3}, ("no_rope_layers", 4)),
        ({"layer_types": ["a", "b"] * 2 + ["a"]}, ("layer_types", 2)),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 4}, None),
        ({"layer_types": ["full_attention"] * 8}, None),
        ({"layer_types": None}, None),
        ({}, None),
    ],
)
def test_periods(config, expected):
    assert attention_period(config) == expected


@pytest.mark.parametrize(
    "keep", [range(34), range(28), without(34, *range(6, 12)), without(34, *range(12)), without(34, 0), [0, 1, 2]]
)
def test_what_keeps_the_period(keep):
    """Whole periods gone, the last layers gone, or so few left that the first difference is not reached."""
    config = gemma(34)
    types = [config.text_config.layer_types[layer] for layer in keep]
    assumed = (SIX * 6)[: len(types)]
    assert (breaks_period(config, list(keep)) is None) == (types == assumed)


def test_what_breaks_it_is_said_with_the_layer():
    warning = breaks_period(gemma(34), without(34, 5, 9))
    assert (
        "break the period of 6 layers in layer_types: layer 5 (layer 6 of the base model) is 'sliding_attention'"
        in (warning or "")
    )
    assert "the period has 'full_attention'" in warning and "llama.cpp and mlx-vlm do for Gemma 3" in warning
    assert "no_rope_layers: layer 3 (layer 4 of the base model) is 1, where the period has 0" in (
        breaks_period({"no_rope_layers": [1, 1, 1, 0] * 3}, without(12, 3)) or ""
    )


def test_before_it_is_known_which_layers_go():
    assert may_break_period(gemma(34), 2, (5, 9)) == breaks_period(gemma(34), without(34, 5, 9))
    assert may_break_period(gemma(34), 6, (6, 7, 8, 9, 10, 11)) is None
    assert "has a period of 6 layers, which the kept layers will break unless" in (
        may_break_period(gemma(34), 2, None) or ""
    )
    assert may_break_period(gemma(34), 0, None) is None and may_break_period(Qwen2VLConfig(), 2, None) is None
