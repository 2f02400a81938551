"""What held-out answers lose is measured after training, written down, and kept to: shares of cost and of answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.checkpoints import without_verification
from tiny_models import random_image

from exporter.cards.figures import describe
from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.data.calibration import read_samples
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.modeling.routed_cost import value_at
from exporter.pipeline import route
from exporter.recipe import CalibrationData, RouterRecipe, RunOptions
from exporter.routing.cost import few_prompts, flops_of
from exporter.routing.folder import load_routed, set_default
from exporter.routing.requests import BudgetGrid, BudgetRequest
from exporter.routing.training.outcomes import LADDER, Judged, MixOutcome, front_of, limits_for, skips_of

PICTURES = 136


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Questions about as many pictures as it takes to hold some out."""
    folder = tmp_path_factory.mktemp("many")
    lines = []
    for number in range(PICTURES):
        random_image(np.random.default_rng(number), (40, 40)).save(folder / f"{number}.png")
        question = ("what color is it?", "describe the image.")[number % 2]
        lines.append(json.dumps({"image": f"{number}.png", "question": question, "answer": "red"}))
    path = folder / "many.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def judged_folder(tiny, many, tmp_path_factory) -> Path:
    with without_verification():
        data = CalibrationData(str(many), samples=PICTURES, answer_tokens=3)
        recipe = RouterRecipe(calibration=data, steps=2, batch_size=8)
        return route(tiny("llava"), recipe, tmp_path_factory.mktemp("judged") / "routed", RunOptions(batch_size=8))


@pytest.mark.slow
def test_a_router_brings_what_was_measured(judged_folder):
    settings = json.loads((judged_folder / "config.json").read_text())["router"]
    assert settings["presets"]["balanced"] == {"flops": 0.6} and settings["presets"]["token-only"]
    front = settings["budgets"]["front"]
    assert [share for share, _ in front] == sorted(share for share, _ in front)
    assert [layers for _, layers in front] == sorted(layers for _, layers in front)
    quality = settings["budgets"]["quality"]
    limits = [limit for _, limit, _ in quality["at"]]
    assert limits == sorted(limits) and quality["answers"] >= 16
    record = read_record(judged_folder).to_data()
    rows = record["router"]["measured"]
    assert sum(row["chosen"] for row in rows) == len(LADDER)
    assert all(0 < row["flops"] < 1.1 and row["kl"] >= -1e-6 and 0 <= row["same_answers"] <= 1 for row in rows)
    assert record["router"]["settings"] == settings


@pytest.mark.slow
def test_the_cost_is_kept_to(judged_folder, many):
    model = load_routed(open_source(str(judged_folder)), "cpu", torch.float32)
    prompts = few_prompts(read_samples(str(many)), load_processor(judged_folder), model.config, 2)
    whole = flops_of(model, prompts, None).decoder
    for preset, share in (("quality", 0.75), ("balanced", 0.6)):
        ask = BudgetRequest(model.router_settings.preset(preset), preset=preset)
        assert 0.8 * share < flops_of(model, prompts, ask).decoder / whole <= share


@pytest.mark.slow
def test_evaluate_tells_what_was_kept(judged_folder, many, tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["evaluate", str(judged_folder), "--task", str(many), "--samples", "8", "--max-new-tokens", "3"]
    assert main([*arguments, "--flops", "0.6", "--quality", "0.8", "--json", str(out), "--quiet"]) == 0
    whole, by_flops, by_quality = json.loads(out.read_text())["models"]
    assert whole["budget"] is None and by_flops["budget"]["flops"] == 0.6 and by_flops["decoder_flops_share"] <= 0.6
    same = [mine == its for mine, its in zip(by_quality["answers"], whole["answers"], strict=True)]
    assert by_quality["answers_kept"] == sum(same) / 8 and by_flops["answers_kept"] is None
    printed = capsys.readouterr().out
    assert "of its 8 answers kept, 80 % were asked for" in printed
    assert "60 % of the decoder's FLOPs" in (judged_folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (BudgetGrid(flops=(0.0,)), "flops=0.0 is no share of the decoder's operations"),
        (BudgetGrid(flops=(float("nan"),)), "flops=nan is no share"),
        (BudgetGrid(quality=(1.2,)), "quality=1.2 is no share of answers"),
        (BudgetGrid(quality=(0.999,)), "quality=0.999 is above .* route it again with more questions"),
        (BudgetGrid(flops=(0.5,), rule="random"), "only a router can keep a share of FLOPs .*: leave out --rule"),
    ],
)
def test_outcomes_that_can_not_be_had(wanted, message, judged_folder, many):
    with pytest.raises(InputError, match=message):
        evaluate([judged_folder], many, budgets=wanted)


