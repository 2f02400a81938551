"""Folds: what the formulas promise, on tensors; and on a model, that the fitted ones undo what they can."""

from __future__ import annotations

import pytest
import torch

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.compression.steps import reader
from exporter.data.batches import Batch, make_batches, spread
from exporter.data.calibration import load_calibration
from exporter.fold.job import FoldJob
from exporter.fold.least_squares import least_squares, linear_map
from exporter.fold.moments import RIDGE, Moments, MomentSums, bounds_of, ridge_for, solve
from exporter.fold.reconstruction import Fit, fold_reconstruction, token_weights
from exporter.fold.scp import scp, top_directions
from exporter.models.answers import answer_all
from exporter.models.loading import load_model, text_decoder
from exporter.models.variants import Variant, judge
from exporter.plan import make_plan


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_scp_doubles_the_subspace_and_leaves_the_rest(noise):
    directions = torch.linalg.qr(torch.randn(8, 2, dtype=torch.double, generator=noise))[0]  # [D, 2]
    difference = torch.randn(100, 2, dtype=torch.double, generator=noise) @ directions.T  # [N, D] of rank 2
    weight = torch.randn(8, 5, dtype=torch.double, generator=noise)
    new = scp(weight, top_directions(difference.T @ difference, 2))
    torch.testing.assert_close(directions.T @ new, 2 * directions.T @ weight)
    outside = torch.eye(8, dtype=torch.double) - directions @ directions.T
    torch.testing.assert_close(outside @ new, outside @ weight)


def test_top_directions_are_the_right_singular_vectors(noise):
    matrix = torch.randn(50, 6, dtype=torch.double, generator=noise)
    expected = torch.linalg.svd(matrix, full_matrices=False)[2][:3].T
    got = top_directions(matrix.T @ matrix, 3)
    torch.testing.assert_close(got @ got.T, expected @ expected.T)


def test_scp_without_directions_is_the_identity():
    weight = torch.randn(4, 3)
    assert torch.equal(scp(weight, top_directions(torch.eye(4), 0)), weight)


def test_linear_map_recovers_a_linear_gap(noise):
    truth = torch.randn(6, 6, dtype=torch.double, generator=noise)
    outputs = torch.randn(400, 6, dtype=torch.double, generator=noise)
    got = linear_map(outputs.T @ outputs, outputs.T @ (outputs @ truth), ridge=1e-9)
    torch.testing.assert_close(got, truth, atol=1e-6, rtol=1e-6)


def test_linear_map_stays_the_identity_without_evidence(noise):
    outputs = torch.randn(400, 6, dtype=torch.double, generator=noise)
    gram = outputs.T @ outputs
    torch.testing.assert_close(linear_map(gram, gram, ridge=0.1), torch.eye(6, dtype=torch.double))
    wild = linear_map(gram, gram @ torch.randn(6, 6, dtype=torch.double, generator=noise), ridge=1e9)
    torch.testing.assert_close(wild, torch.eye(6, dtype=torch.double), atol=1e-6, rtol=1e-6)


def test_least_squares_moves_the_map_into_the_weight(noise):
    weight = torch.randn(6, 9, generator=noise)
    transform = torch.randn(6, 6, dtype=torch.double, generator=noise)
    hidden = torch.randn(20, 9, generator=noise)
    expected = (hidden @ weight.T).double() @ transform
    torch.testing.assert_close((hidden @ least_squares(weight, transform).T).double(), expected, atol=1e-4, rtol=1e-4)


# --- reconstruction ---------------------------------------------------------------------------------------------------


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    sums = MomentSums(x.shape[1], y.shape[1], bounds_of(x, y))
    sums.add(x, y)
    return sums.total()


def test_refit_recovers_the_truth_and_stays_put_without_evidence(noise):
    truth, old = (torch.randn(4, 7, dtype=torch.double, generator=noise) for _ in range(2))
    inputs = torch.randn(300, 7, generator=noise)
    moments = moments_of(inputs, (inputs.double() @ truth.T).float())
    torch.testing.assert_close(moments.refit(old, 1e-9), truth, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moments.refit(old, 1e9), old, atol=1e-6, rtol=1e-6)
    assert moments.error(truth) == pytest.approx(0, abs=1e-6 * float(moments.yy.sum()))  # products are float32
    assert moments.error(old) == pytest.approx(float((inputs.double() @ (old - truth).T).square().sum()), rel=1e-4)


