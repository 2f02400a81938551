"""What a search expects before anything is made: costs are straight lines in the layers, and no effort is wasted."""

from __future__ import annotations

import math

import pytest

from exporter.errors import InputError
from exporter.outcome.answer_cost import AnswerCost, Question, by_size, line
from exporter.outcome.candidate import Candidate, Mix, mixes
from exporter.outcome.goal import EXTRAS, SearchGoal, SearchRecipe
from exporter.outcome.prediction import Predictor, Sizes, wanted_candidates
from exporter.outcome.result import MeasuredCandidate, choice, front, nearest_ones
from exporter.outcome.step_costs import StepCosts
from exporter.recipe import CalibrationData, TaskData, recipe_from_data

QUESTION = Question(visual=80, text=20, answer=4)
COST = AnswerCost(layers=10, vision=10.0, prefill=(5.0, 4.0), decode=(1.0, 1.0))  # 10 + 45 + 4 x 11 = 99
HEALED, INT8, HALF = Mix(healed=True), Mix(int8=True), Mix(tokens=0.5)


def predictor(free: int = 8) -> Predictor:
    sizes = Sizes(layers=10, parameters=1100, layer_parameters=100.0, itemsize=4, free=free)
    return Predictor(sizes, QUESTION, COST, COST, timed=True)


def wanted(**changes) -> SearchRecipe:
    return SearchRecipe("model", CalibrationData("q.jsonl"), TaskData("t.jsonl"), **changes)


def test_costs_are_lines_in_the_layers():
    at = {gone: COST.parts(Question(80, 20, 1), gone) for gone in (0, 3, 5)}
    fitted = AnswerCost.fitted(10, at)
    for gone in (0, 1, 7):
        assert fitted.total(QUESTION, gone) == pytest.approx(COST.total(QUESTION, gone))
    assert COST.total(QUESTION) == pytest.approx(99)
    scaled = by_size(10, 100.0, 50.0, 30.0, QUESTION).scaled(QUESTION, {"vision": 10, "prefill": 45, "decode": 11})
    assert scaled.total(QUESTION) == pytest.approx(99)
    assert scaled.total(QUESTION, 5) < 99


def test_lines_never_say_that_a_layer_gives_time_back():
    assert line([1, 2, 3], [3, 2, 1]) == (2, 0)
    intercept, slope = line([10, 5], [10, 1])
    assert intercept == 0
    assert slope == pytest.approx(105 / 125)


def test_a_router_saves_of_the_prompt_alone_and_from_its_layer_on():
    whole, half = COST.parts(QUESTION), COST.parts(QUESTION, tokens=0.5)
    assert whole["decode"] == half["decode"] and whole["vision"] == half["vision"]
    assert half["prefill"] == pytest.approx(5 + 4 * (2 + 8 * 0.6))  # 60 of 100 tokens stay, before layer 2 all do


def test_the_fewest_layers_that_reach_a_goal_of_each_mix_and_nothing_that_saves_none():
    goal = SearchGoal(speedup=1.5)
    found = wanted_candidates(predictor(), goal, mixes(EXTRAS))
    assert found[0] == Candidate(5)  # 99 / 1.5 = 66; five of ten layers: 10 + 25 + 4 x 6 = 59, four: 67
    assert Candidate(5, HEALED) in found
    assert Candidate(0, INT8) in found  # guessed to be 1.5 times as fast by itself,
    assert not [one for one in found if one.mix == Mix(healed=True, int8=True)]  # so that there is nothing to heal
    assert [one.drop for one in found if one.mix == HALF] == [4]  # 10 + 22.6 + 28
    fewer = wanted_candidates(predictor(), SearchGoal(params=700), mixes(EXTRAS))
    assert fewer == [Candidate(4), Candidate(4, HEALED)]  # neither tokens nor int8 change the number of parameters
    smaller = wanted_candidates(predictor(), SearchGoal(memory=2000), mixes(("int8",)))
    assert smaller == [Candidate(6), Candidate(0, INT8)]  # 4400 bytes, 400 a layer; 1400 as int8


def test_what_was_measured_corrects_what_is_expected():
    known, goal = predictor(), SearchGoal(speedup=1.5)
    known.learn(Candidate(0, INT8), {"speedup": 1.2, "parameters": 1100})
    assert known.expect(Candidate(0, INT8))["speedup"] == pytest.approx(1.2)
    (more,) = [one for one in wanted_candidates(known, goal, (Mix(), INT8)) if one.mix == INT8]
    assert known.expect(more)["speedup"] >= 1.5 > known.expect(Candidate(more.drop - 1, INT8))["speedup"]
    missed = wanted_candidates(predictor(), goal, (Mix(), HEALED), missed=[Candidate(5, HEALED)])
    assert missed == [Candidate(6), Candidate(6, HEALED)]  # healing changes no speed: neither is the other one's rival


