"""SCP: amplify, in the last layer before a gap, the subspace that the dropped layers wrote into.

Short-LVLM (ACM MM 2025, arXiv 2507.23362), figure (b): H = X^p - X^r = U S Vᵀ, W_new = (I + V_k V_kᵀ) W.
Shapes: D hidden size, I intermediate size, k directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_directions(gram: Tensor, k: int) -> Tensor:
    """The first k right singular vectors of H from its Gram matrix HᵀH [D, D]: [D, k], float64."""
    _, vectors = torch.linalg.eigh(gram.double())  # ascending
    return vectors[:, max(0, len(gram) - k) :]


def scp(weight: Tensor, gram: Tensor, k: int) -> Tensor:
    """(I + V_k V_kᵀ) W for an output-side weight [D, I] or bias [D], in the weight's dtype."""
    directions = top_directions(gram, k)
    return (weight.double() + directions @ (directions.T @ weight.double())).to(weight.dtype)
