"""Localizers: the mathematics on numbers small enough to see, and the choice that follows."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence

import pytest
import torch

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.errors import InputError
from exporter.localize import LocalizeJob, explicit, run_localizer
from exporter.localize.angular import angular
from exporter.localize.best_of import Effort, best_of
from exporter.localize.block_influence import block_influence
from exporter.localize.fisher import _gated_log_p, cheapest_set, fisher, information, set_cost
from exporter.localize.greedy import greedy, search_size
from exporter.localize.scores import most_redundant
from exporter.localize.spacing import spaced
from exporter.localize.tis import important, tis
from exporter.models.answers import StateError, answered
from exporter.models.capture import BatchStatistics
from exporter.models.divergence import Divergence
from exporter.models.loading import load_model
from exporter.models.questions import SUFFIX
from exporter.recipe import Method


def test_important_is_the_smallest_set_with_the_mass():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert important(scores, everything, 0.39).tolist() == [[False, True, False, False]]
    assert important(scores, everything, 0.5).tolist() == [[False, True, False, True]]
    assert important(scores, everything, 1.0).all()


def test_important_looks_at_candidates_only_and_at_one_at_least():
    scores = torch.tensor([[9.0, 0.4, 0.2]])
    candidates = torch.tensor([[False, True, True]])
    assert important(scores, candidates, 0.1).tolist() == [[False, True, False]]
    assert not important(scores, torch.zeros_like(candidates), 0.5).any()


def statistics(cosine: list[list[float]], visual: list[list[float]], text: list[list[float]]) -> BatchStatistics:
    """One sample; per layer a cosine, a visual and a text score for each of its tokens (0: not of that kind)."""
    cosines, seen, written = (torch.tensor(rows)[:, None] for rows in (cosine, visual, text))
    return BatchStatistics(
        cosine=cosines,
        visual_scores=seen,
        text_scores={"rows": written, "columns": written},
        last_states=torch.zeros(len(cosine) + 1, 1, 2),
        is_visual=seen[0] > 0,
        is_text=written[0] > 0,
    )


def test_tis_averages_over_important_tokens_of_both_kinds():
    batch = statistics(
        cosine=[[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.4, 0.6]],
        visual=[[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]],
        text=[[0.0, 0.0, 0.8, 0.2], [0.0, 0.0, 0.8, 0.2]],
    )
    own = tis([batch], 1, p=0.5)
    assert own.values == pytest.approx(((0.9 + 0.5) / 2, (0.8 + 0.4) / 2))
    assert own.drop == (0,)
    shared = tis([batch], 1, p=0.5, tokens="all_layers")  # mean scores tie: the first visual token is taken
    assert shared.values == pytest.approx(((0.9 + 0.5) / 2, (0.2 + 0.4) / 2))
    assert tis([batch], 1, p=1.0).values == pytest.approx((0.45, 0.5))


def test_block_influence_counts_every_token_but_padding():
    batch = statistics([[0.9, 0.1, 0.5, 99.0]], [[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]])
    assert block_influence([batch], 0).values == pytest.approx((0.5,))


def test_angular_finds_the_block_that_turns_least():
    angles = [0.0, 1.0, 1.1, 1.1, 2.0, 2.9]  # of the last token's state, before layer 0 and after each of five
    states = torch.tensor([[[math.cos(a), math.sin(a)]] for a in angles])
    one = torch.zeros(5, 1, 1)
    batch = BatchStatistics(one, None, None, states, one[0].bool(), one[0].bool())
    scores = angular([batch], 2)
    assert scores.drop == (1, 2)
    assert scores.values[1] == pytest.approx(1 - 0.1 / math.pi, abs=1e-6)
    assert angular([batch], 2, protect=(1,)).drop == (2, 3)
    with pytest.raises(InputError, match="no block of 3 consecutive layers of 5"):
        angular([batch], 3, protect=(2,))


class FakeLoss:
    """Removing layers 0 and 1 together is ruinous, though each alone is the cheapest."""

    num_layers = 4

    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]:
        return [sum((0.1, 0.2, 0.5, 0.9)[layer] for layer in s) + 5.0 * ({0, 1} <= s) for s in sets]


def test_greedy_looks_again_after_each_removal():
    scores = greedy(FakeLoss(), 2)
    assert scores.drop == (0, 2)
    assert scores.values == pytest.approx((-0.1, -0.2, -0.5, -0.9))
    assert scores.details["losses"] == pytest.approx([0.1, 0.6])
    assert greedy(FakeLoss(), 2, protect=(0, 2)).drop == (1, 3)


def test_greedy_of_a_width_looks_at_the_cheapest_again():
    assert greedy(FakeLoss(), 2, width=2).drop == (0, 2)
    assert greedy(FakeLoss(), 2, width=1).drop == (0, 1), "it looks at layer 1 alone"
    assert greedy(FakeLoss(), 3, width=2).drop == greedy(FakeLoss(), 3).drop == (0, 2, 3)


def test_greedy_takes_several_layers_in_a_step_where_many_go():
    walks = []

    class Counted(FakeLoss):
        def of_sets(self, sets):
            walks.append(len(sets))
            return super().of_sets(sets)

    scores = greedy(Counted(), 3, width=3, steps=2)
    assert scores.drop == (0, 2, 3), "the pairs of 0, 1 and 2 are looked at, then what is left"
    assert scores.details["losses"] == pytest.approx([0.6, 1.5])
    assert search_size(4, 3, width=3, steps=2) == (4 + 6 + 3, len(walks))  # pairs of four that are looked at
    assert greedy(FakeLoss(), 2, width=3, steps=2) == greedy(FakeLoss(), 2, width=3)
    assert search_size(12, 4, width=6, steps=4) == (12 + 3 * 6, 4)


def test_most_redundant_prefers_the_deeper_of_equals_and_spares_the_protected():
    assert most_redundant([0.5, 0.9, 0.9, 0.1], 2, ()) == (2, 1)
    assert most_redundant([0.5, 0.9, 0.9, 0.1], 2, (2,)) == (1, 0)


def test_controls_are_seeded_and_spare_the_protected():
    def drop(name: str, seed: int = 0) -> tuple[int, ...]:
        return run_localizer(Method(name), LocalizeJob(None, 12, None, seed), 4, (0,)).drop

    assert drop("first") == (1, 2, 3, 4)
    assert drop("last") == (11, 10, 9, 8)
    assert drop("random") == drop("random") != drop("random", seed=1)
    assert 0 not in drop("random")
    assert explicit(4, (3, 1)).drop == (1, 3)


def test_best_of_takes_the_proposal_that_costs_least():
    batch = statistics(
        cosine=[[0.9, 0.1, 0.1, 0.9], [0.5, 0.5, 0.5, 0.5], [0.2, 0.9, 0.9, 0.2]],
        visual=[[0.9, 0.1, 0.0, 0.0]] * 3,
        text=[[0.0, 0.0, 0.1, 0.9]] * 3,
    )
    assert tis([batch], 1).drop == (0,)  # by the first and the last token
    assert block_influence([batch], 1).drop == (2,)  # by all of them
    asked = []

    class Loss:
        num_layers = 3

        def of_sets(self, sets):
            asked.extend(sets)
            return [{0: 2.0, 1: 3.0, 2: 1.0}[min(layers)] for layers in sets]

    best = best_of([batch], 1, (), Loss(), exchanges=0)
    assert best.drop == (2,)
    assert best.values == block_influence([batch], 1).values
    assert best.details["chosen"] in ("block_influence", "angular")
    assert len(asked) == len(set(asked)), "each set of layers is judged once"


def test_best_of_does_without_a_block_where_none_fits():
    batch = statistics([[0.9, 0.9], [0.5, 0.5], [0.7, 0.7]], [[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3)

    class Loss:
        num_layers = 3

        def of_sets(self, sets):
            return [0.0] * len(sets)

    best = best_of([batch], 2, (1,), Loss())
    assert best.drop == (0, 2)
    assert set(best.details["proposals"]) == {"tis", "block_influence", "spacing"}


def test_best_of_searches_for_layers_that_no_ranking_names():
    cosines = [0.9, 0.8, 0.7, 0.1, 0.6]
    batch = statistics([[c, c] for c in cosines], [[1.0, 0.0]] * 5, [[0.0, 1.0]] * 5)

    class Loss:
        num_layers = 5

        def of_sets(self, sets):
            return [sum((0.3, 0.4, 0.5, 0.1, 0.2)[layer] for layer in s) for s in sets]

    best = best_of([batch], 1, (), Loss(), exchanges=0, search=True)
    assert best.drop == (3,)
    assert best_of([batch], 1, (), Loss(), exchanges=0).drop == (4,), "what angular names"
    assert best.details["proposals"]["greedy"] == {"drop": [3], "loss": 0.1}
    assert best_of([batch], 1, (3,), Loss(), exchanges=0, search=True).drop == (4,)


def test_fewer_questions_judge_where_there_are_more_sets():
    few, many = (Effort.of(512, layers, layers // 4, search=True) for layers in (12, 32))
    assert (few.judges, many.judges) == (14, 6)
    assert few.judges / 512 * few.sets * SUFFIX <= 0.5
    assert Effort.of(2048, 12, 1, search=False).judges == 64, "a part of all at most"
    assert Effort.of(256, 12, 3).search and not Effort.of(256, 32, 8).search, "six questions can't be afforded there"
    assert (Effort.of(512, 12, 3).exchanges, Effort.of(256, 32, 8).exchanges) == (1, 2)


def test_best_of_exchanges_a_layer_that_others_make_up_for():
    cosines = [0.9, 0.8, 0.7, 0.6, 0.1]
    batch = statistics([[c, c] for c in cosines], [[1.0, 0.0]] * 5, [[0.0, 1.0]] * 5)
    judged: list[frozenset[int]] = []
    rounds: list[int] = []

    class Loss:
        num_layers = 5

        def of_sets(self, sets):
            judged.extend(sets)
            rounds.append(len(sets))
            return [0.1 * sum(s) + 5.0 * ({0, 1} <= s) + (len(s) > 1 and 0 in s) + 9.0 * (4 in s) for s in sets]

    best = best_of([batch], 2, (), Loss(), exchanges=0)
    assert best.drop == (2, 3), "what spacing proposes"
    searched = best_of([batch], 2, (), Loss(), exchanges=0, search=True)
    assert searched.drop == (2, 3)
    assert searched.details["proposals"]["greedy"]["drop"] == [0, 2], "it can not know what comes of 0"
    judged.clear()
    best_of([batch], 2, (), Loss(), search=True)
    assert len(judged) == len(set(judged)), "each set of layers is judged once"
    best = best_of([batch], 2, (), Loss())
    assert best.drop == (1, 2), "the cheapest pair of the four that are named"
    assert best.details["exchanges"] == [{"back": 3, "instead": 1, "loss": pytest.approx(0.3)}]
    assert 1 not in best_of([batch], 2, (1,), Loss()).drop, "what is protected is not drawn in"
    apart = len(rounds)
    best_of([batch], 2, (), Loss())
    one_by_one = len(rounds) - apart
    assert best_of([batch], 2, (), Loss(), ahead=True) == best
    assert len(rounds) - apart - one_by_one < one_by_one, "where layers lie on disk, a round is a pass over them"


class FoldedSums:
    """Held-out questions about ten pictures, on which a fold makes up for all but what `cost` says."""

    def __init__(self, cost):
        self.cost, self.asked = cost, []

    def of_folded(self, sets, judged_by, then=None):
        self.asked.append((len(sets), judged_by))
        return [
            Divergence(tuple(self.cost(layers) + 0.01 * i for i in range(10)), (1,) * 10, tuple(range(10)))
            for layers in sets
        ]


def test_best_of_takes_the_set_that_folds_best_of_the_cheapest():
    cosines = [0.9, 0.8, 0.7, 0.6, 0.1]
    batch = statistics([[c, c] for c in cosines], [[1.0, 0.0]] * 5, [[0.0, 1.0]] * 5)

    class Loss:
        num_layers = 5

        def of_sets(self, sets):
            return [0.1 * sum(s) for s in sets]

    folded = FoldedSums(lambda layers: 0.0 if layers == {0, 2} else 1.0)
    best = best_of([batch], 2, (), Loss(), folded=folded)
    assert set(best.drop) == {0, 2}
    assert [number for number, _ in folded.asked] == [4, 2], "growing numbers of questions, fewer sets"
    assert best.details["rounds"][-1]["chosen"] == [0, 2]
    level = best_of([batch], 2, (), Loss(), folded=FoldedSums(lambda layers: 0.5))
    assert set(level.drop) == {0, 1}, "what held-out questions can't tell apart goes by the error without a fold"


@pytest.mark.parametrize("protect", [(), (3, 9)])
@pytest.mark.parametrize("count", [1, 3, 4, 6, 9])
def test_spaced_layers_lie_apart_and_spare_the_protected(count, protect):
    layers = spaced(12, count, protect)
    assert len(set(layers)) == count
    assert not set(layers) & set(protect)
    if count <= 4 and not protect:
        assert min(layers) >= 3
        assert min(b - a for a, b in itertools.pairwise(layers)) >= 2 if count > 1 else True


def test_the_error_of_the_last_states_is_none_where_nothing_goes(tiny, questions):
    source = open_source(str(tiny("llava")))
    model, _ = load_model(source, "cpu", torch.float32)
    samples = load_calibration(str(questions), samples=4).samples
    loss = StateError.of(model, [make_batch(samples, load_processor(source.folder), model.config)])
    nothing, one, two = loss.of_sets([frozenset(), frozenset({4}), frozenset({1, 4})])
    assert nothing == 0
    assert 0 < one < two


def test_fisher_counts_interactions():
    moved = torch.diag(torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.double))
    assert fisher(moved, 2).drop == (0, 1)
    moved[0, 1] = moved[1, 0] = 4.0  # ruinous together
    scores = fisher(moved, 2)
    assert scores.drop == (0, 2)
    assert scores.values == pytest.approx((-0.05, -0.1, -0.25, -0.45))
    assert scores.details["predicted"] == pytest.approx(0.3)
    assert fisher(moved, 2, protect=(0,)).drop == (1, 2)


def test_fisher_exchanges_layers_where_it_can_not_try_all_sets(monkeypatch):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 9, generator=random, dtype=torch.double)
    moved = rows.T @ rows
    best = set_cost(moved, cheapest_set(moved, range(9), 4))
    monkeypatch.setattr(sys.modules["exporter.localize.fisher"], "EXHAUSTIVE", 0)  # a function hides the module
    found = cheapest_set(moved, range(9), 4)
    cost = set_cost(moved, found)
    others = [set(found) - {old} | {new} for old in found for new in set(range(9)) - set(found)]
    assert best <= cost <= min(set_cost(moved, sorted(other)) for other in others)
    assert len(set(found)) == 4


def test_fisher_information_predicts_the_divergence_of_small_changes(tiny, questions):
    source = open_source(str(tiny("llava")))
    model, _ = load_model(source, "cpu", torch.float32)
    samples = load_calibration(str(questions), samples=4).samples
    one = answered(model, make_batch(samples, load_processor(source.folder), model.config), 6)
    moved = information(model, [one], draws=200)
    step = 0.05
    gates = torch.ones(4, len(moved))
    log_p = _gated_log_p(model, one, gates)
    gates[:, [1, 3]] -= step
    log_q = _gated_log_p(model, one, gates)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert step**2 * set_cost(moved, (1, 3)) == pytest.approx(kl, rel=0.25)
