"""ONNX export of types that no row knows: facts found in a small model, and graphs of it run against torch."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES_HERE, make_config, make_tokenizer
from transformers import vision_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exporter.clean_room.onnx_components import features_in_order, torch_features
from exporter.errors import InputError
from exporter.onnx import trial
from exporter.onnx.found import facts_of, given_by_processor, small_model
from exporter.onnx.graphs.encoded import Numbers, attend_in_segments
from exporter.onnx.rows import SUPPORTED, NotExported, Support
from exporter.onnx.runtime.grids import patch_inputs
from exporter.onnx.support import support_of
from exporter.probe.tiny_config import tiny_config
from exporter.survey.table import listed_findings
from exporter.survey.trial import TypeFindings, why_no_onnx

FOUND = [found.model_type for found in listed_findings() if found.onnx is None and found.model_type not in SUPPORTED]
USUAL = "vipllava"  # the one of them that every run of the tests tries
REFUSED = {
    "fuyu": "its processor gives 'image_patches', which these graphs have no input for",
    "molmo2": "its processor gives 'image_grids', which these graphs have no input for",
    "hunyuan_vl": "of 4 x 8 patches it makes 12 features, which are no merged squares",
    "mistral4": "its configuration names no token that stands for a picture's features",
}


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_probe_finds_what_the_rows_say(family):
    """A row could be left out: its kind, blocks and positions are seen in a small model of the family."""
    config = make_config(family, 3, make_tokenizer(FAMILIES_HERE[family]))
    if family == "qwen2_vl":  # a small one has a tower of one width, which suits larger text models than this
        config = CONFIG_MAPPING[family]()
    found = facts_of(small_model(config))
    row = SUPPORTED[family]
    kind = {"patches": "grids"}.get(row.kind, row.kind)  # the same pictures, whose towers are written out or traced
    assert found == Support(kind, row.blocks, row.first_position, row.mrope, pictures=found.pictures)


@pytest.mark.slow
@pytest.mark.onnx_export
@pytest.mark.parametrize(
    "model_type", [USUAL, *(pytest.param(name, marks=pytest.mark.long_tail) for name in FOUND if name != USUAL)]
)
def test_graphs_of_other_types_say_what_torch_says(model_type):
    """Features and logits within 1e-4, the same tokens: with a picture, with several, without one, in a batch."""
    assert why_no_onnx(TypeFindings(model_type)) is None


def test_at_least_22_types_are_exported():
    assert USUAL in FOUND
    assert len(FOUND) + len(SUPPORTED) >= 22


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_types_are_refused_with_the_reason(model_type):
    config = tiny_config(CONFIG_MAPPING[model_type](), 3)
    with pytest.raises(InputError, match=rf"{model_type} can't be exported to ONNX: {REFUSED[model_type]}"):
        support_of(config)


def test_what_a_processor_gives_is_read_in_its_code():
    assert {"pixel_values", "pixel_mask"} <= given_by_processor("aria")
    assert given_by_processor("no_such_type") == set()


# --- a wrong graph is seen --------------------------------------------------------------------------------------------


class Runner:
    """The answers of torch, as the runner of a folder gives them, with something added to one of them."""

    def __init__(self, model, inputs, **added):
        self.answer, self.added = trial.answered(model, inputs), added
        self.features = torch_features(model, inputs)

    def prompt(self, arrays):
        return None

    def image_features(self, prompt):
        return self.features + self.added.get("features", 0)

    def prefill(self, prompt, new_tokens):
        self.number = 0
        return self._logits(), None

    def step(self, state, tokens):
        self.number += 1
        return self._logits()

    def _logits(self):
        logits = self.answer.logits[self.number].float().numpy().copy()
        return logits + (self.added.get("logits", 0) if self.number == 2 else 0)


@pytest.fixture(scope="module")
def vipllava():
    model = small_model(tiny_config(CONFIG_MAPPING["vipllava"](), 3))
    support = facts_of(model)
    inputs = trial.batch(model, support, [[trial.picture(model, support, 0)]])
    return model, inputs


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"features": 1e-2}, r"with a picture, its features differ from torch by 1\.0e-02"),
        ({"logits": 1e-2}, r"with a picture, its logits of token 3 differ from torch by 1\.0e-02"),
        ({}, None),
    ],
)
def test_a_difference_from_torch_is_named(vipllava, added, message):
    model, inputs = vipllava
    runner = Runner(model, inputs, **added)
    if message is None:
        trial.compare(model, runner, what="a picture", inputs=inputs)
        return
    with pytest.raises(NotExported, match=message):
        trial.compare(model, runner, what="a picture", inputs=inputs)


def test_another_token_is_seen(vipllava, monkeypatch):
    """Within the tolerance of logits a tie may still turn."""
    model, inputs = vipllava
    runner = Runner(model, inputs)
    monkeypatch.setattr(trial, "refuse_gap", lambda *_: None)
    monkeypatch.setattr(runner, "_logits", lambda: -runner.answer.logits[0].float().numpy())
    with pytest.raises(NotExported, match="with a picture, another token 1 is chosen"):
        trial.compare(model, runner, what="a picture", inputs=inputs)


# --- what the host computes, against transformers ---------------------------------------------------------------------

SHAPES = [(8, 16), (12, 8), (4, 20), (10, 14)]  # rows and columns of patches


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("merge", [1, 2])
def test_places_and_windows_are_those_of_transformers(rows, columns, merge):
    grid = torch.tensor([[1, rows, columns]])
    given = patch_inputs({"position_ids": {"merge": merge, "with_time": False}}, rows, columns)
    assert np.array_equal(given["position_ids"], vision_utils.get_vision_position_ids(grid, merge))
    timed = patch_inputs({"position_ids": {"merge": merge, "with_time": True}}, rows, columns)
    expected = vision_utils.get_vision_position_ids(grid, merge, include_temporal=True)
    assert np.array_equal(timed["position_ids"], expected)
    windows = patch_inputs({"windows": {"merge": merge, "window": 112, "patch": 14}}, rows, columns)
    order, ends = vision_utils.get_vision_window_index(grid, merge, 112, 14)
    assert np.array_equal(windows["window_index"], order) and np.array_equal(windows["cu_window_seqlens"], ends)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("align_corners", "padding"), [(True, "border"), (False, "border"), (False, "zeros")])
def test_tables_are_resampled_as_in_transformers(rows, columns, mode, align_corners, padding):
    settings = {"side": 7, "merge": 2, "mode": mode, "align_corners": align_corners, "padding": padding}
    given = patch_inputs({"resampling": settings}, rows, columns)
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, rows, columns]]), 7, mode, align_corners, 2, padding
    )
    assert np.array_equal(given["interp_indices"], taps)
    assert np.allclose(given["interp_weights"], weights, atol=1e-5)


def test_segments_see_themselves_alone():
    query, key, value = torch.randn(3, 1, 2, 9, 4).unbind(0)
    ends = torch.tensor([0, 2, 7, 9])
    mixed, _ = attend_in_segments(None, query, key, value, cu_seq_lens_q=ends, scaling=0.5)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale=0.5)
        for a, b in itertools.pairwise(ends)
    ]
    torch.testing.assert_close(mixed.transpose(1, 2), torch.cat(parts, 2))


def test_numbers_are_read_as_a_tensor_is():
    rows = [[1, 6, 4]]
    mine, tensor = Numbers(rows), torch.tensor(rows)
    assert mine.prod(-1).tolist() == tensor.prod(-1).tolist() == [24]
    assert (mine.prod(-1) // 4).tolist() == (tensor.prod(-1) // 4).tolist()
    assert mine[:, 1].tolist() == tensor[:, 1].tolist() and mine[0, 2] == tensor[0, 2]
    assert mine[:, 1:].tolist() == tensor[:, 1:].tolist() and mine.shape == tensor.shape
    assert [row.tolist() for row in mine] == [row.tolist() for row in tensor]
    assert [part.tolist() for part in mine.unbind(-1)] == [part.tolist() for part in tensor.unbind(-1)]
    assert torch.equal(mine[torch.tensor([0, 0]), 1], tensor[torch.tensor([0, 0]), 1])


def test_further_features_stand_beside_the_first():
    further = [[torch.full((2, 3), 2.0), torch.full((1, 3), 3.0)]]
    output = SimpleNamespace(pooler_output=(torch.ones(2, 3), torch.ones(1, 3)), deepstack_features=further)
    features = features_in_order(output)
    assert features.shape == (3, 6) and features[:, 3:].tolist() == [[2.0] * 3, [2.0] * 3, [3.0] * 3]
