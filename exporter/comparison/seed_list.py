"""The key `seeds` of a comparison."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..plain_data import integers


def seeds_from_data(data: Any) -> tuple[int, ...]:
    """Read 'seeds', where there are some. Raises InputError for fewer than two, and for one that stands twice."""
    if "seeds" not in data:
        return ()
    seeds = integers(data["seeds"], "seeds")
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds: {list(seeds)}: two or more different whole numbers from 0 up are needed.")
    return seeds
