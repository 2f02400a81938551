"""Folds: what the formulas promise, on tensors; and on a model, that the fitted ones undo what they can."""

from __future__ import annotations

import pytest
import torch

from exporter.fold.least_squares import least_squares, linear_map
from exporter.fold.scp import scp, top_directions


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_scp_doubles_the_subspace_and_leaves_the_rest(noise):
    directions = torch.linalg.qr(torch.randn(8, 2, dtype=torch.double, generator=noise))[0]  # [D, 2]
    difference = torch.randn(100, 2, dtype=torch.double, generator=noise) @ directions.T  # [N, D] of rank 2
    weight = torch.randn(8, 5, dtype=torch.double, generator=noise)
    new = scp(weight, difference.T @ difference, k=2)
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
    assert torch.equal(scp(weight, torch.eye(4), k=0), weight)


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
