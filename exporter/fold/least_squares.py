"""Least squares: the linear map of the MLP's output that best replaces the dropped layers.

ReplaceMe (arXiv 2505.02819), equations 4 and 5, with a ridge: T = (MᵀM + αI)⁻¹ Mᵀ(X^p - X^r + M), W ← Tᵀ W.
Shapes: D hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import Folded
from .job import FoldJob, GapMoments, measure_gaps
from .outputs import Tokens, change_outputs


def linear_map(mm: Tensor, my: Tensor, ridge: float) -> Tensor:
    """Solve for T [D, D] from MᵀM and MᵀY, where Y is the output that the MLP should have had.

    `ridge` is α as a share of the mean squared output, so that it means the same for every model; T is pulled towards
    the identity rather than towards zero, so that without evidence the layer stays what it is.
    """
    mm, my = mm.double(), my.double()
    alpha = ridge * mm.diagonal().mean()
    eye = torch.eye(len(mm), dtype=torch.double, device=mm.device)
    solution: Tensor = torch.linalg.solve(mm + alpha * eye, my + alpha * eye)
    return solution


def least_squares(weight: Tensor, transform: Tensor) -> Tensor:
    """Return Tᵀ W for an output-side weight [D, I] or bias [D], in the weight's dtype."""
    return (transform.T @ weight.double()).to(weight.dtype)


def fold_least_squares(job: FoldJob, *, ridge: float = 1e-2, tokens: Tokens = "all") -> Folded:
    """Fit ReplaceMe's linear map of the MLP's output by ridge regression towards the identity."""
    job.refuse_post_norm("least_squares")

    def change(name: str, tensor: Any, gap: GapMoments) -> Any:
        return least_squares(tensor, linear_map(gap.mlp.xx, gap.mlp.xy, ridge))

    return change_outputs(job, measure_gaps(job, tokens=tokens), change, ("down_proj",))
