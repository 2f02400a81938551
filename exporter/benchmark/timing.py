"""A comparison of timings: interleaved subjects, medians and their spread; and a meter for memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A median, and an interval that covers the true one with 95 % confidence; of few values, their whole range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        skip = skipped_ranks(len(ordered))
        return cls(statistics.median(ordered), ordered[skip], ordered[-1 - skip])


def skipped_ranks(n: int) -> int:
    """Return how many of the lowest and of the highest of n values an interval of the median leaves out.

    By order statistics, so that nothing is assumed of their distribution: the median lies beyond the k-th value from
    either end as often as a fair coin shows fewer than k heads, or fewer than k tails, in n throws.
    """
    skip = 0
    while 2 * (skip + 1) < n and 2 * sum(math.comb(n, i) for i in range(skip + 2)) / 2**n <= 1 - CONFIDENCE:
        skip += 1
    return skip


def interleaved(subjects: int, rounds: int) -> Iterator[list[int]]:
    """Return the order of each round: there and back again (ABBA), so that a drift of speed cancels out."""
    order = list(range(subjects))
    for number in range(rounds):
        yield order[::-1] if number % 2 else order


def paired(measured: Sequence[float], reference: Sequence[float]) -> Spread:
    """Return ratios to the reference, round by round. In a pair of rounds each subject is early and late."""
    pairs = range(0, len(measured) - 1, 2)
    return Spread.of([(measured[i] + measured[i + 1]) / (reference[i] + reference[i + 1]) for i in pairs])


@contextlib.contextmanager
def garbage_between_runs() -> Iterator[Callable[[], object]]:
    """Collect garbage only when called for; what is there already is not looked through again and again."""
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Measure the memory that a run takes beyond what was held before; None where the system does not tell.

    On a GPU what torch's allocator hands out; on the CPU the growth of the process's resident memory.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    try:
        _give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # begin the high-water mark anew
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _give_back_freed_memory() -> None:
    """Give freed memory back, so that it is counted when it is taken again (glibc)."""
    libc: Any = ctypes.CDLL(None)
    libc.malloc_trim(0)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[name].split()[0]) * 1024
