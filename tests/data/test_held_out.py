"""What judges a choice: questions about pictures that nothing was fitted on, and the noise of what they say."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import yaml
from fixtures.checkpoints import QUESTIONS, without_verification
from PIL import Image
from tiny_models import random_image

from exporter.compression.job import prepare
from exporter.compression.steps import fold_gaps, fold_job, localize
from exporter.data.batches import make_batches
from exporter.data.pictures import pictures_of, split_by_picture
from exporter.data.samples import Sample
from exporter.fold import reconstruction
from exporter.fold.held_out import HeldOut
from exporter.fold.reconstruction import TOKENS_PER_INPUT, fold_reconstruction
from exporter.methods import FOLDS, Fold
from exporter.models.divergence import Divergence, StateErrors, most_faithful, simplest
from exporter.models.loading import text_decoder
from exporter.models.variants import Variant
from exporter.pipeline import compress
from exporter.plan import LayerBudget, make_plan
from exporter.recipe import CalibrationData, Recipe, RunOptions, load_recipe
from exporter.routing.training.loop import parted


def sample(number: int, *colors: int, type: str | None = None) -> Sample:
    images = tuple(Image.new("RGB", (4, 4), (color, 0, 0)) for color in colors)
    return Sample(f"line {number}", images, ({"role": "user", "content": f"{number}?"},), type=type)


def test_pictures_are_told_apart_by_their_content():
    samples = [sample(0, 1), sample(1, 2), sample(2, 1), sample(3, 3, 4), sample(4, 4), sample(5)]
    numbers = pictures_of(samples)
    assert numbers[0] == numbers[2]
    assert numbers[3] == numbers[4], "questions that share one of several images belong together"
    assert len(set(numbers)) == 4


@pytest.mark.parametrize("seed", range(3))
def test_no_picture_is_on_both_sides_and_types_keep_their_share(seed):
    samples = [sample(n, n // 3, type="abcdef"[n % 6]) for n in range(240)]  # types in turn, three questions a picture
    split = split_by_picture(samples, 48, seed)
    pictures = pictures_of(samples)
    assert not {pictures[i] for i in split.fit} & {pictures[i] for i in split.held_out}
    assert sorted(split.fit + split.held_out) == sorted(split.drawn) == list(range(240))
    assert 40 <= len(split.held_out) <= 56
    counts = {name: sum(samples[i].type == name for i in split.held_out) for name in "abcdef"}
    assert min(counts.values()) >= 4
    assert len({pictures[i] for i in split.fit[:20]}) == 20, "the first ones drawn are about as many pictures"
    assert split_by_picture(samples, 48, seed) == split
    assert split_by_picture(samples, 48, seed + 1) != split


def test_a_router_is_judged_by_other_pictures_than_it_is_trained_on():
    samples = [sample(n, n // 3, type="abcdef"[n % 6]) for n in range(240)]
    trained_on, held_out = parted(samples, seed=0)
    pictures = pictures_of(samples)
    assert not {pictures[i] for i in trained_on} & {pictures[i] for i in held_out}
    assert {samples[i].type for i in held_out} == set("abcdef"), "every eighth row would hold three of six"
    assert parted(samples[:12], seed=0) == (list(range(12)), [])


def test_too_few_pictures_are_said():
    split = split_by_picture([sample(n, n // 6) for n in range(30)], 6, 0)
    assert split.held_out == ()
    assert "about 5 pictures, and at least 8 are needed" in split.too_few


def test_errors_are_over_pictures_and_differences_below_them_go_to_the_simpler():
    alone = Divergence((0.1, 0.3, 0.2, 0.4), (1, 1, 1, 1), (0, 1, 2, 3))
    assert alone.mean == pytest.approx(0.25)
    assert alone.error == pytest.approx(math.sqrt(0.05 / 3 / 4))  # of four independent values
    together = dataclasses.replace(alone, pictures=(0, 0, 1, 1))
    assert together.error != pytest.approx(alone.error)
    assert dataclasses.replace(alone, pictures=(0, 0, 0, 0)).error == math.inf
    noisy = Divergence((0.0, 0.4, 0.0, 0.5), (1, 1, 1, 1), (0, 1, 2, 3))
    better = Divergence((0.05, 0.25, 0.15, 0.35), (1, 1, 1, 1), (0, 1, 2, 3))
    assert simplest([alone, noisy]) == 0
    assert simplest([alone, better]) == 1, "it is better on every picture"


def test_an_error_where_the_head_does_not_look_is_passed_over_for_answers_that_stay():
    def judged(error: float, others: int) -> Divergence:
        follows = tuple(number >= others for number in range(32))
        states = StateErrors((10 * error,) * 3, (10,) * 3)
        return Divergence((0.1,) * 32, (1,) * 32, tuple(range(32)), follows, states=states)

    unseen = judged(0.22, others=5)
    assert judged(0.20, others=11).more_others_than(unseen) == pytest.approx((6 / 32, (6 * 26 / 31) ** 0.5 / 32))
    assert most_faithful([judged(0.20, others=11), unseen]) == 1
    assert most_faithful([judged(0.20, others=6), unseen]) == 0, "one answer more is within the noise"
    assert most_faithful([judged(0.20, others=5), unseen]) == 0
    for number in range(2, 200):  # one answer is just its own standard error, whatever rounding says
        states, follows = StateErrors((1.0,) * 3, (10,) * 3), (True,) * (number - 1)
        kl, tokens, pictures = (0.1,) * number, (1,) * number, tuple(range(number))
        same = Divergence(kl, tokens, pictures, (*follows, True), StateErrors((2.0,) * 3, (10,) * 3))
        assert most_faithful([Divergence(kl, tokens, pictures, (*follows, False), states), same]) == 0, number


def test_the_error_of_the_states_decides_unless_the_divergence_clearly_speaks_against_it():
    def judged(kl: tuple[float, ...], error: float) -> Divergence:
        return Divergence(kl, (1,) * len(kl), tuple(range(len(kl))), states=StateErrors((10 * error,) * 3, (10,) * 3))

    none = judged((0.2, 0.2, 0.3, 0.3), 0.10)
    noisy = judged((0.1, 0.1, 0.1, 0.9), 0.03)  # one answer went wrong: no proof
    worse = judged((0.4, 0.4, 0.5, 0.5), 0.03)  # every answer is worse
    assert most_faithful([none, noisy]) == 1
    assert most_faithful([none, worse]) == 0
    assert most_faithful([none, worse, judged((0.25, 0.25, 0.3, 0.3), 0.08)]) == 2
    assert most_faithful([none, judged((0.2, 0.2, 0.3, 0.3), 0.10)]) == 0, (
        "of equals the first, which is the simpler one"
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two dozen pictures with two questions each."""
    import numpy as np

    folder, random = tmp_path_factory.mktemp("many"), np.random.default_rng(3)
    lines = []
    for index in range(24):
        random_image(random, (48, 48)).save(folder / f"{index}.png")
        lines += [{"image": f"{index}.png", "question": QUESTIONS[(index + k) % len(QUESTIONS)]} for k in (0, 3)]
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def opened(model, data, count=2, **changes):
    calibration = CalibrationData(str(data), samples=None, answer_tokens=6)
    job = prepare(Recipe(str(model), calibration, LayerBudget(drop_layers=count), **changes), RunOptions(batch_size=8))
    loaded, _ = job.load_model()
    return job, loaded, job.questions(loaded)


