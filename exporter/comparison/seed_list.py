"""The key `seeds` of a comparison."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..recipe import integers


def seeds_from_data(data: Any) -> tuple[int, ...]:
    """Read 'seeds', where there are some. Raises InputError for fewer than two, and for one that stands twice."""
    if "seeds" not in data:
        return ()
    found = integers(data["seeds"], "seeds")
    if len(found) < 2 or len(set(found)) < len(found) or min(found) < 0:
        raise InputError(f"seeds: {list(found)}: two or more different whole numbers from 0 up are needed.")
    return found
