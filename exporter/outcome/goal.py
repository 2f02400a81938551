"""What a search is asked for, as data: a goal, what may be lost, and where questions come from. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, nearest
from ..plain_data import is_whole, paths_as_text
from ..recipe import CalibrationData, TaskData

EXTRAS = ("heal", "router", "int8")  # what a search combines with the removal of layers


@dataclass(frozen=True)
class GoalKind:
    """One way to say what a model is to cost."""

    measure: str  # the entry of a candidate's figures that it is about
    at_least: bool  # the figure is to be at least the target; else at most
    template: str  # of a figure, with {} for it


GOALS = {
    "speedup": GoalKind("speedup", True, "{:.2f} times as fast"),
    "latency_ms": GoalKind("total_ms", False, "{:,.1f} ms an answer"),
    "params": GoalKind("parameters", False, "{:,.0f} parameters"),
    "flops": GoalKind("flops_share", False, "{:.3f} of the FLOPs"),
    "memory": GoalKind("memory_bytes", False, "{:,.0f} bytes of memory"),
}


@dataclass(frozen=True)
class SearchGoal:
    """What a model may cost, by one of five figures at most; without one, the cheaper the better.

    Args:
        speedup: how many times as fast one whole answer is to be: image, prompt and all its tokens.
        latency_ms: most milliseconds for one whole answer on this machine.
        params: most parameters.
        flops: most operations for an answer, as a share of the original's.
        memory: most bytes for the weights and one answer.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    params: int | None = None
    flops: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        named = [name for name in GOALS if getattr(self, name) is not None]
        if len(named) > 1:
            raise InputError(f"a search has one goal, not {len(named)} ({', '.join(named)}): take one.")
        if not named:
            return
        name, value = named[0], getattr(self, named[0])
        if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
            raise InputError(f"{name}={value!r}: a number above 0 is needed.")
        if name == "speedup" and value <= 1:
            raise InputError(
                f"speedup={value}: a number above 1 is needed, 1.5 for an answer in two thirds of the time."
            )
        if name == "flops" and value >= 1:
            raise InputError(f"flops={value}: a share below 1 is needed, 0.5 for half of the original's operations.")
        if name in ("params", "memory") and not is_whole(value):
            raise InputError(f"{name}={value!r}: a whole number is needed.")

    @property
    def name(self) -> str | None:
        """Return which figure the goal is about; None where nothing was asked for."""
        return next((name for name in GOALS if getattr(self, name) is not None), None)

    @property
    def kind(self) -> GoalKind:
        """Return the figure that candidates are compared by; the speed where nothing was asked for."""
        return GOALS[self.name or "speedup"]

    @property
    def target(self) -> float | None:
        return None if self.name is None else float(getattr(self, self.name))

    def met(self, figures: Mapping[str, Any]) -> bool:
        """Tell whether figures reach the goal; what is not known does not."""
        value = figures.get(self.kind.measure)
        if self.target is None:
            return True
        return value is not None and (value >= self.target if self.kind.at_least else value <= self.target)

    def better(self, figures: Mapping[str, Any]) -> float:
        """Return the figure as a number that grows with what was asked for; minus infinity where it is not known."""
        value = figures.get(self.kind.measure)
        if value is None:
            return -math.inf
        return float(value) if self.kind.at_least else -float(value)

    def in_words(self, value: float | None = None) -> str:
        """Return the goal, or another value of its figure, in words."""
        shown = self.target if value is None else value
        return "as fast as can be" if shown is None else self.kind.template.format(shown)


@dataclass(frozen=True)
class SearchRecipe:
    """A search as data.

    Args:
        task: questions with answers, on which the loss is measured.
        max_loss: points of exact match on the task that may be lost.
        task_samples: how many of its questions are asked, drawn with the seed; None: all.
        heal_samples: how many questions to heal on; None: as many as the calibration has.
        without: which of EXTRAS no candidate may have.
    """

    model: str
    calibration: CalibrationData
    task: TaskData
    goal: SearchGoal = SearchGoal()
    max_loss: float = 1.0
    task_samples: int | None = None
    heal_samples: int | None = None
    without: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        paths_as_text(self, "model")
        loss = self.max_loss
        if isinstance(loss, bool) or not isinstance(loss, float | int) or not 0 <= loss <= 100:
            raise InputError(f"max_loss={loss!r}: points of exact match, from 0 to 100, are needed.")
        for name in self.without:
            if name not in EXTRAS:
                raise InputError(f"without '{name}': {nearest(name, EXTRAS)}")
        for name in ("task_samples", "heal_samples"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise InputError(f"{name}={value!r}: a whole number from 1 up is needed.")

    @property
    def heal_calibration(self) -> CalibrationData:
        """Return the questions that are healed on."""
        if self.heal_samples is None:
            return self.calibration.unanswered
        return dataclasses.replace(self.calibration.unanswered, samples=self.heal_samples)

    def to_data(self) -> dict[str, Any]:
        """Return plain data, of everything that a result depends on."""
        goal = {name: value for name, value in vars(self.goal).items() if value is not None}
        fields = {name: getattr(self, name) for name in ("model", "max_loss", "task_samples", "heal_samples", "seed")}
        data = {"calibration": self.calibration.to_data(), "task": self.task.to_data(), "without": list(self.without)}
        return {**fields, **data, "goal": goal}
