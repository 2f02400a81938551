"""Left-multiply the output matrices of the layers before gaps: what folds by one linear map have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from .. import ranks
from ..plan import Folded
from .job import FoldJob, GapMoments

Tokens = Literal["all", "prompt", "important"]
Matrix = Literal["o_proj", "down_proj"]


def change_outputs(
    job: FoldJob,
    gaps: Mapping[int, GapMoments],
    change: Callable[[str, Any, GapMoments], Any],
    weights: tuple[Matrix, ...],
) -> Folded:
    """Multiply from the left the output-side weights, and their biases, of the kept layer before each gap."""

    def changed() -> Folded:
        folded: Folded = {}
        for kept, gap in gaps.items():
            for module in job.decoder.maps_of(kept, weights):
                for name in (f"{module}.weight", f"{module}.bias"):
                    if (tensor := job.read(kept, name)) is not None:
                        folded[kept, name] = change(name, tensor, gap)
        return folded

    return ranks.from_first(changed)  # which has the moments
