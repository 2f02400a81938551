"""A localizer's result, and the choice that follows from scores alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerScores:
    """Redundancy of every layer, and the layers that the method would drop.

    `values` are comparable within one method only; higher is more redundant. They need not order `drop`: a block
    (angular) or a sequence of removals (greedy) is chosen jointly.
    """

    method: str
    values: tuple[float, ...]  # [L]
    drop: tuple[int, ...]  # in order of choice
    details: dict[str, Any] = field(default_factory=dict)


def most_redundant(values: Sequence[float], count: int, protect: Collection[int]) -> tuple[int, ...]:
    """Return the `count` layers of the highest value that are not protected; of equal ones the deeper."""
    free = [layer for layer in range(len(values)) if layer not in protect]
    return tuple(sorted(free, key=lambda layer: (-values[layer], -layer))[:count])
