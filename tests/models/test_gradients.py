"""The gradient of a step: what its parts add is that of all questions at once."""

from __future__ import annotations

import torch

from exporter.models.gradients import PART, parts_of, set_gradients


def test_parts_add_up_to_the_gradient_of_the_whole_step():
    noise = torch.Generator().manual_seed(0)
    x, y = torch.randn(2 * PART + 1, 5, generator=noise), torch.randn(2 * PART + 1, 3, generator=noise)
    layer, unused = torch.nn.Linear(5, 3), torch.nn.Parameter(torch.ones(2))
    learnt = [*layer.parameters(), unused]
    unused.grad = torch.ones(2)  # of a step before

    def loss_of(places: range) -> torch.Tensor:
        assert len(places) <= PART
        return (layer(x[places.start : places.stop]) - y[places.start : places.stop]).square().sum() / len(x)

    loss = set_gradients(learnt, len(x), loss_of)
    whole = (layer(x) - y).square().sum() / len(x)
    expected = torch.autograd.grad(whole, list(layer.parameters()))
    assert abs(loss - whole.item()) < 1e-5 and unused.grad is None
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_what_only_some_parts_depend_on_has_a_gradient():
    sometimes = torch.nn.Parameter(torch.ones(1))
    always = torch.nn.Parameter(torch.ones(1))
    set_gradients([sometimes, always], PART + 1, lambda places: (always + (sometimes if places.start else 0)).sum())
    assert sometimes.grad.tolist() == [1.0] and always.grad.tolist() == [2.0]
    assert [list(part) for part in parts_of(PART + 1)] == [list(range(PART)), [PART]] and not parts_of(0)
