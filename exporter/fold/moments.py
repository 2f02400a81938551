"""Second moments of what flows through a decoder, streamed: the sums that folds are solved from. No hooks' logic here.

Shapes: N tokens, P predictors, D targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