def test_the_fold_that_is_applied_is_no_worse_than_none_on_held_out_questions(tiny, many):
    job, model, questions = opened(tiny("llava"), many)
    for drop in ((2, 4), (1, 2), (0, 5)):
        plan = make_plan(6, drop)
        folded, told = fold_gaps(job, model, questions, plan)
        none, chosen = HeldOut(model, questions).judge([Variant(plan), Variant(plan, folded)])
        assert chosen.mean <= none.mean
        assert told["candidates"]["none"]["kl"] >= told["held_out"]["kl"]
        assert told["held_out"]["kl"] == pytest.approx(chosen.mean)
        assert bool(folded) == (told["name"] != "none")


def test_more_questions_add_to_what_fewer_have_said(tiny, many):
    _, model, questions = opened(tiny("llava"), many)
    held_out, variants = HeldOut(model, questions), [Variant(make_plan(6, drop)) for drop in ((2,), (1, 4))]
    at_once = held_out.judge(variants)
    in_turn = held_out.judge(variants, known=held_out.judge(variants, 4))
    assert held_out.judge(variants, 4, known=in_turn) == in_turn, "nothing is asked twice"
    for one, two in zip(at_once, in_turn, strict=True):
        assert sorted(one.pictures) == sorted(two.pictures)
        assert one.states.tokens == two.states.tokens > (0, 0, 0)
        assert two.mean == pytest.approx(one.mean, rel=1e-4)
        assert two.error == pytest.approx(one.error, rel=1e-4)
        assert two.state_error == pytest.approx(one.state_error, rel=1e-4)
        assert sum(two.follows) == sum(one.follows) and len(two.follows) == len(two.kl)
    more, error = at_once[1].more_than(at_once[0])
    assert at_once[1].compared_with(at_once[0]) == {"more": more, "error": error}


