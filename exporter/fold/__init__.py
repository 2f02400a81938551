"""Folds: putting what the dropped layers did into the weights that stay. One file a method; this is the table of them.

A fold takes a FoldJob and its own options and returns new tensors by (old layer index, name inside the layer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ..plan import Folded
from .auto import CANDIDATES, choose
from .job import FoldJob, GapMoments, measure_gaps
from .least_squares import least_squares, linear_map
from .reconstruction import Fit, reconstruct, refitted_share
from .scp import scp

Tokens = Literal["all", "prompt", "important"]
Matrix = Literal["o_proj", "down_proj"]


def fold_none(job: FoldJob) -> Folded:
    return {}


def fold_scp(
    job: FoldJob,
    *,
    k: int | float = 0.125,
    tokens: Tokens = "all",
    per: Literal["run", "layer"] = "run",
    weights: tuple[Matrix, ...] = ("down_proj",),
) -> Folded:
    """Short-LVLM's subspace compensation, into `down_proj` as in the paper's figure.

    Args:
        k: directions, a number or a share of the hidden size.
        tokens: 'all', those of the 'prompt', or the 'important' ones.
        per: one difference per 'run' of dropped layers or one per dropped 'layer', applied one after the other.
        weights: 'down_proj', 'o_proj' or both.
    """
    job.refuse_post_norm("scp")

    def change(name: str, tensor: Any, gap: GapMoments) -> Any:
        for gram in gap.differences:
            tensor = scp(tensor, gram, k if isinstance(k, int) else max(1, round(k * len(gram))))
        return tensor

    return _apply(job, measure_gaps(job, tokens=tokens, each=per == "layer"), change, weights)


def fold_scp_both(
    job: FoldJob, *, k: int | float = 0.125, tokens: Tokens = "all", per: Literal["run", "layer"] = "run"
) -> Folded:
    """The same into `o_proj` as well: a variant of ours."""
    return fold_scp(job, k=k, tokens=tokens, per=per, weights=("down_proj", "o_proj"))


def fold_least_squares(job: FoldJob, *, ridge: float = 1e-2, tokens: Tokens = "all") -> Folded:
    """ReplaceMe's linear map of the MLP's output, solved by ridge regression towards the identity."""
    job.refuse_post_norm("least_squares")

    def change(name: str, tensor: Any, gap: GapMoments) -> Any:
        return least_squares(tensor, linear_map(gap.mlp.xx, gap.mlp.xy, ridge))

    return _apply(job, measure_gaps(job, tokens=tokens), change, ("down_proj",))


def _apply(
    job: FoldJob,
    gaps: dict[int, GapMoments],
    change: Callable[[str, Any, GapMoments], Any],
    weights: tuple[Matrix, ...],
) -> Folded:
    """Left-multiply the output-side weights, and their biases, of the kept layer before each gap."""
    modules = {"down_proj": job.decoder.down_proj, "o_proj": job.decoder.o_proj}
    folded: Folded = {}
    for kept, gap in gaps.items():
        for module in (modules[name] for name in weights):
            for name in (f"{module}.weight", f"{module}.bias"):
                if (tensor := job.read(kept, name)) is not None:
                    folded[kept, name] = change(name, tensor, gap)
    return folded


def fold_reconstruction(
    job: FoldJob,
    *,
    ridge: float | Literal["auto"] = 0.03,
    share: float | None = None,
    text_share: float | None = None,
    answer_weight: float = 4.0,
    tokens: Literal["all", "prompt"] = "all",
    weights: tuple[Matrix, ...] = ("o_proj", "down_proj"),
) -> Folded:
    """Layer-wise refit of everything that stays behind the first gap.

    Args:
        ridge: pull towards the old weights; 'auto' is chosen per matrix by two-fold cross-validation over pictures.
        share: of the calibration questions that is used; None: as many as make it cost about one forward pass over all.
        text_share: share of the regression's weight that text tokens have together; None: every token alike.
        answer_weight: of a token of an answer, beside 1 for one of the prompt.
        tokens: 'all', or those of the 'prompt' only.
        weights: which output matrices of a layer are refitted: 'o_proj', 'down_proj' or both.
    """
    modules = {"o_proj": job.decoder.o_proj, "down_proj": job.decoder.down_proj}
    batches = job.batches(refitted_share(job.plan) if share is None else share)
    fit = Fit(ridge, text_share, answer_weight, tokens)
    return reconstruct(job, fit, batches, [module for name, module in modules.items() if name in weights])


def fold_auto(job: FoldJob, *, fitted_on: int | None = None) -> Folded:
    """The fold that departs least from the original on held-out questions; nothing where none helps.

    Args: fitted_on: questions that the candidates are fitted on, at most; None: a quarter.
    """
    return choose(job, {name: FOLDS[name] for name in CANDIDATES}, fitted_on)


FOLDS: dict[str, Callable[..., Folded]] = {
    "auto": fold_auto,
    "none": fold_none,
    "scp": fold_scp,
    "scp_both": fold_scp_both,
    "least_squares": fold_least_squares,
    "reconstruction": fold_reconstruction,
}
