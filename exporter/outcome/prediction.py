"""What a candidate is expected to cost, and which candidates are worth making. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .answer_cost import AnswerCost, Question
from .candidate import Candidate, Mix
from .goal import SearchGoal

INT8_GAIN = 1.5  # how much faster ONNX Runtime with int8 weights is guessed to be, until one was measured
FRONT = (1 / 6, 1 / 4, 1 / 3, 5 / 12)  # shares of the layers, where no goal says how many go


@dataclass(frozen=True)
class Sizes:
    """What a model weighs."""

    layers: int
    parameters: int
    layer_parameters: float  # of one, on average
    itemsize: int  # bytes of a parameter in memory
    free: int  # layers that may go
    beyond: int = 0  # bytes that an answer takes beside the weights

    def parameters_without(self, gone: int) -> int:
        return round(self.parameters - gone * self.layer_parameters)

    def memory(self, gone: int, int8: bool) -> int:
        """Return bytes of weights and an answer; int8 weights are the decoder layers'."""
        in_layers = (self.layers - gone) * self.layer_parameters
        rest = self.parameters - self.layers * self.layer_parameters
        return round(in_layers * (1 if int8 else self.itemsize) + rest * self.itemsize) + self.beyond


@dataclass
class Predictor:
    """Expects figures of candidates, and learns from those of the same mix that were measured."""

    sizes: Sizes
    question: Question
    times: AnswerCost  # in milliseconds, or in operations before anything was timed
    operations: AnswerCost
    timed: bool  # the former
    factors: dict[tuple[Mix, str], float] = field(default_factory=dict)  # measured / expected

    def expect(self, candidate: Candidate) -> dict[str, Any]:
        """Return the figures that goals are about: speedup, total_ms, parameters, flops_share, memory_bytes."""
        plain = self._plain(candidate)
        return {name: value * self.factors.get((candidate.mix.unhealed, name), 1.0) for name, value in plain.items()}

    def _plain(self, candidate: Candidate) -> dict[str, float]:
        gone, mix = candidate.drop, candidate.mix
        whole = self.times.total(self.question)
        time = self.times.total(self.question, gone, mix.tokens) / (INT8_GAIN if mix.int8 else 1.0)
        operations = self.operations.total(self.question, gone, mix.tokens)
        figures = {
            "speedup": whole / time,
            "parameters": float(self.sizes.parameters_without(gone)),
            "flops_share": operations / self.operations.total(self.question),
            "memory_bytes": float(self.sizes.memory(gone, mix.int8)),
        }
        return figures | ({"total_ms": time} if self.timed else {})

    def learn(self, candidate: Candidate, measured: Mapping[str, Any]) -> None:
        """Take the last measured candidate of a mix as the measure for the others of it."""
        for name, value in self._plain(candidate).items():
            if measured.get(name) and name != "parameters":
                self.factors[candidate.mix.unhealed, name] = measured[name] / value

    def least(self, mix: Mix, goal: SearchGoal, above: int = -1) -> Candidate | None:
        """Return the candidate of a mix with the fewest layers gone that is expected to reach the goal.

        Args:
            above: more layers than this.
        """
        for gone in range(above + 1, self.sizes.free + 1):
            candidate = Candidate(gone, mix)
            if candidate.is_original or (mix.healed and not gone):
                continue  # there is nothing to heal
            if goal.met(self.expect(candidate)):
                return candidate
        return None


def wanted_candidates(
    predictor: Predictor, goal: SearchGoal, mixes: Sequence[Mix], missed: Collection[Candidate] = ()
) -> list[Candidate]:
    """Return the candidates that are worth making, those that take least effort first.

    For a goal: of each mix the fewest layers that reach it. More layers of the same mix lose more and are not asked
    for; a mix that saves no layer against one that does less is not worth it. Without a goal, and for one that
    nothing is expected to reach, a few numbers of layers of each mix.

    Args:
        missed: measured candidates that did not reach the goal, though it was expected: more layers have to go.
    """
    if goal.target is None or not any(predictor.least(mix, goal) for mix in mixes):  # no number of layers reaches it
        counts = sorted({min(predictor.sizes.free, max(1, round(predictor.sizes.layers * share))) for share in FRONT})
        both = [Candidate(gone, mix) for mix in mixes for gone in (counts if not _alone(mix) else [0, *counts])]
        return [candidate for candidate in both if candidate.drop <= predictor.sizes.free]
    worthwhile: list[Candidate] = []
    for mix in mixes:
        above = max((failure.drop for failure in missed if failure.mix.unhealed == mix.unhealed), default=-1)
        candidate = predictor.least(mix, goal, above)
        if candidate is None or any(_as_good(other, candidate) for other in worthwhile):
            continue
        worthwhile.append(candidate)
    return worthwhile


def _alone(mix: Mix) -> bool:
    """Tell whether a mix does something to a model with all its layers."""
    return not mix.healed and mix != Mix()


def _as_good(other: Candidate, candidate: Candidate) -> bool:
    """Tell whether another candidate does less and has as few layers gone.

    Of two that do the same the healed one loses less and is as fast: it is not worth it where the other needs fewer.
    """
    theirs, mine = other.mix, candidate.mix
    if (theirs.tokens, theirs.int8, theirs.healed) == (mine.tokens, mine.int8, not mine.healed):
        return mine.healed and other.drop < candidate.drop
    does_less = theirs.tokens in (None, mine.tokens) and theirs.int8 <= mine.int8 and theirs.number < mine.number
    return does_less and theirs.healed == mine.healed and other.drop <= candidate.drop
