"""Second moments of what flows through a decoder, streamed: the sums that folds are solved from. No hooks' logic here.

What each batch adds is a product in float32. It is added exactly, so that the sums are the same bits in whichever order
and by however many processes the batches are taken.

Shapes: N tokens, P predictors, D targets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks

logger = logging.getLogger(__name__)
RIDGE = 0.03  # where tokens are plenty
SHRINKAGE = 2.0  # ridge times tokens for each input, where these are few
RIDGES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # that cross-validation chooses from
HEADROOM = 20  # powers of two by which a sum may outgrow the bound on what the first batch adds
BLOCK = 1 << 18  # numbers that are rounded at a time, so that they stay in the processor's cache


class ExactSum:
    """A sum of float32 tensors in two parts: multiples of a coarse step, and of a fine one for the rest.

    Multiples of one step add up without rounding in float64, as long as they stay below 2⁵³ of it. So the order does
    not count, and neither do the processes (J. Demmel and H. D. Nguyen, Fast Reproducible Floating-Point Summation,
    2013). The fine step is 2⁻⁶⁵ of the bound, and sums may grow to 2²¹ times the bound.

    Args:
        largest: a bound on what the first batch adds, the same in all processes.
    """

    def __init__(self, *shape: int, largest: float) -> None:
        exponent = math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 0
        self.parts = [torch.zeros(*shape, dtype=torch.double) for _ in range(2)]
        # A number x is rounded to multiples of 2**(n - 52) by x + 1.5 * 2**n - 1.5 * 2**n.
        coarse = exponent + HEADROOM
        self._largest_exact = math.ldexp(1.0, coarse + 1)
        self._rounding = [math.ldexp(1.5, coarse), math.ldexp(1.5, coarse - 53 + HEADROOM)]

    def add(self, product: Tensor) -> None:
        """Add a tensor, on the CPU."""
        product = product.cpu()
        step = max(1, BLOCK // max(1, product[:1].numel()))
        for begin in range(0, len(product), step):
            rest = product[begin : begin + step].double()
            for part, rounding in zip(self.parts, self._rounding, strict=True):
                rounded = (rest + rounding).sub_(rounding)
                part[begin : begin + step] += rounded
                rest -= rounded

    def told(self) -> list[Any]:
        """Return all of the sum so far, for a pass that goes on from here later."""
        return [self.parts, self._largest_exact, self._rounding]

    def take_up(self, told: Sequence[Any]) -> None:
        """Go on from what another was told of."""
        self.parts, self._largest_exact, self._rounding = told

    def total(self) -> Tensor:
        """Return the sum over all processes, which the first one alone has; nothing is to be added any more."""
        coarse, fine = map(ranks.summed, self.parts)
        self.parts = []
        if float(coarse.abs().max()) > self._largest_exact:
            logger.warning("sums grew beyond what adds up exactly: their last bits depend on the number of processes")
        return coarse.add_(fine)


def agreed(bounds: Sequence[float]) -> tuple[float, ...]:
    """Return the bounds of the first batch, which the first process has; the others may have none."""
    return ranks.from_first(lambda: tuple(bounds))


def bounds_of(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest of the predictors' and of the targets' squared lengths, x [N, P] and y [N, D]."""
    first, second = (float(rows.float().square().sum(0).max()) if rows.numel() else 0.0 for rows in (x, y))
    return first, second


class MomentSums:
    """Adds up what batches say of xᵀx, xᵀy and yᵀy.

    Args:
        bounds: `bounds_of` the first batch.
    """

    def __init__(self, predictors: int, targets: int, bounds: Sequence[float]) -> None:
        of_x, of_y = bounds
        self.xx = ExactSum(predictors, predictors, largest=of_x)
        self.xy = ExactSum(predictors, targets, largest=math.sqrt(of_x * of_y))
        self.yy = ExactSum(targets, largest=of_y)
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x [N, P], y [N, D]. Products in float32 on the data's device, sums on the CPU."""
        x, y = x.float(), y.float()
        self.xx.add(x.T @ x)
        self.xy.add(x.T @ y)
        self.yy.add(y.square().sum(0))
        self.count += len(x)

    def told(self) -> list[Any]:
        """Return all of the sums so far, for a pass that goes on from here later."""
        return [*(some.told() for some in (self.xx, self.xy, self.yy)), self.count]

    def take_up(self, told: Sequence[Any]) -> None:
        """Go on from what another was told of."""
        *sums, self.count = told
        for some, of_another in zip((self.xx, self.xy, self.yy), sums, strict=True):
            some.take_up(of_another)

    def total(self) -> Moments:
        """Return the moments over all processes, which the first one alone has."""
        return Moments(self.xx.total(), self.xy.total(), self.yy.total(), ranks.total(self.count))


@dataclass
class Moments:
    """Sums over tokens of xᵀx, xᵀy and yᵀy, in float64."""

    xx: Tensor  # [P, P]
    xy: Tensor  # [P, D]
    yy: Tensor  # [D]  squared length per target
    count: int = 0

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.count + other.count)

    def refit(self, weight: Tensor, ridge: float, device: Any = "cpu") -> Tensor:
        """Return the matrix W [D, P] that minimises ‖X Wᵀ - Y‖² + α ‖W - weight‖², in float64, on the CPU.

        Args:
            ridge: α as a share of the predictors' mean square, so that it means the same for every model.
            device: to solve on; the CPU where its memory does not suffice.
        """
        try:
            xx, xy, old = (tensor.to(device, torch.double) for tensor in (self.xx, self.xy, weight.T))
            alpha = ridge * xx.diagonal().mean()
            factor = torch.linalg.cholesky(xx + alpha * torch.eye(len(xx), dtype=xx.dtype, device=xx.device))
            return torch.cholesky_solve(xy + alpha * old, factor).T.cpu()
        except torch.OutOfMemoryError:
            return self.refit(weight, ridge)

    def error(self, weight: Tensor) -> float:
        """Compute ‖X Wᵀ - Y‖² for W [D, P]."""
        weight = weight.double().cpu()
        return float(self.yy.sum() - 2 * (self.xy * weight.T).sum() + ((weight @ self.xx) * weight).sum())


def solve(halves: Sequence[Moments], weight: Tensor, ridge: float | str | None, device: Any = "cpu") -> Tensor:
    """Refit on all of the data; ridge 'auto' is the one that serves each half best when fitted on the other.

    None: one that grows as tokens get few, `ridge_for`.
    """

    def loss(ridge: float) -> float:
        return sum(a.error(b.refit(weight, ridge, device)) for a, b in (halves, halves[::-1]))

    whole = halves[0] if len(halves) == 1 else halves[0] + halves[1]
    if ridge == "auto":
        two = len(halves) == 2 and all(half.count for half in halves)
        ridge = min(RIDGES, key=loss) if two else RIDGES[-1]
    if ridge is None:
        ridge = ridge_for(whole.count, len(whole.xx))
    return whole.refit(weight, float(ridge), device)


def ridge_for(tokens: int, inputs: int) -> float:
    """Return the pull towards the old weights for a regression of so many inputs from so many tokens.

    The noise of a regression's solution grows with inputs over tokens, and so does the ridge that is best for it
    (A. E. Hoerl, R. W. Kennard and K. F. Baldwin, 1975). What the constants rest on is in examples/results.md.
    """
    return max(RIDGE, SHRINKAGE * inputs / max(1, tokens))
