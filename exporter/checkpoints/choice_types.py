"""What a record says of the fold, and of choices by held-out questions: how far candidates depart, how sure that is.

Records of earlier versions have less of it, and those of runs that held nothing out have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from .shapes import Kind
from .typed import OR_MISSING, Count, Divergence, Length, Number, Text, from_data

TENSOR = Kind('"layer N\'s NAME"', lambda value: isinstance(value, str) and value.count("'s ") == 1)


@dataclass(frozen=True)
class JudgedPart:
    """The divergence of a candidate from the original's answers to held-out questions."""

    kl: Divergence
    interval: Annotated[tuple[Number, ...], Length(2)] | None  # None: of one picture there is none
    questions: Count
    more: Annotated[Number | None, OR_MISSING] = None  # than the chosen one has on the same questions
    error: Number | None = None  # standard error of that difference, over pictures
    state_error: Number | None = None  # of the last states, see models/state_error.py


@dataclass(frozen=True)
class RunnerUp(JudgedPart):
    """The fold that came next."""

    name: Text = ""


@dataclass(frozen=True)
class FoldPart:
    """The weights that were folded into the layers that stayed."""

    name: Text
    reason: Text
    tensors: tuple[Annotated[str, TENSOR], ...]
    options: dict[Text, Any] = field(default_factory=dict)
    held_out: Annotated[JudgedPart | None, OR_MISSING] = None  # None: it was not chosen by held-out questions
    without: Annotated[JudgedPart | None, OR_MISSING] = None
    runner_up: RunnerUp | None = None
    fell_back: Text = ""  # what tokens were too few for


@dataclass(frozen=True)
class JudgedSet(JudgedPart):
    """A set of layers, judged with a quick fold."""

    drop: tuple[Count, ...] = ()


@dataclass(frozen=True)
class JudgedRound:
    """The sets of layers that were judged on the same questions, and the one that did best."""

    chosen: tuple[Count, ...]
    sets: tuple[JudgedSet, ...]


@dataclass(frozen=True)
class JudgedRounds:
    """The rounds of a localizer that judges sets with a fold; among its details."""

    rounds: tuple[JudgedRound, ...] = ()


def rounds_of(details: Mapping[str, Any]) -> tuple[JudgedRound, ...]:
    """Return the rounds among the details of scores. Raises: Misfit where they are not what they should be."""
    return from_data(JudgedRounds, dict(details)).rounds
