"""Progress of long work: a function that wraps an iteration, silent unless the caller shows a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MIB = 1 << 20

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, what is done, how many -> the same items


def silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return the items, and show nothing."""
    return items


@contextlib.contextmanager
def counting_bytes(progress: Progress, what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of bytes as they are done, and moves the bar on by one for each MiB."""
    steps = num_bytes // MIB + 1
    ticks = iter(progress(range(steps), what, steps))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        for _ in range((done + count) // MIB - done // MIB):
            next(ticks, None)
        done += count

    yield advance
    for _ in ticks:
        pass
