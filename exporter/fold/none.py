"""None: weights stay as they are."""

from __future__ import annotations

from ..plan import Folded
from .job import FoldJob


def fold_none(job: FoldJob) -> Folded:
    """Fold nothing."""
    return {}
