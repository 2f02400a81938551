"""Evaluating under budgets: judged is what the routed model does, FLOPs are counted right, figures reach the card."""

from __future__ import annotations

import json

import pytest
import torch

from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.data.batches import make_batch
from exporter.data.calibration import read_samples
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.modeling.routed_route import Budget, Route
from exporter.plan import LayerBudget as LayerBudget
from exporter.recipe import RunOptions
from exporter.routing.cost import few_prompts, flops_of
from exporter.routing.requests import BudgetGrid, BudgetRequest
from exporter.routing.rules import Rule

TOKENS = {"max_new_tokens": 4, "options": RunOptions(batch_size=5)}


@pytest.mark.slow
def test_figures_are_those_of_the_routed_model(routed_folder, routed_model, tiny, task):
    wanted = BudgetGrid(keep_visual_tokens=(6, 0.5), keep_layers=(4,), presets=("off", "fast"))
    done = evaluate([routed_folder], task, reference=tiny("llava"), budgets=wanted, **TOKENS)
    assert [m.budget and (m.budget["preset"], m.budget["keep_visual_tokens"]) for m in done.models] == [
        None, (None, 6), (None, 0.5), None, ("fast", 0.25)]  # fmt: skip
    original, six, _, off, _ = done.models
    assert off.answers == original.answers and off.kl == pytest.approx(0, abs=1e-9) and off.flops_share is None
    samples, processor = read_samples(str(task)), load_processor(routed_folder)
    kl = tokens = 0.0
    for sample, answer in zip(samples, six.answers, strict=True):
        batch = make_batch([sample], processor, routed_model.config)
        made = routed_model.generate(**batch.inputs, keep_visual_tokens=6, keep_layers=4, max_new_tokens=4)
        said = made[:, batch.inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.batch_decode(said, skip_special_tokens=True)[0].strip() == answer
        reference = routed_model.generate(**batch.inputs, preset="off", max_new_tokens=4)
        whole = {**batch.inputs, "input_ids": reference, "attention_mask": torch.ones_like(reference)}
        length = reference.shape[1] - batch.inputs["input_ids"].shape[1]
        route = routed_model.route(**batch.inputs, keep_visual_tokens=6, keep_layers=4)
        with torch.no_grad():
            p, q = (
                routed_model(**whole, **options).logits[0, -length - 1 : -1].log_softmax(-1)
                for options in ({"preset": "off"}, {"route": route})
            )
        kl, tokens = kl + float((p.exp() * (p - q)).sum()), tokens + length
    assert six.tokens == tokens
    assert six.kl == pytest.approx(kl / tokens, rel=1e-3)
    assert 0 < six.decoder_flops_share < six.flops_share < 1
    entries = json.loads((routed_folder / "compression.json").read_text())["evaluations"]
    assert [entry["budget"] and entry["budget"]["keep_visual_tokens"] for entry in entries] == [6, 0.5, None, 0.25]
    card = (routed_folder / "README.md").read_text()
    assert "| task.jsonl | fast: 0.25 of the visual tokens, 5 layers |" in card
    assert "(6 visual tokens, 4 layers)" in card  # the hub's metadata tells them apart
    again = evaluate(
        [routed_folder],
        task,
        reference=tiny("llava"),
        budgets=BudgetGrid(keep_visual_tokens=(6,), keep_layers=(4,)),
        **TOKENS,
    )
    assert again.models[1].answers == six.answers
    assert len(json.loads((routed_folder / "compression.json").read_text())["evaluations"]) == 4  # replaced


def test_counted_flops_are_those_of_what_runs(routed_folder, routed_model, task):
    """Against products counted by hand: 2 a multiply-add, attention over the whole square."""
    prompts = few_prompts(read_samples(str(task)), load_processor(routed_folder), routed_model.config, 2)
    assert len(prompts) == 2 and all(len(batch.samples) == 1 for batch in prompts)

    def by_hand(kept: int, layers: int) -> int:
        total = 0
        for batch in prompts:
            length = batch.is_visual.shape[1] - int(batch.is_visual.sum()) + kept
            per_token = 64 * (64 + 2 * 64 + 64) + 3 * 64 * 112  # q, k, v, o of 4 heads each, the gated MLP
            total += layers * 2 * (length * per_token + 2 * 64 * length**2)
        return total

    unrouted = flops_of(routed_model, prompts, None)
    routed = flops_of(routed_model, prompts, BudgetRequest(Budget(6, 4), Rule("random", "random")))
    assert unrouted.decoder == by_hand(25, 6)
    assert routed.decoder == by_hand(6, 4)
    assert unrouted.total - unrouted.decoder == routed.total - routed.decoder > 0  # the vision tower and the head
    with_router = flops_of(routed_model, prompts, BudgetRequest(Budget(6, 4)))
    assert with_router.decoder > routed.decoder
    route = Route(layers=torch.ones(1, 6, dtype=torch.bool))
    assert routed_model(**prompts[0].inputs, route=route).logits.isfinite().all()


@pytest.mark.slow
def test_rules_choose_in_place_of_the_router(routed_folder, tiny, task, questions):
    asks = {"fastv": BudgetGrid((0.5,), rule="fastv"), "random": BudgetGrid((0.5,), (5,), rule="random", drop_at=0)}
    asks["shortgpt"] = BudgetGrid(keep_layers=(4,), rule="shortgpt")
    for rule, wanted in asks.items():
        done = evaluate(
            [tiny("llava")], task, reference=tiny("llava"), budgets=wanted, calibration=str(questions), **TOKENS
        )
        plain, ruled = done.models
        assert ruled.budget["rule"] == rule and ruled.kl > 0 and ruled.answers != plain.answers
        assert rule in ruled.label and plain.label == str(tiny("llava"))


@pytest.mark.slow
def test_answers_on_disk_are_kept_apart_by_budget(routed_folder, task, tmp_path):
    path = tmp_path / "answers.jsonl"
    for tokens in (3, 6):
        evaluate([routed_folder], task, budgets=BudgetGrid((tokens,)), predictions=path, update_cards=False, **TOKENS)
    models = {json.loads(line)["run"] for line in path.read_text().splitlines()}
    assert len(models) == 2 and len(path.read_text().splitlines()) == 24


def test_command_line(routed_folder, task, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = [
        "evaluate",
        str(routed_folder),
        "--task",
        str(task),
        "--keep-visual-tokens",
        "0.5,7",
        "--keep-layers",
        "all,5",
    ]
    assert (
        main([*arguments, "--max-new-tokens", "3", "--json", str(out), "--quiet", "--no-card", "--samples", "3"]) == 0
    )
    models = json.loads(out.read_text())["models"]
    assert [(m["budget"]["keep_visual_tokens"], m["budget"]["keep_layers"]) for m in models] == [
        (0.5, None), (0.5, 5), (7, None), (7, 5)]  # fmt: skip
    assert "decoder FLOPs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            BudgetGrid((0.5,)),
            "has no router, so that it can't run under a budget: train one with `lvlm-exporter route`",
        ),
        (BudgetGrid(presets=("fast",)), "has no router"),
        (BudgetGrid((0.5,), rule="shortgpt"), "rule 'shortgpt' keeps all visual tokens"),
        (BudgetGrid((0.5,), rule="fast"), "rule 'fast' is not known"),
        (BudgetGrid(keep_layers=(4,), rule="shortgpt"), "measures layers on questions: give --calibration FILE"),
        (BudgetGrid((0.5,), rule="fastv", drop_at=9), "--drop-at 9: give a number from 0 to 6"),
        (BudgetGrid(rule="fastv"), "--rule fastv chooses under a budget"),
    ],
)
def test_budgets_that_a_plain_folder_cannot_have(wanted, message, tiny, task):
    with pytest.raises(InputError, match=message):
        evaluate([tiny("llava")], task, budgets=wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (BudgetGrid(presets=("turbo",)), "preset 'turbo' is not known: this model has off, quality"),
        (BudgetGrid(keep_layers=(2,)), "keep_layers=2 is out of range"),
        (BudgetGrid((1.5,)), "keep_visual_tokens=1.5 is no share"),
    ],
)
def test_budgets_that_are_out_of_range(wanted, message, routed_folder, task):
    with pytest.raises(InputError, match=message):
        evaluate([routed_folder], task, budgets=wanted)
