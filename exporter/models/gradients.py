"""The gradient of a training step, by one process or by several, with the same bits.

A step's questions are taken in small parts, always the same ones. Each part has a gradient of its own, and these are
added in the order of the parts. So it does not matter who computes which, and a step keeps the activations of one
part only. What is exchanged is as large as what is learnt, which is little beside the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks

PART = 4  # questions that run through the model together: fewer take longer, more can't be shared by as many


def parts_of(number: int) -> list[range]:
    """Return the parts of a step of so many questions, as their places in it."""
    return [range(begin, min(begin + PART, number)) for begin in range(0, number, PART)]


def set_gradients(learnt: Sequence[Any], number: int, loss_of: Callable[[range], Tensor]) -> float:
    """Give parameters the gradient of a step, and return its loss. A parameter that nothing depends on has none.

    Args:
        learnt: parameters in float32.
        number: of the step's questions.
        loss_of: returns what the questions at some places among them add to the step's loss, [].
    """
    parts = parts_of(number)

    def gradients(part: range) -> list[Tensor]:
        loss = loss_of(part)
        by_parameter = torch.autograd.grad(loss, learnt, allow_unused=True)
        told = torch.tensor([loss.item(), *(gradient is not None for gradient in by_parameter)])
        there = (torch.zeros_like(p) if g is None else g for p, g in zip(learnt, by_parameter, strict=True))
        return [told, *(gradient.detach().contiguous() for gradient in there)]

    shapes = [(1 + len(learnt),), *(parameter.shape for parameter in learnt)]
    sums: list[Tensor] = []
    for tensors in ranks.tensors_in_order(map(gradients, ranks.share(parts)), len(parts), shapes):
        if not sums:
            sums = list(tensors)
            continue
        for place, tensor in enumerate(tensors):
            sums[place] = sums[place] + tensor
    told, *totals = sums
    loss, *used = told.tolist()
    for parameter, total, uses in zip(learnt, totals, used, strict=True):
        parameter.grad = total.to(parameter.device) if uses else None
    return float(loss)


def check_alike(learnt: Mapping[str, Tensor]) -> None:
    """Raise InputError where processes of one run have learnt different things: their machines compute differently."""
    if ranks.world() > 1:
        digest = hashlib.sha256()
        for tensor in learnt.values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        ranks.same({"what they have learnt": digest.hexdigest()})
