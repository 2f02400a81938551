"""List the methods, a row each: localizers, folds, and losses of a router. A method is its file and its row here.

The command line, recipes, the estimate, comparisons, cards and docs/methods.md read these rows, and nothing else names
a method. A row names its functions as "MODULE:FUNCTION", so that reading the table imports nothing heavy; `resolve`
imports them. The keyword-only arguments of a method's function are its options in a recipe.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

Function = str | Callable[..., Any]  # "MODULE:FUNCTION", or the function itself
SHORT_LVLM = "https://arxiv.org/abs/2507.23362"


def resolve(function: Function) -> Callable[..., Any]:
    """Return the function that a row names."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return resolved


@dataclass(frozen=True)
class Localizer:
    """Chooses the layers to drop. Its function takes (job, count, protect, **options) and returns LayerScores."""

    run: Function
    title: str  # as a card names it; of one that measures nothing (`control`) the sentence that a card says
    link: str = ""  # where it was published
    value_name: str = "redundancy"  # of its scores, as a plot's axis names them
    passes: float | Function = 1.0  # forward passes over all questions; or a function of (JobSize, options), see there
    sweeps: int | Function = 1  # times that layers are read with --memory; a function as of `passes` may give shares
    from_statistics: bool = False  # its function takes the statistics of one pass instead of the job: several share it
    attention: bool = False  # these include the attention's
    nested: bool = False  # what it drops of fewer layers is the beginning of what it drops of more
    of_blocks: bool = False  # values are those of blocks of layers, and 0 where no block begins
    control: bool = False  # looks at nothing


@dataclass(frozen=True)
class Fold:
    """Makes up for dropped layers in those that stay. Its function takes (job, **options) and returns new tensors."""

    run: Function
    title: str
    link: str = ""
    passes: float | Function = 1.0  # as a localizer's
    sweeps: int | Function = 1  # as a localizer's
    holds_states: bool = False  # keeps the states of all questions that it is fitted on in memory


@dataclass(frozen=True)
class RouterLoss:
    """A loss of routers: a function that takes (batch, generator, **options) and returns a scalar tensor."""

    run: Function
    title: str
    link: str = ""
    at_least: Mapping[str, int] = field(default_factory=dict)  # the smallest value of an option
    shares: tuple[str, ...] = ()  # options that are at most 1
    positive: tuple[str, ...] = ()  # options that must not be 0
    over_tokens: bool = False  # it is a mean over the tokens of answers; else over questions


LOCALIZERS: dict[str, Localizer] = {
    "best_of": Localizer(
        run="exporter.localize.best_of:by_best_of",
        title="the divergence at the model's own answers, from what Short-LVLM, ShortGPT and UIDL propose",
        link=SHORT_LVLM,
        passes="exporter.localize.best_of:passes",
        sweeps="exporter.localize.best_of:sweeps",
    ),
    "tis": Localizer(
        run="exporter.localize.tis:tis",
        title="Short-LVLM's Token Importance Scores",
        link=SHORT_LVLM,
        value_name="cosine of input and output over important tokens",
        passes=1.15,
        from_statistics=True,
        attention=True,
    ),
    "block_influence": Localizer(
        run="exporter.localize.block_influence:block_influence",
        title="ShortGPT's block influence",
        link="https://arxiv.org/abs/2403.03853",
        value_name="cosine of input and output over all tokens",
        from_statistics=True,
    ),
    "angular": Localizer(
        run="exporter.localize.angular:angular",
        title="the angular distance of blocks (UIDL)",
        link="https://arxiv.org/abs/2403.17887",
        value_name="1 - angular distance of the block that begins here",
        from_statistics=True,
        of_blocks=True,
    ),
    "fisher": Localizer(
        run="exporter.localize.fisher:by_fisher",
        title="Fisher information of the layers' gates",
        link="https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html",
        value_name="- divergence when this layer is removed, to second order",
        passes="exporter.localize.fisher:passes",
    ),
    "greedy": Localizer(
        run="exporter.localize.greedy:by_greedy",
        title="greedy removal by loss (SLEB)",
        link="https://arxiv.org/abs/2402.09025",
        value_name="- loss when this layer alone is removed",
        passes="exporter.localize.greedy:passes",
        sweeps="exporter.localize.greedy:sweeps",
        nested=True,
    ),
    "random": Localizer(
        run="exporter.localize.controls:by_random",
        title="They were drawn at random, as a control.",
        passes=0.0,
        sweeps=0,
        control=True,
    ),
    "first": Localizer(
        run="exporter.localize.controls:by_first",
        title="They are the first ones, taken as a control.",
        passes=0.0,
        sweeps=0,
        control=True,
    ),
    "last": Localizer(
        run="exporter.localize.controls:by_last",
        title="They are the last ones, taken as a control.",
        passes=0.0,
        sweeps=0,
        control=True,
    ),
}
EXPLICIT = "explicit"  # where a recipe names the layers: no localizer, but a card and a plot read a row of it
NAMED_BY_HAND = Localizer(
    run="exporter.localize:explicit", title="They were named by hand in the recipe.", passes=0.0, control=True
)