def test_a_router_that_was_not_measured_is_to_be_routed_again(routed_folder, task):
    for wanted in (BudgetGrid(flops=(0.5,)), BudgetGrid(quality=(0.9,))):
        with pytest.raises(InputError, match="no such measurement: route it again with `lvlm-exporter route`"):
            evaluate([routed_folder], task, budgets=wanted)


def test_the_default_may_be_a_share_of_cost(judged_folder, many):
    set_default(judged_folder, "fast")
    model = load_routed(open_source(str(judged_folder)), "cpu", torch.float32)
    assert model.router_settings.default == "fast"
    set_default(judged_folder, "balanced")


def test_shares_in_words():
    rest = {"keep_visual_tokens": None, "keep_layers": None, "rule": "router", "drop_at": None}
    assert describe({"preset": None, "flops": 0.35, **rest}) == "35 % of the decoder's FLOPs"
    assert describe({"preset": "x", "quality": 0.995, **rest}) == "x: 99.5 % of the answers kept"


def test_limits_keep_what_is_asked_for():
    """The lowest limit from which on enough answers are kept, whatever lies above it."""
    random = torch.Generator().manual_seed(0)
    levels = torch.rand(400, 5, generator=random).sort(1).values
    last = levels[:, -1] + 0.1
    follows = torch.rand(400, 5, generator=random) < torch.linspace(0.3, 0.99, 5)
    asked = (0.5, 0.8, 0.95)
    found = limits_for(asked, levels, last, follows)
    assert found == sorted(found)
    for quality, limit in zip(asked, found, strict=True):

        def kept(limit: float) -> float:
            whole = last <= limit
            rungs = (levels <= limit).sum(1)
            at_rung = torch.tensor([bool(n) and bool(follows[i, n - 1]) for i, n in enumerate(rungs.tolist())])
            return float((at_rung | whole).double().mean())

        above = torch.cat([levels.flatten(), last])
        assert all(kept(float(x)) * 400 >= quality * 401 - 1e-6 for x in above[above >= limit].unique()[:50])
        below = above[above < limit].max()
        assert kept(float(below)) * 400 < quality * 401


def test_fewer_layers_have_to_show_that_they_help():
    number = 40
    pictures = tuple(range(number))

    def mix(kl: float, flops: float) -> MixOutcome:
        spread = [kl * (1 + 0.1 * (i % 5)) for i in range(number)]
        return MixOutcome(spread, [2] * number, [True] * number, [flops] * number, [0.5] * number)

    def judged(kl_of_fewer: float) -> Judged:
        mixes = {(share, 0): mix(1.0, share) for share in LADDER}
        return Judged(mixes | {(1 / 4, 1): mix(kl_of_fewer, 0.25), (1 / 2, 1): mix(1.2, 0.5)}, {}, {})

    assert front_of(judged(1.0), pictures, 8)[0] == [[0.25, 8], [0.5, 8]]
    assert front_of(judged(0.5), pictures, 8)[0] == [[0.25, 7], [0.5, 8]]
    assert skips_of(0) == [] and skips_of(2) == [1] and skips_of(6) == [1, 2, 3] and skips_of(16) == [1, 2, 4, 8]


def test_a_share_of_answers_lies_between_what_was_measured():
    points = [[0.5, 0.2, 0.1], [0.9, 0.6, 0.3]]
    assert [round(value_at(points, q), 6) for q in (0.1, 0.5, 0.7, 0.9)] == [0.2, 0.2, 0.4, 0.6]
