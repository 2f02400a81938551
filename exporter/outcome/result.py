"""What a search has found: each candidate's figures, those that no other beats, and the one that is chosen. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cards.figures import EXACT_MATCH
from ..evaluation.scoring import Rate, mcnemar, pareto_front
from .candidate import Candidate
from .goal import SearchGoal
from .steps_file import candidate_data


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate that was made and measured."""

    candidate: Candidate
    figures: Mapping[str, Any]  # speedup, total_ms, parameters, flops_share, memory_bytes and their parts
    rate: Rate
    loss: float  # points of exact match below the original's
    loss_error: float  # its standard error, on the same questions
    p_value: float  # that the two answer alike: McNemar's exact test
    held_out: Mapping[str, Any] | None  # what unlabelled questions said when it was made

    @classmethod
    def of(cls, candidate: Candidate, step: Mapping[str, Any], original: Sequence[int]) -> MeasuredCandidate:
        """Compare a measured candidate with the original, question by question."""
        before, after = (list(map(bool, answers)) for answers in (original, step["correct"]))
        only_original, only_it, p_value = mcnemar(before, after)
        loss = 100 * (only_original - only_it) / len(before)
        error = 100 * paired_error(only_original, only_it, len(before))
        return cls(
            candidate,
            step["figures"],
            rate=Rate.of(after),
            loss=loss,
            loss_error=error,
            p_value=p_value,
            held_out=step["held_out"],
        )

    def to_data(self) -> dict[str, Any]:
        return {
            "label": self.candidate.label,
            "candidate": candidate_data(self.candidate),
            "figures": dict(self.figures),
            "accuracy": self.rate.accuracy,
            "interval": list(self.rate.interval),
            "n": self.rate.n,
            "loss": self.loss,
            "loss_error": self.loss_error,
            "p_value": self.p_value,
            "held_out": None if self.held_out is None else dict(self.held_out),
        }


def paired_error(only_first: int, only_second: int, n: int) -> float:
    """Return the standard error of the difference of two shares on the same n questions.

    Half a question is added to each kind (A. Agresti and Y. Min, 2005), so that it is not 0 where none differs.
    """
    spread = only_first + only_second + 1 - (only_first - only_second) ** 2 / (n + 2)
    return math.sqrt(spread) / (n + 2)


def front(
    candidates: Sequence[MeasuredCandidate], goal: SearchGoal, original: Mapping[str, Any], accuracy: float
) -> list[MeasuredCandidate]:
    """Return those that no other, the original among them, beats in both the goal's figure and the exact match.

    Args:
        original: its figures, as far as they are known; accuracy: its exact match.
    """
    known = [measured for measured in candidates if goal.better(measured.figures) > -math.inf]
    points = [(-goal.better(measured.figures), measured.rate.accuracy) for measured in known]
    as_it_is = [(-goal.better(original), accuracy)] if goal.better(original) > -math.inf else []
    best = pareto_front([*points, *as_it_is])
    return [measured for point in best for measured, at in zip(known, points, strict=True) if at == point]


def choice(candidates: Sequence[MeasuredCandidate], goal: SearchGoal, max_loss: float) -> MeasuredCandidate | None:
    """Return the one that is chosen: of those that reach the goal within the loss the one that loses least.

    Of several that lose as little the one that goes furthest; without a goal the one that goes furthest at all.
    """
    good = [measured for measured in candidates if goal.met(measured.figures) and measured.loss <= max_loss]
    if goal.target is None:
        good.sort(key=lambda measured: (-goal.better(measured.figures), measured.loss))
    else:
        good.sort(key=lambda measured: (measured.loss, -goal.better(measured.figures)))
    return good[0] if good else None


def nearest_ones(candidates: Sequence[MeasuredCandidate], goal: SearchGoal, max_loss: float) -> list[MeasuredCandidate]:
    """Return what comes nearest to a goal that is not met: the furthest within the loss, and the least loss beyond."""
    within = [measured for measured in candidates if measured.loss <= max_loss]
    beyond = [measured for measured in candidates if goal.met(measured.figures)]
    nearest = [max(within, key=lambda measured: (goal.better(measured.figures), -measured.loss))] if within else []
    return nearest + (
        [min(beyond, key=lambda measured: (measured.loss, -goal.better(measured.figures)))] if beyond else []
    )


@dataclass(frozen=True)
class SearchResult:
    """A search that came to its end, or as far as its time went."""

    out: Path
    goal: SearchGoal
    max_loss: float
    original: Rate
    original_figures: Mapping[str, Any]  # as a candidate's, and 'answer_tokens'
    candidates: tuple[MeasuredCandidate, ...]
    passed: Mapping[str, float]  # candidates that were not measured, and the points they were expected to lose
    failed: Mapping[str, str]  # candidates that could not be made, and why
    left_out: Mapping[str, str]  # of healing, router, int8: why
    open: tuple[str, ...]  # candidates that the time did not reach
    seconds: float
    chosen: Path | None  # the folder that was written
    chosen_label: str | None
    metric: str = EXACT_MATCH  # of the task, by its title

    @property
    def front(self) -> list[MeasuredCandidate]:
        return front(self.candidates, self.goal, self.original_figures, self.original.accuracy)

    @property
    def choice(self) -> MeasuredCandidate | None:
        return choice(self.candidates, self.goal, self.max_loss)

    @property
    def met(self) -> bool:
        """Tell whether a candidate reaches the goal within the loss."""
        return self.choice is not None

    @property
    def nearest(self) -> list[MeasuredCandidate]:
        return nearest_ones(self.candidates, self.goal, self.max_loss)

    @property
    def verdict(self) -> str:
        """Say what came of it in one sentence."""
        aim = f"{self.goal.in_words()} at a loss of at most {self.max_loss:g} points"
        late = f"; {len(self.open)} more were not reached in the time" if self.open else ""
        if self.choice is not None:
            measured = self.choice
            return f"{aim}: {measured.candidate.label}, {self.words(measured)}{late}"
        told = [f"{measured.candidate.label} ({self.words(measured)})" for measured in self.nearest]
        near = f"the nearest: {'; '.join(told)}" if told else "nothing comes near"
        return f"none of {len(self.candidates)} candidates is {aim}; {near}{late}"

    def words(self, measured: MeasuredCandidate) -> str:
        """Return a candidate's figures in words."""
        value = measured.figures.get(self.goal.kind.measure)
        cost = "its cost is not known" if value is None else self.goal.in_words(value)
        change = f"loses {measured.loss:.1f}" if measured.loss >= 0 else f"gains {-measured.loss:.1f}"
        return f"{cost}, {change} ± {1.96 * measured.loss_error:.1f} points"

    def to_data(self) -> dict[str, Any]:
        goal = {name: value for name, value in vars(self.goal).items() if value is not None}
        best = {measured.candidate for measured in self.front}
        return {
            "goal": goal,
            "metric": self.metric,
            "max_loss": self.max_loss,
            "met": self.met,
            "verdict": self.verdict,
            "complete": not self.open,
            "original": {**vars(self.original), **self.original_figures},
            "candidates": [
                measured.to_data() | {"on_front": measured.candidate in best} for measured in self.candidates
            ],
            "passed_over": dict(self.passed),
            "failed": dict(self.failed),
            "left_out": dict(self.left_out),
            "not_reached": list(self.open),
            "seconds": round(self.seconds, 1),
            "chosen": None if self.chosen is None else str(self.chosen),
            "chosen_label": self.chosen_label,
        }