FOLDS: dict[str, Fold] = {
    "auto": Fold(
        run="exporter.fold.auto:fold_auto",
        title="the fold that departs least from the model on held-out questions",
        passes="exporter.fold.auto:passes",
        sweeps="exporter.fold.auto:sweeps",
        holds_states=True,
    ),
    "reconstruction": Fold(
        run="exporter.fold.reconstruction:fold_reconstruction",
        title="layer-wise reconstruction",
        link="https://arxiv.org/abs/2301.00774",
        passes="exporter.fold.reconstruction:passes",
        holds_states=True,
    ),
    "scp": Fold(run="exporter.fold.scp:fold_scp", title="Short-LVLM's Subspace-Compensated Pruning", link=SHORT_LVLM),
    "scp_both": Fold(
        run="exporter.fold.scp:fold_scp_both",
        title="Short-LVLM's Subspace-Compensated Pruning, in both matrices",
        link=SHORT_LVLM,
    ),
    "least_squares": Fold(
        run="exporter.fold.least_squares:fold_least_squares",
        title="ReplaceMe's least squares",
        link="https://arxiv.org/abs/2505.02819",
    ),
    "none": Fold(run="exporter.fold.none:fold_none", title="nothing: weights stay as they are", passes=0.0, sweeps=0),
}

LOSSES: dict[str, RouterLoss] = {
    "importance": RouterLoss(
        run="exporter.routing.training.importance_loss:importance_loss",
        title="rank tokens and layers by what they mean to the answer",
        link="https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html",
        at_least={"sets": 2, "draws": 1},  # sets are compared with each other
    ),
    "relaxed": RouterLoss(
        run="exporter.routing.training.relaxed_loss:relaxed_loss",
        title="lower the divergence itself, through relaxed choices",
        over_tokens=True,
        shares=("skip",),
        positive=("temperature",),
    ),
    "preference": RouterLoss(
        run="exporter.routing.training.preference_loss:preference_loss",
        title="prefer the better of several pruning actions (PAR)",
        link="https://arxiv.org/abs/2412.06458",
        at_least={"actions": 2},  # compared with each other
        shares=("tokens", "layers"),
    ),
}


def localizer_row(name: str) -> Localizer:
    """Return the row of a record's localizer; one that is not in the table is called by its name."""
    return NAMED_BY_HAND if name == EXPLICIT else LOCALIZERS.get(name) or Localizer(run="", title=name)


def fold_row(name: str) -> Fold:
    """Return the row of a record's fold; one that is not in the table is called by its name."""
    return FOLDS.get(name) or Fold(run="", title=name)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from YAML may stand where the annotation asks for a number, a choice or several."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return value in arguments
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and bool(value) and all(fits(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(fits(value, choice) for choice in arguments)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """Return the annotation in words."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if get_origin(hint) is tuple:
        return f"a list of {in_words(arguments[0])}"
    if arguments:
        return " or ".join(in_words(argument) for argument in arguments)
    words = {float: "a number from 0 up", int: "a whole number from 0 up", str: "a text", bool: "true or false"}
    word: str = words.get(hint, "null" if hint is type(None) else hint.__name__)
    return word
