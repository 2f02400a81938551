"""Second moments of what flows through a decoder, streamed: the sums that folds are solved from. No hooks' logic here.

Shapes: N tokens, P predictors, D targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens of xᵀx, xᵀy, yᵀy, x and y, added up in float64."""

    xx: Tensor  # [P, P]
    xy: Tensor  # [P, D]
    yy: Tensor  # [D]  squared length per target, for the share of variance explained
    x: Tensor  # [P]
    y: Tensor  # [D]
    count: int = 0

    @classmethod
    def empty(cls, predictors: int, targets: int) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.double)

        return cls(
            zeros(predictors, predictors), zeros(predictors, targets), zeros(targets), zeros(predictors), zeros(targets)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x [N, P], y [N, D]. Products in float32 on the data's device, sums in float64 on the CPU."""
        x, y = x.float(), y.float()
        self.xx += (x.T @ x).cpu().double()
        self.xy += (x.T @ y).cpu().double()
        self.yy += y.square().sum(0).cpu().double()
        self.x += x.sum(0).cpu().double()
        self.y += y.sum(0).cpu().double()
        self.count += len(x)
