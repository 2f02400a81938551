"""What the steps of a search take: guesses first, then what earlier steps of the same kind took. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from .candidate import Candidate

STEPS = ("compress", "heal", "route", "export", "measure")


@dataclass
class StepCosts:
    """Seconds of each kind of step."""

    guesses: dict[str, float]
    seen: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: str, seconds: float) -> None:
        self.seen.setdefault(step, []).append(seconds)

    def expect(self, step: str) -> float:
        """Return the longest that was seen of a kind, so that a limit is kept; a guess where none was."""
        return max(self.seen.get(step, [self.guesses.get(step, 0.0)]))

    def seconds_of(self, candidate: Candidate, folders: Collection[str]) -> float:
        """Return seconds to make and to measure a candidate.

        Args:
            folders: folders that are there already.
        """
        return sum(self.expect(step_of(link)) for link in chain(candidate, folders)) + self.expect("measure")

    def seconds_of_all(self, candidates: Collection[Candidate]) -> float:
        """Return seconds of several candidates, which share what they are made from."""
        folders: set[str] = set()
        total = 0.0
        for candidate in candidates:
            total += self.seconds_of(candidate, folders)
            folders |= {link.folder for link in chain(candidate, folders)}
        return total


def step_of(candidate: Candidate) -> str:
    """Return the step that makes a candidate's folder from the one before."""
    mix = candidate.mix
    return "export" if mix.int8 else "route" if mix.tokens is not None else "heal" if mix.healed else "compress"


def chain(candidate: Candidate, folders: Collection[str]) -> Iterator[Candidate]:
    """Yield the candidate and those that it is made from, but for the original and for folders that are there."""
    link: Candidate | None = candidate
    while link is not None and not link.is_original and link.folder not in folders:
        yield link
        link = link.before
