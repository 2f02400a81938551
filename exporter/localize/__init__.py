"""Localizers: which decoder layers are redundant. One file a method; their rows stand in `exporter/methods.py`.

A localizer takes a LocalizeJob (or the statistics of one pass, where its row says so), how many layers are to go, which
are protected, and its own options.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..methods import EXPLICIT
from .job import LocalizeJob, run_localizer
from .scores import LayerScores

__all__ = ["LayerScores", "LocalizeJob", "explicit", "run_localizer"]


def explicit(num_layers: int, layers: Sequence[int]) -> LayerScores:
    """Return the layers that the recipe names: 1 for those that go."""
    return LayerScores(EXPLICIT, tuple(float(i in layers) for i in range(num_layers)), tuple(sorted(layers)))
