"""Budgets by outcome: what is kept costs what was asked for at most, counted by torch; a batch is its rows alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.checkpoints import FAMILIES
from fixtures.priced import priced
from fixtures.routed import CLOSE, Case, generated, make_case
from torch.nn import functional as F

from exporter.data.batches import Batch
from exporter.modeling.routed_api import cache_of, logger
from exporter.modeling.routed_cost import LEVELS, DecoderCost, layers_at
from exporter.modeling.routed_route import Budget
from exporter.onnx.runtime.cost import PromptCost
from exporter.onnx.runtime.cost import layers_at as layers_at_without_torch
from exporter.routing.cost import prefill_flops


def counted(case: Case, prompt: dict[str, Any], **budget: Any) -> int:
    visual = case.visual(prompt)
    batch = Batch(inputs=dict(prompt), is_visual=visual, is_text=~visual, samples=())
    return prefill_flops(case.model, batch, **budget).decoder


def lengths(case: Case, prompt: dict[str, Any], row: int = 0) -> tuple[int, int]:
    return int(prompt["attention_mask"][row].sum()), int(case.visual(prompt)[row].sum())


@pytest.fixture(scope="module")
def case(tiny, tmp_path_factory) -> Case:
    made = make_case("llava", tiny("llava"), tmp_path_factory.mktemp("routed") / "model", drop_at=1)
    priced(made.model)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_costs_what_was_asked_for_at_most(family, tiny, tmp_path):
    """The formula is torch's count, to the operation."""
    case = make_case(family, tiny(family), tmp_path / "model", drop_at=1)
    cost = priced(case.model)
    prompt = case.prompts([0])
    whole, size = counted(case, prompt, preset="off"), lengths(case, prompt)
    assert cost.whole(size[0]) == whole
    for asked in (0.9, 0.6, 0.45):
        route = case.model.route(**prompt, flops=asked)
        kept, layers = int((route.keep & route.visual).sum()), int(route.layers.sum())
        spent = counted(case, prompt, flops=asked)
        assert spent == cost.routed(*size, kept, layers)
        if (kept, layers) != (1, cost.least_layers):
            assert spent <= asked * whole
        if kept < size[1]:
            assert cost.routed(*size, kept + 1, layers) > asked * whole  # no token more could be paid for


def test_cost_rises_with_the_share(case):
    prompt = case.prompts([0])
    size, cost = lengths(case, prompt), DecoderCost.of(case.model.router_settings)
    front = case.model.router_settings.budgets["front"]
    mixes = [cost.mix(share / 100, front, *size) for share in range(35, 101)]
    spent = [cost.share(*size, *mix) for mix in mixes]
    a_token = max(
        cost.share(*size, 2, layers) - cost.share(*size, 1, layers) for layers in range(3, case.num_layers + 1)
    )
    assert all(later >= before - a_token for before, later in pairwise(spent))
    assert spent[0] < 0.4 and spent[-1] > 0.9
    fewer = [cost.most_tokens(share / 100, *size, case.num_layers) for share in range(35, 101)]
    assert fewer == sorted(fewer)


@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"flops": 0.45}, {"quality": 0.9}, {"quality": 0.7}])
def test_a_batch_is_its_rows_alone(budget, case):
    """Rows of different lengths, padded, with one picture and with two, and one of text alone, which runs whole."""
    images = {1: 2, 2: 0}
    together = generated(case, case.prompts(images=images), **budget)
    kept = together.route.kept_tokens()
    for row in range(3):
        alone = generated(case, case.prompts([row], images=images), **budget)
        if alone.route is not None:  # text alone has none
            assert torch.equal(alone.route.kept_tokens()[0], kept[row])
            assert torch.equal(alone.route.layers[0], together.route.layers[row])
        for mine, its in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(mine[0], its[row], **CLOSE)
    assert together.route.layers[2].all() and len(kept[2]) == 0
    assert len({len(one) for one in kept}) > 1


def test_answers_do_not_change_what_is_kept(case):
    """Labels behind a prompt are no part of what is paid for: training sees the route of the question."""
    prompt = case.prompts([0])
    expected = case.model.route(**prompt, flops=0.6)
    length = prompt["input_ids"].shape[1]
    longer = {
        **prompt,
        "input_ids": F.pad(prompt["input_ids"], (0, 9), value=5),
        "attention_mask": F.pad(prompt["attention_mask"], (0, 9), value=1),
    }
    found = case.model.route(**longer, flops=0.6, prompt_length=length)
    assert torch.equal(found.keep[:, :length], expected.keep)


def test_all_of_the_cost_is_the_plain_model(case):
    prompt = case.prompts([0])
    assert Budget(flops=1.0).is_off and Budget(flops=1).is_off
    with torch.no_grad():
        whole, plain = (case.model(**prompt, **ask).logits for ask in ({"flops": 1.0}, {"preset": "off"}))
    assert torch.equal(whole, plain)
    assert case.model.route(**prompt, flops=1.0).keep.all()


