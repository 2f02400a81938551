"""Progress of long work: a function that wraps an iteration, silent unless the caller shows a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, what is done, how many -> the same items


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return the items, and show nothing."""
    return items
