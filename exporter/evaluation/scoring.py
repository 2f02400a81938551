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
    def of(cls, values: Iterable[float]) -> Rate:
        """Return the rate of outcomes, right (1) or wrong (0), or the mean of values between them."""
        outcomes = list(values)
        mean = sum(outcomes) / len(outcomes)
        if all(value in (0, 1) for value in outcomes):
            return cls(len(outcomes), mean, wilson(int(sum(outcomes)), len(outcomes)))
        return cls(len(outcomes), mean, normal_interval(outcomes))


@dataclass(frozen=True)
class Fidelity:
    """How far a model says what the reference says, over the tokens of the reference's answers."""

    kl: float  # mean KL(reference || model), nats
    agreement: float  # share of the tokens that the model ranks first too
    tokens: int

    @classmethod
    def of(cls, kl: float, same: int, tokens: int) -> Fidelity | None:
        """Return the means of sums over tokens; None where there is no token."""
        return cls(kl / tokens, same / tokens, tokens) if tokens else None


@dataclass(frozen=True)
class TaskResult:
    """What the answers of one model to a task give."""

    rate: Rate
    by_type: dict[str, Rate]  # in the order of the types' names
    fidelity: Fidelity | None  # None: nothing was compared

    @classmethod
    def of(cls, types: Sequence[str | None], values: Sequence[float], fidelity: Fidelity | None = None) -> TaskResult:
        """Return the figures of values from 0, wrong, to 1, right, with each one's type of question."""
        of_type: dict[str, list[float]] = {}
        for name, value in zip(types, values, strict=True):
            of_type.setdefault(name or "all", []).append(value)
        return cls(Rate.of(values), {name: Rate.of(of_type[name]) for name in sorted(of_type)}, fidelity)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same questions: McNemar's exact test on those that one of them does better."""

    first: str
    second: str
    only_first: int
    only_second: int
    p_value: float
    p_corrected: float = 1.0  # for the number of tests that were made beside it


def rights(n: int, wrong: Iterable[int]) -> list[bool]:
    """Return which of n questions are right, of those that are wrong by their numbers."""
    numbers = set(wrong)
    return [number not in numbers for number in range(n)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in their order (S. Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    corrected, largest = [1.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[number]))
        corrected[number] = largest
    return corrected


def paired_tests(labels: Sequence[str], trials: Sequence[Sequence[float]]) -> tuple[PairedTest, ...]:
    """Return the test of each model against each later one, corrected for their number."""
    both = [(a, b) for a in range(len(labels)) for b in range(a + 1, len(labels))]
    tests = [mcnemar(trials[a], trials[b]) for a, b in both]
    corrected = holm([p_value for *_, p_value in tests])
    return tuple(
        PairedTest(labels[a], labels[b], *counts, p_corrected=p_value)
        for (a, b), counts, p_value in zip(both, tests, corrected, strict=True)
    )


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's score interval for a share (E. B. Wilson, 1927)."""
    if n == 0:
        return (0.0, 1.0)
    share = right / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (max(0.0, center - half), min(1.0, center + half))


def normal_interval(values: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of a mean of values from 0 to 1, by their standard error."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return (0.0, 1.0)
    half = z * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return (max(0.0, mean - half), min(1.0, mean + half))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, float]:
    """Return questions that the first, and that the second, does better, and the exact two-sided p-value.

    Where values lie between right and wrong, it is the sign test.
    """
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    return only_first, only_second, min(1.0, 2 * tail)


def is_right(reply: str, answers: Sequence[str], choices: Sequence[str] = ()) -> bool:
    """Tell whether an answer equals one of the right ones; for multiple choice, its letter is right too."""
    right = {normalise(answer) for answer in answers}
    letters = {chr(ord("a") + index) for index, choice in enumerate(choices) if normalise(choice) in right}
    return normalise(reply) in right | letters


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those of (cost, score) that no other is at most as dear and at least as good as, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front
