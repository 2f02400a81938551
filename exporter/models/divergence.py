"""The divergence of a variant from the original on held-out questions, and its standard error. Pure.

Questions about one picture say much the same: the picture is what varies independently, so that standard errors are
taken over pictures (a ratio of sums, clustered; W. G. Cochran, Sampling Techniques, 1977, section 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Z = 1.959964  # of a 95 % interval
CLEARLY = 2.0  # standard errors by which a divergence has to speak against the error of the states
KINDS = ("visual", "text", "answers")  # of tokens: of the picture, of the question, and where an answer is said
READ = ("text", "answers")  # what counts where a fold has made up for the rest
EXACT = 1e-12  # an error below it is none: a kind that is not hurt at all does not make up for one that is


@dataclass(frozen=True)
class StateErrors:
    """Relative squared errors, summed over the tokens of each kind, and how many these are."""

    sums: tuple[float, ...] = (0.0,) * len(KINDS)
    tokens: tuple[int, ...] = (0,) * len(KINDS)

    def __add__(self, other: StateErrors) -> StateErrors:
        return StateErrors(
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
        )

    def over(self, kinds: Sequence[str]) -> float:
        """Return the geometric mean of some kinds' means; of kinds that do not occur nothing is said."""
        by_kind = dict(zip(KINDS, zip(self.sums, self.tokens, strict=True), strict=True))
        means = [total / tokens for total, tokens in map(by_kind.__getitem__, kinds) if tokens]
        if not any(means):
            return 0.0
        return math.exp(sum(math.log(max(mean, EXACT)) for mean in means) / len(means))


@dataclass(frozen=True)
class Divergence:
    """KL(original || variant) at the tokens of the original's answers, question by question."""

    kl: tuple[float, ...]  # summed over each answer, in nats
    tokens: tuple[int, ...]  # of each answer
    pictures: tuple[int, ...]  # the number of each question's picture
    follows: tuple[bool, ...] = ()  # the variant would give the very same answer
    states: StateErrors = StateErrors()  # of the last states: little noise, but no answer

    @property
    def mean(self) -> float:
        """Return the mean per answer token."""
        return sum(self.kl) / max(1, sum(self.tokens))

    @property
    def state_error(self) -> float:
        """Return the error of the last states where text is read or an answer is said."""
        return self.states.over(READ)

    @property
    def error(self) -> float:
        """Return the standard error of the mean."""
        return self._error(self.kl)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval; a divergence is never below 0."""
        return (max(0.0, self.mean - Z * self.error), self.mean + Z * self.error)

    def more_than(self, other: Divergence) -> tuple[float, float]:
        """Return how much larger it is than another one on the same questions, and the standard error of that."""
        differences = [mine - its for mine, its in zip(self.kl, other.kl, strict=True)]
        return self.mean - other.mean, self._error(differences)

    def more_others_than(self, other: Divergence) -> tuple[float, float]:
        """Return how much more of the answers become others than another one's, and the standard error of that."""
        differences = [float(its) - float(mine) for mine, its in zip(self.follows, other.follows, strict=True)]
        alone = replace(self, tokens=(1,) * len(differences), pictures=self.pictures[: len(differences)])
        return sum(differences) / max(1, len(differences)), alone._error(differences)

    def and_on(self, more: Divergence) -> Divergence:
        """Return the divergence on these questions and on more of them."""
        return Divergence(
            kl=self.kl + more.kl,
            tokens=self.tokens + more.tokens,
            pictures=self.pictures + more.pictures,
            follows=self.follows + more.follows,
            states=self.states + more.states,
        )

    def to_state(self) -> dict[str, Any]:
        """Return it as lists, numbers and names, for a run that goes on from this one."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Divergence:
        """Return what `to_state` was given, also where JSON has made lists of its tuples."""
        return cls(**_with_tuples(state) | {"states": StateErrors(**_with_tuples(state["states"]))})

    def compared_with(self, other: Divergence) -> dict[str, float | None]:
        """Return `more_than` as a record has it: the paired difference, and its standard error over pictures."""
        more, error = self.more_than(other)
        return {"more": more, "error": error if math.isfinite(error) else None}

    def _error(self, sums: Sequence[float]) -> float:
        """Return the standard error of the ratio of the sums' total to the tokens', over pictures."""
        total = max(1, sum(self.tokens))
        ratio = sum(sums) / total
        residuals: dict[int, float] = {}
        for value, tokens, picture in zip(sums, self.tokens, self.pictures, strict=True):
            residuals[picture] = residuals.get(picture, 0.0) + value - ratio * tokens
        n = len(residuals)
        if n < 2:
            return math.inf
        return math.sqrt(n / (n - 1) * sum(value * value for value in residuals.values())) / total

    def to_data(self) -> dict[str, Any]:
        known = math.isfinite(self.error)  # one picture alone says nothing of others; JSON has no infinite numbers
        interval = list(self.interval) if known else None
        data: dict[str, Any] = {"kl": self.mean, "interval": interval, "questions": len(self.kl)}
        if any(self.states.tokens):
            data["state_error"] = self.state_error
        if self.follows:
            data["same_answers"] = sum(self.follows) / len(self.follows)
        return data


def _with_tuples(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in state.items()}


def most_faithful(divergences: Sequence[Divergence]) -> int:
    """Return the one of the lowest error of the last states that neither answers nor divergence speak against.

    What counts is what is answered, but that hangs on the few answers that go wrong: a dozen questions tell folds and
    sets of layers apart by the error, to which every token adds, where the divergence needs hundreds. Yet an error may
    lie where the head does not look. So one is passed over where more of the answers become others than with the best,
    beyond the noise of that, or where the divergence clearly says the same (examples/results.md). Among equals the
    first one is taken: give them in order of simplicity.
    """
    order = sorted(range(len(divergences)), key=lambda number: divergences[number].state_error)
    fewest = max(divergences, key=lambda divergence: sum(divergence.follows))
    as_good = [number for number in order if not _exceeds(divergences[number].more_others_than(fewest), 1.0)]
    return as_good[simplest([divergences[number] for number in as_good], CLEARLY)]


def _exceeds(more: tuple[float, float], errors: float) -> bool:
    """Tell whether a difference is larger than some of its standard errors; of one picture alone nothing is known."""
    difference, error = more
    return math.isfinite(error) and difference > errors * error * (1 + EXACT)


def simplest(divergences: Sequence[Divergence], errors: float = 1.0) -> int:
    """Return the first, in order of simplicity, that is not worse than the best one by more than some standard errors.

    What is more complicated has to show that it helps: a difference below its noise does not.
    """
    best = min(range(len(divergences)), key=lambda number: divergences[number].mean)
    for number, divergence in enumerate(divergences):
        more, error = divergence.more_than(divergences[best])
        if number == best or (math.isfinite(error) and more <= errors * error):
            return number
    return best
