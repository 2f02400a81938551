"""The least time that a pass can take on this machine: operations at the best measured rate, or bytes at the best one.

Both rates are measured on the device in the same run, since the data sheet's are reached by no program, and a machine
that others use has less to give (the roofline model; Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}  # of the square matrices that are multiplied
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes; far more than any cache holds
REPEATS = 5


@dataclass(frozen=True)
class Roofline:
    """The rates that the device reached."""

    flops_per_s: float
    bytes_per_s: float
    dtype: str

    def ideal_ms(self, flops: float | None, num_bytes: float | None) -> float | None:
        """Return the least milliseconds of so many operations and bytes; None where one of them was not counted."""
        if flops is None or num_bytes is None:
            return None
        return 1e3 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def shares(self, figures: Any) -> tuple[float | None, float | None]:
        """Return which shares of the ideal speed prefill and decoding reach.

        Args:
            figures: a `Figures`; the prefill, too, reads every weight of a step and writes keys and values.
        """
        ideal = (
            self.ideal_ms(figures.flops, figures.step_bytes),
            self.ideal_ms(figures.decode_flops, figures.step_bytes),
        )
        prefill, decode = (
            None if least is None or not time else least / time
            for least, time in zip(ideal, (figures.prefill_ms, figures.decode_ms), strict=True)
        )
        return prefill, decode

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def measure_roofline(device: str, dtype: torch.dtype) -> Roofline:
    """Multiply large matrices and copy a large tensor; take the best of `REPEATS` each."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    best = 0.0
    for side in SIDES[kind]:
        left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(left)

        def product(left: Any = left, right: Any = right, out: Any = out) -> None:
            torch.mm(left, right, out=out)

        best = max(best, 2 * side**3 / _best_seconds(product, device))
    source = torch.ones(COPIED[kind] // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    return Roofline(best, 2 * COPIED[kind] / seconds, str(dtype).removeprefix("torch."))


def _best_seconds(run: Callable[[], object], device: str) -> float:
    """Return the shortest of some runs, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        begin = _now(device)
        run()
        times.append(_now(device) - begin)
    return min(times[1:])


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
