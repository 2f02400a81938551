"""Right or wrong, under which budget, and how sure that is: exact match, intervals, paired tests. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..data.answers import normalise


@dataclass(frozen=True)
class Rate:
    """A share of n trials and its 95 % interval."""

    n: int
    accuracy: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, right: Iterable[bool]) -> Rate:
        outcomes = list(right)
        return cls(len(outcomes), sum(outcomes) / len(outcomes), wilson(sum(outcomes), len(outcomes)))


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same questions: McNemar's exact test on those that only one of them gets right."""

    first: str
    second: str
    only_first: int
    only_second: int
    p_value: float


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share (E. B. Wilson, 1927)."""
    if n == 0:
        return (0.0, 1.0)
    share = right / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (max(0.0, center - half), min(1.0, center + half))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Return questions that only the first, only the second gets right, and the exact two-sided p-value."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    return only_first, only_second, min(1.0, 2 * tail)


def is_right(said: str, answers: Sequence[str], choices: Sequence[str] = ()) -> bool:
    """Equal to one of the answers; for multiple choice, its letter is right too."""
    wanted = {normalise(answer) for answer in answers}
    letters = {chr(ord("a") + index) for index, choice in enumerate(choices) if normalise(choice) in wanted}
    return normalise(said) in wanted | letters
