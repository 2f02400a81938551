"""SCP: amplify, in the last layer before a gap, the subspace that the dropped layers wrote into.

Short-LVLM (ACM MM 2025, arXiv 2507.23362), figure (b): H = X^p - X^r = U S Vᵀ, W_new = (I + V_k V_kᵀ) W.
Shapes: D hidden size, I intermediate size, k directions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..plan import Folded
from .job import FoldJob, GapMoments, measure_gaps
from .outputs import Matrix, Tokens, change_outputs


def top_directions(gram: Tensor, k: int) -> Tensor:
    """Return the first k right singular vectors of H from its Gram matrix HᵀH [D, D]: [D, k], float64."""
    _, vectors = torch.linalg.eigh(gram.double())  # ascending
    last: Tensor = vectors[:, max(0, len(gram) - k) :]
    return last.clone()  # not all of them are kept


def scp(weight: Tensor, directions: Tensor) -> Tensor:
    """Return (I + V_k V_kᵀ) W for an output-side weight [D, I] or bias [D], in the weight's dtype."""
    return (weight.double() + directions @ (directions.T @ weight.double())).to(weight.dtype)


def fold_scp(
    job: FoldJob,
    *,
    k: int | float = 0.125,
    tokens: Tokens = "all",
    per: Literal["run", "layer"] = "run",
    weights: tuple[Matrix, ...] = ("down_proj",),
) -> Folded:
    """Apply Short-LVLM's subspace compensation to `down_proj`, as in the paper's figure.

    Args:
        k: directions, a number or a share of the hidden size.
        tokens: 'all', those of the 'prompt', or the 'important' ones.
        per: one difference per 'run' of dropped layers or one per dropped 'layer', applied one after the other.
        weights: 'down_proj', 'o_proj' or both.
    """
    job.refuse_post_norm("scp")

    def change(name: str, tensor: Any, gap: GapMoments) -> Any:
        for number, gram in enumerate(gap.differences):
            count = k if isinstance(k, int) else max(1, round(k * len(gram)))
            if (number, count) not in gap.directions:  # of one gap, for all matrices and folds: they are dear
                gap.directions[number, count] = top_directions(gram, count)
            tensor = scp(tensor, gap.directions[number, count])
        return tensor

    return change_outputs(job, measure_gaps(job, tokens=tokens, each=per == "layer"), change, weights)


def fold_scp_both(
    job: FoldJob, *, k: int | float = 0.125, tokens: Tokens = "all", per: Literal["run", "layer"] = "run"
) -> Folded:
    """Fold into `o_proj` as well: a variant of ours."""
    return fold_scp(job, k=k, tokens=tokens, per=per, weights=("down_proj", "o_proj"))