def test_without_a_goal_and_for_one_out_of_reach_a_few_budgets_are_looked_at():
    found = wanted_candidates(predictor(), SearchGoal(), (Mix(), INT8))
    assert [one.drop for one in found if one.mix == Mix()] == [2, 3, 4]
    assert [one.drop for one in found if one.mix == INT8] == [0, 2, 3, 4]
    assert wanted_candidates(predictor(), SearchGoal(speedup=1000), (Mix(), INT8)) == found
    assert not wanted_candidates(predictor(free=1), SearchGoal(speedup=1.5), (Mix(),), missed=[Candidate(1)])[1:]


def test_folders_are_made_from_one_another():
    both = Candidate(3, Mix(healed=True, tokens=0.5))
    assert both.before == Candidate(3, HEALED) and both.before.before == Candidate(3)
    assert Candidate(3, Mix(tokens=0.25)).folder == Candidate(3, HALF).folder == "drop3-routed"
    assert Candidate(0, INT8).before == Candidate(0) and Candidate(0).is_original
    costs = StepCosts({"compress": 10.0, "heal": 100.0, "route": 50.0, "export": 20.0, "measure": 1.0})
    assert costs.seconds_of(both, ()) == 161
    assert costs.seconds_of(both, {"drop3"}) == 151
    assert costs.seconds_of_all([Candidate(3), both, Candidate(3, Mix(healed=True, tokens=0.25))]) == 163
    costs.add("heal", 30.0)
    assert costs.seconds_of(both, ()) == 91


@pytest.mark.parametrize("one", [Candidate(2), Candidate(2, HEALED), Candidate(0, HALF), Candidate(2, INT8)])
def test_a_candidate_is_a_recipe_that_compress_takes(one):
    asked = wanted(heal_samples=32, seed=3)
    recipe = one.recipe(asked)
    assert recipe_from_data(recipe.to_data()) == recipe
    assert (recipe.heal is not None, recipe.router is not None) == (one.mix.healed, one.mix.tokens is not None)
    if recipe.heal is not None:
        assert recipe.heal.calibration.samples == 32


def found_one(drop: int, speedup: float | None, right: list[int], original: list[int]) -> MeasuredCandidate:
    return MeasuredCandidate.of(
        Candidate(drop), {"correct": right, "figures": {"speedup": speedup}, "held_out": None}, original
    )


def test_losses_are_of_the_same_questions_and_the_front_is_not_beaten():
    original = [1] * 8 + [0] * 2
    one = found_one(1, 1.2, [1] * 7 + [0, 1, 0], original)  # one lost, one won
    two = found_one(2, 1.6, [1] * 6 + [0] * 4, original)  # two lost
    bad = found_one(3, 1.5, [1] * 5 + [0] * 5, original)
    unknown = found_one(4, None, [1] * 8 + [0] * 2, original)
    assert one.loss == 0 and two.loss == pytest.approx(20.0)
    assert one.loss_error == pytest.approx(100 * math.sqrt(3) / 12) and one.p_value == 1
    assert found_one(1, 1.2, original, original).loss_error == pytest.approx(100 / 12)  # ten alike do not prove it
    found = [one, two, bad, unknown]
    as_it_is = {"speedup": 1.0, "parameters": 5}
    assert front(found, SearchGoal(speedup=1.5), as_it_is, 0.8) == [two, one]
    assert front([one], SearchGoal(speedup=1.5), {"speedup": 1.3}, 0.8) == []  # the original is faster, and as good
    assert choice(found, SearchGoal(speedup=1.5), 20) is two
    assert choice(found, SearchGoal(speedup=1.5), 1) is None
    assert nearest_ones(found, SearchGoal(speedup=1.5), 1) == [one, two]
    assert choice(found, SearchGoal(), 20) is two and choice(found, SearchGoal(), 1) is one
    assert not SearchGoal(speedup=1.1).met(unknown.figures)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SearchGoal(speedup=2, params=5), "one goal, not 2"),
        (lambda: SearchGoal(speedup=0.9), "a number above 1 is needed"),
        (lambda: SearchGoal(flops=1.5), "a share below 1"),
        (lambda: SearchGoal(latency_ms=-1), "a number above 0"),
        (lambda: SearchGoal(params=2.5), "a whole number"),
        (lambda: SearchGoal(memory=True), "a number above 0"),
        (lambda: wanted(max_loss=-1), "from 0 to 100"),
        (lambda: wanted(without=("heel",)), "did you mean 'heal'"),
        (lambda: wanted(task_samples=0), "from 1 up"),
    ],
)
def test_goals_that_make_no_sense(make, expected):
    with pytest.raises(InputError, match=expected):
        make()