def test_the_ridge_that_is_chosen_is_the_one_that_generalises(noise):
    old = torch.zeros(2, 20, dtype=torch.double)
    # nothing to be learnt
    halves = [moments_of(torch.randn(24, 20, generator=noise), torch.randn(24, 2, generator=noise)) for _ in range(2)]
    assert solve(halves, old, "auto").norm() < 0.5 * solve(halves, old, 1e-4).norm()


def test_the_fewer_tokens_the_stronger_the_ridge(noise):
    assert ridge_for(1_000_000, inputs=256) == RIDGE
    assert ridge_for(512, inputs=512) == 2 * ridge_for(1024, inputs=512) > RIDGE
    assert ridge_for(0, inputs=8) == ridge_for(1, inputs=8)
    old = torch.zeros(2, 20, dtype=torch.double)
    for tokens in (40, 4000):
        moments = moments_of(torch.randn(tokens, 20, generator=noise), torch.randn(tokens, 2, generator=noise))
        assert torch.equal(solve([moments], old, None), solve([moments], old, ridge_for(tokens, inputs=20)))


def test_token_weights_share_out_what_is_asked():
    visual = torch.tensor([[True, True, True, False, False]])
    text = torch.tensor([[False, False, False, True, True]])
    answer = torch.tensor([[False, False, False, False, True]])
    batch = Batch({}, visual, text, (), answer)
    assert token_weights(batch, Fit(answer_weight=1.0)).tolist() == [[1, 1, 1, 1, 1]]
    weights = token_weights(batch, Fit(share_of_text=0.8, answer_weight=1.0))
    assert weights.sum() == pytest.approx(5)
    assert float(weights[text].sum()) == pytest.approx(4)
    weights = token_weights(batch, Fit(answer_weight=6.0))
    assert weights.sum() == pytest.approx(5)
    assert float(weights[answer]) == pytest.approx(3)
    assert token_weights(batch, Fit(tokens="prompt")).tolist() == [[1, 1, 1, 1, 0]]
    prompts = Batch({}, torch.zeros_like(visual), text, ())
    assert token_weights(prompts, Fit(share_of_text=0.8)).tolist() == [[0, 0, 0, 1, 1]]


def test_a_share_of_the_questions_is_spread_over_all_of_them():
    assert list(spread(range(8), 1.0)) == list(range(8))
    assert list(spread(range(8), 0.5)) == [0, 2, 4, 6]
    assert list(spread(range(3), 0.01)) == [0]


@pytest.fixture(scope="module")
def job(tiny, questions):
    def make(family: str, drop: tuple[int, ...], silence: tuple[int, ...] = ()) -> FoldJob:
        """A tiny model to be folded; silenced layers add nothing to the residual stream."""
        source = open_source(str(tiny(family)))
        model, _ = load_model(source, "cpu", torch.float32)
        for layer in silence:
            for name in (source.decoder.o_proj, source.decoder.down_proj):
                torch.nn.init.zeros_(text_decoder(model).layers[layer].get_submodule(name).weight)
        samples = load_calibration(str(questions), samples=None).samples * 4  # enough tokens for every regression
        processor = load_processor(source.folder)
        return FoldJob(
            model,
            lambda share=1.0: make_batches(list(spread(samples, share)), processor, source.config, 4),
            make_plan(source.num_layers, drop),
            reader(source),
            source.decoder,
        )

    return make


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v"])
def test_reconstruction_of_layers_that_did_nothing_changes_nothing(job, family):
    made = job(family, drop=(3, 5), silence=(3, 5))
    folded = fold_reconstruction(made)
    assert sorted({layer for layer, _ in folded}) == [2, 4]
    assert any("norm" in name for _, name in folded) == made.decoder.post_norm
    for (layer, name), tensor in folded.items():
        torch.testing.assert_close(tensor, made.read(layer, name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava", "gemma3", "glm4v"])
def test_reconstruction_brings_the_smaller_model_closer(job, family):
    made = job(family, drop=(2, 3))
    answered = answer_all(made.model, made.batches(), 4)
    variants = [Variant(made.plan), Variant(made.plan, fold_reconstruction(made, share=1.0))]
    plain, folded = judge(made.model, variants, answered)
    assert folded.kl < 0.7 * plain.kl


def test_a_gap_at_the_very_beginning_is_made_up_for_by_what_comes_after_it(job):
    made = job("llava", drop=(0,))
    folded = fold_reconstruction(made, share=1.0)
    assert {layer for layer, _ in folded} == {1, 2, 3, 4, 5}
    answered = answer_all(made.model, made.batches(), 4)
    plain, refitted = judge(made.model, [Variant(made.plan), Variant(made.plan, folded)], answered)
    assert refitted.kl < 0.7 * plain.kl
