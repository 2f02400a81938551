"""Output matrices with a norm behind them: x + norm(W a), as in Gemma 2, Gemma 3 and GLM-4.1V.

What such a matrix adds to the residual stream is g ⊙ W a / r, with the norm's gain g [D] and the root mean square r of
W a, a number a token. For the r that the weights have at the moment this is linear in W: a regression of the effective
matrix g ⊙ W on the inputs a / r. The new weights change r a little; solving again with the new r gains nothing (on a
trained Gemma 3 model a second and a third time were worse on held-out questions). The norm takes away what a token's
update has of length, so the gain is refitted as well, by a regression a channel.

Shapes: B samples, S tokens, D hidden size, P inputs of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_GAIN = 1e-2  # of the largest: rows of the matrix below it can't be told from what the norm hides, and stay


def gain_of(norm: Any, like: Tensor) -> Tensor:
    """Return what a norm multiplies its normalised input by, however it stores it ('weight' or '1 + weight'). [D]"""
    with torch.inference_mode():
        gain: Tensor = norm(torch.ones(like.shape[-1], dtype=like.dtype, device=like.device))
        return gain.double().cpu()


def root_mean_square(output: Tensor) -> Tensor:
    """Reduce [..., D] to [..., 1], the number that the norm divides by."""
    return output.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def effective(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Return the matrix that adds to the residual stream, given the inputs over r: g ⊙ W [D, P]."""
    return weight if gain is None else gain[:, None] * weight.double().cpu()


def below_the_norm(fitted: Tensor, old: Tensor, gain: Tensor | None) -> Tensor:
    """Return the matrix W [D, P] that a fitted effective matrix stands for."""
    if gain is None:
        return fitted
    seen = gain.abs() > SMALLEST_GAIN * gain.abs().max()
    return torch.where(seen[:, None], fitted / torch.where(seen, gain, 1.0)[:, None], old.double().cpu())


class GainMoments:
    """Sums for the gain's regression: per channel, z² and z times what is missing."""

    def __init__(self, width: int) -> None:
        self.squares = torch.zeros(width, dtype=torch.double)
        self.products = torch.zeros(width, dtype=torch.double)

    @staticmethod
    def of_batch(put: Tensor, missing: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens add: what the norm puts out [N, D], what is missing [N, D], weights [N, 1]."""
        squares = (put.float().square() * weights).sum(0).cpu()
        return squares, (put.float() * missing.float() * weights).sum(0).cpu()

    def add(self, squares: Tensor, products: Tensor) -> None:
        """Add what a batch adds."""
        self.squares += squares.double()
        self.products += products.double()

    def change(self, ridge: float) -> Tensor:
        """Return the factor c [D] of the gain that minimises ‖c z - (z + missing)‖², pulled towards 1."""
        return 1 + self.products / (self.squares + ridge * self.squares.mean()).clamp(min=1e-30)