def test_a_share_is_remembered(case):
    try:
        case.model.set_budget(flops=0.6)
        expected = case.model.route(**case.prompts([0]), flops=0.6)
        assert torch.equal(case.model.route(**case.prompts([0])).keep, expected.keep)
    finally:
        case.model.set_budget("off")


def test_a_later_turn_keeps_the_layers_of_the_first(case):
    first = case.prompts([0])
    made = generated(case, first, flops=0.45)
    second = case.prompts([1])
    text = torch.cat([made.sequences, second["input_ids"]], 1)
    inputs = {
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "pixel_values": second["pixel_values"],
    }
    cache = cache_of(made)
    again = generated(case, inputs, flops=0.6, past_key_values=cache)
    assert torch.equal(cache_of(again).route.layers, made.route.layers)
    assert all(step.isfinite().all() for step in again.logits)


def test_what_can_not_be_reached_is_said(case, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    route = case.model.route(**case.prompts([0]), flops=0.05)
    cost = DecoderCost.of(case.model.router_settings)
    assert int((route.keep & route.visual).sum()) == 1 and int(route.layers.sum()) == cost.least_layers
    assert len(said) == 1 and "flops=0.05 is below 0." in said[0] and "the least that this prompt can run at" in said[0]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"flops": 0}, "flops=0 is no share of the decoder's operations"),
        ({"flops": 1.5}, "flops=1.5 is no share"),
        ({"flops": float("nan")}, "flops=nan is no share"),
        ({"flops": True}, "flops=True is no share"),
        ({"flops": "0.5"}, "flops='0.5' is no share"),
        ({"quality": 1.0}, "quality=1.0 is no share of answers to keep"),
        ({"quality": float("nan")}, "quality=nan is no share"),
        ({"quality": 0.999}, "quality=0.999 is above 0.99, the most that 300 held-out answers can tell of"),
        ({"flops": 0.5, "keep_visual_tokens": 9}, "each of them is a budget"),
        ({"flops": 0.5, "quality": 0.9}, "each of them is a budget"),
        ({"flops": 0.5, "preset": "fast"}, "give either preset='fast' or keep_visual_tokens and keep_layers, flops"),
    ],
)
def test_what_is_no_budget_is_refused(budget, message, case):
    for call in (case.model.generate, case.model):
        with pytest.raises(ValueError, match=message):
            call(**case.prompts([0]), **budget)
    with pytest.raises(ValueError, match=message):
        case.model.set_budget(**budget)


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"quality": 0.9}])
def test_a_router_that_was_not_measured_says_so(budget, tiny, tmp_path: Path):
    case = make_case("llava", tiny("llava"), tmp_path / "model", drop_at=1)
    with pytest.raises(ValueError, match=r"no such measurement: route it again with `lvlm-exporter route` and 128"):
        case.model.generate(**case.prompts([0]), **budget)


def test_levels_rise_and_padding_changes_none():
    logits = torch.randn(2, 9, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    logits[1, 3:] = logits[0, 1:7]
    for level in LEVELS.values():
        levels = level(logits, visual)[:, :6]
        assert (levels.diff() >= 0).all()
        torch.testing.assert_close(levels[0], levels[1])


def test_quality_keeps_more_of_what_is_asked_more_surely(case):
    kept = [case.model.route(**case.prompts(), quality=q).keep.sum() for q in (0.3, 0.5, 0.7, 0.9, 0.99)]
    assert kept == sorted(kept) and kept[0] == kept[1] < kept[-1]


def test_graphs_count_alike(case):
    """The runner without torch has the same numbers."""
    settings = case.model.router_settings
    cost = DecoderCost.of(settings)
    facts = {
        "drop_at": settings.drop_at,
        "candidates": list(settings.candidates),
        "budgets": {"cost": settings.budgets["cost"] | {"router_width": settings.bottleneck}},
    }
    mine, front = PromptCost.of(facts), settings.budgets["front"]
    for share in (0.2, 0.4, 0.5, 0.7, 0.95):
        for length, visual in ((37, 25), (120, 100), (12, 0)):
            assert mine.mix(share, front, length, visual) == cost.mix(share, front, length, visual)
        assert layers_at_without_torch(front, share, 6) == layers_at(front, share, 6)


def test_layers_lie_between_what_was_measured():
    front = [[0.2, 4], [0.4, 6]]
    assert [layers_at(front, share, 8) for share in (0.1, 0.2, 0.3, 0.4, 0.7, 1.0)] == [4, 4, 5, 6, 7, 8]
    assert layers_at([], 0.5, 8) == 8
