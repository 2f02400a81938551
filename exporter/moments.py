"""Second moments of what flows through a decoder, streamed: the sums that folds are solved from. No hooks' logic here.

Shapes: N tokens, P predictors, D targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens of xᵀx, xᵀy and yᵀy, added up in float64."""

    xx: Tensor  # [P, P]
    xy: Tensor  # [P, D]
    yy: Tensor  # [D]  squared length per target
    count: int = 0

    @classmethod
    def empty(cls, predictors: int, targets: int) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.double)

        return cls(zeros(predictors, predictors), zeros(predictors, targets), zeros(targets))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x [N, P], y [N, D]. Products in float32 on the data's device, sums in float64 on the CPU."""
        x, y = x.float(), y.float()
        self.xx += (x.T @ x).cpu().double()
        self.xy += (x.T @ y).cpu().double()
        self.yy += y.square().sum(0).cpu().double()
        self.count += len(x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.count + other.count)

    def refit(self, weight: Tensor, ridge: float) -> Tensor:
        """The matrix W [D, P] that minimises ‖X Wᵀ - Y‖² + α ‖W - weight‖², in float64.

        Args:
            ridge: α as a share of the predictors' mean square, so that it means the same for every model.
        """
        alpha = ridge * self.xx.diagonal().mean()
        eye = torch.eye(len(self.xx), dtype=torch.double)
        return torch.linalg.solve(self.xx + alpha * eye, self.xy + alpha * weight.double().cpu().T).T

    def error(self, weight: Tensor) -> float:
        """‖X Wᵀ - Y‖² for W [D, P]."""
        weight = weight.double().cpu()
        return float(self.yy.sum() - 2 * (self.xy * weight.T).sum() + ((weight @ self.xx) * weight).sum())
