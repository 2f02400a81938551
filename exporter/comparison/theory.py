"""The papers' count of FLOPs, which is a formula: not what runs, and printed beside what is counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the formula knows of a decoder and of a prompt."""

    layers: int
    hidden: int
    intermediate: int | None  # None: the MLP has no one width
    tokens: float  # of a mean prompt
    visual: float  # of them


def fastv_tflops(shape: Shape, layers: int, visual_share: float = 1.0, drop_at: int = 0) -> float | None:
    """Return the TFLOPs of a prompt by FastV's formula (arXiv 2403.06764), which PAR counts by.

    A layer takes 4 n d^2 + 2 n^2 d + 2 n d m, for n tokens, hidden size d and intermediate size m. It counts a gated
    MLP as two matrices and a multiplication with its sum as one operation, so it is below what runs.

    Args:
        layers: that run; visual_share: of the visual tokens, that stay from layer `drop_at` on.
    Returns: None for a decoder without one intermediate size.
    """
    if shape.intermediate is None:
        return None
    few = shape.tokens - shape.visual * (1 - visual_share)
    before = min(drop_at, layers)
    return (before * _layer(shape, shape.tokens) + (layers - before) * _layer(shape, few)) / 1e12


def _layer(shape: Shape, tokens: float) -> float:
    assert shape.intermediate is not None
    linear = 4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate
    return tokens * linear + 2 * tokens**2 * shape.hidden