def test_a_fold_that_hurts_is_rejected(tiny, many, monkeypatch):
    job, model, questions = opened(tiny("llava"), many)

    def ruin(job, **options):
        return {(1, "mlp.down_proj.weight"): -9 * job.read(1, "mlp.down_proj.weight")}

    for name in ("scp", "scp_both", "least_squares", "reconstruction"):
        monkeypatch.setitem(FOLDS, name, Fold(ruin, name))
    folded, told = fold_gaps(job, model, questions, make_plan(6, (2, 4)))
    assert folded == {}
    assert told["name"] == "none"


def test_with_too_few_tokens_the_refit_falls_back_and_says_so(tiny, many):
    job, model, questions = opened(tiny("llava"), many)
    plan = make_plan(6, (2, 4))
    made = fold_job(job, model, questions, plan)
    width = made.read(1, "mlp.down_proj.weight").shape[1] + made.read(1, "self_attn.o_proj.weight").shape[1]
    folded = fold_reconstruction(dataclasses.replace(made, batches=lambda share: questions.batches("f", number=1)))
    tokens = made.report["tokens"]
    assert made.report["inputs"] == width
    assert ("fell_back" in made.report) == (tokens < TOKENS_PER_INPUT * width)
    if "fell_back" in made.report:
        assert len({name for _, name in folded}) <= 1


@pytest.mark.parametrize("fold", [{"name": "reconstruction", "ridge": None}])
def test_a_fold_that_had_too_few_tokens_is_told_of_in_print_and_in_the_card(
    fold, tiny, many, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(reconstruction, "TOKENS_PER_INPUT", 1e9)
    calibration = {"data": str(many), "samples": 8, "answer_tokens": 1}
    recipe = {"model": str(tiny("llava")), "calibration": calibration, "drop_layers": 1, "protect": [], "fold": fold}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"localizer": "angular"}))
    with without_verification():
        folder = compress(load_recipe(path), tmp_path / "small")
    record = json.loads((folder / "compression.json").read_text())
    assert record["recipe"]["fold"] == fold
    (told,) = [line.getMessage() for line in caplog.records if "too few to refit" in line.getMessage()]
    assert told == f"small: {record['fold']['fell_back']}; more calibration questions give more tokens"
    card = (folder / "README.md").read_text()
    assert f"The fold had few tokens to read: {record['fold']['fell_back']}." in card
    assert ("Nothing was folded into the remaining layers." in card) == (not record["fold"]["tensors"])


def test_answers_are_read_with_their_questions(tiny, many):
    _, _, questions = opened(tiny("llava"), many)
    batch = next(iter(questions.batches("read")))
    assert batch.is_answer is not None
    assert (batch.is_answer & ~batch.is_text).sum() == 0
    assert batch.is_answer.any(1).all()
    asked = dict(questions.answers)
    list(questions.batches("read again"))
    assert questions.answers.keys() == asked.keys()
    assert all(torch.equal(questions.answers[i], asked[i]) for i in asked)


def test_the_choice_is_repeatable(tiny, many):
    first, second = (localize(*opened(tiny("llava"), many)) for _ in range(2))
    assert first == second
    assert first.details["rounds"]


@pytest.mark.slow
def test_the_default_costs_at_most_four_passes_over_the_questions(tiny, many):
    """Counted in tokens through decoder layers, answering included."""
    lines = [json.loads(line) for line in many.read_text().splitlines()]
    data = many.parent / "more.jsonl"
    more = [line | {"question": f"{line['question']} {number}"} for number in range(8) for line in lines]
    data.write_text("".join(json.dumps(line) + "\n" for line in more))
    job, model, questions = opened(tiny("llava"), data, count=1)
    tokens: list[int] = []

    def count(layer, arguments):
        if getattr(layer.forward, "__name__", "") != "identity":  # switched off
            tokens.append(arguments[0].shape[:2].numel())

    for layer in text_decoder(model).layers:
        layer.register_forward_pre_hook(count)
    for batch in make_batches(questions.samples, questions.processor, model.config, 8):
        model.base_model(**batch.inputs, use_cache=False)
    one_pass = sum(tokens)
    tokens.clear()
    scores = localize(job, model, questions)
    fold_gaps(job, model, questions, make_plan(6, scores.drop))
    assert sum(tokens) <= 4 * one_pass
