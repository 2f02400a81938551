"""Requests of `evaluate` and `compare` to a routed model: budgets, who chooses under them, and a prompt's cost.

Shapes: B sequences, S tokens of a pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..cards.figures import describe
from ..checkpoints.router_entry import read_settings
from ..checkpoints.serving_entry import read_serving_settings
from ..checkpoints.source import Source
from ..errors import InputError
from ..modeling.routed_route import Budget, RouterSettings
from .rules import Rule
from .settings import default_settings

ROUTER = Rule("router", "router")
OUTCOMES = ("flops", "quality")  # fields of a budget that say what is to come of it


@dataclass(frozen=True)
class BudgetRequest:
    """A budget and who chooses under it."""

    budget: Budget
    rule: Rule = ROUTER
    preset: str | None = None  # by whose name the budget was asked for
    serving: str | None = None  # "serving router", or "serving router, told the question"; None: it is no serving one

    def __str__(self) -> str:
        return describe(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """Return the request as it stands in JSON and in compression.json."""
        rule = self.serving or str(Rule(self.rule.tokens, self.rule.layers))
        who = {"rule": rule, "drop_at": self.rule.drop_at}
        counts = {"keep_visual_tokens": self.budget.keep_visual_tokens, "keep_layers": self.budget.keep_layers}
        outcome = {name: value for name in OUTCOMES if (value := getattr(self.budget, name)) is not None}
        return {"preset": self.preset, **counts, **outcome, **who}

    @property
    def natural(self) -> bool:
        """Return whether the model itself chooses the route when it is given the budget."""
        return self.rule == ROUTER and self.serving is None

    def parts(self) -> Rule:
        """Return the rule without what the budget has no use for: FastV alone where all layers run."""
        tokens = "all" if self.budget.keep_visual_tokens is None else self.rule.tokens
        layers = "all" if self.budget.keep_layers is None else self.rule.layers
        return Rule(tokens, layers, self.rule.drop_at)


@dataclass(frozen=True)
class BudgetGrid:
    """Lists of budgets for any folder; every count of tokens is combined with every count of layers."""

    keep_visual_tokens: tuple[int | float | None, ...] = ()
    keep_layers: tuple[int | None, ...] = ()
    presets: tuple[str, ...] = ()
    flops: tuple[float, ...] = ()
    quality: tuple[float, ...] = ()
    rule: str = "router"
    drop_at: int | None = None
    tell_question: bool = False  # to a serving router

    @property
    def any(self) -> bool:
        return bool(self.keep_visual_tokens or self.keep_layers or self.presets or self.flops or self.quality)

    def requests_for(self, source: Source) -> list[BudgetRequest | None]:
        """Return the requests for one folder, checked against it; None is the model as it is. Raises InputError."""
        rule = Rule.parse(self.rule, self.drop_at)
        if not self.any:
            if self.rule != "router" or self.drop_at is not None:
                raise InputError(
                    f"--rule {self.rule} chooses under a budget: give --keep-visual-tokens or --keep-layers."
                )
            if self.tell_question:
                raise InputError(
                    "--tell-question tells a serving router the question, and without a budget none runs: give "
                    "--preset or --keep-visual-tokens."
                )
            return [None]
        if is_for_serving_router(source, self):
            return list(serving_requests(source, self))
        settings = router_settings(source, rule)
        budgets = [
            Budget(*pair) for pair in itertools.product(self.keep_visual_tokens or (None,), self.keep_layers or (None,))
        ]
        budgets = [] if not (self.keep_visual_tokens or self.keep_layers) else budgets
        budgets += [Budget(flops=share) for share in self.flops] + [Budget(quality=share) for share in self.quality]
        requests = [BudgetRequest(budget, rule) for budget in budgets]
        try:
            requests += [BudgetRequest(settings.preset(name), rule, name) for name in self.presets]
            for request in requests:
                request.budget.check(settings, source.num_layers)
                request.rule.check(request.budget)
                if rule != ROUTER and any(getattr(request.budget, name) is not None for name in OUTCOMES):
                    raise ValueError(
                        f"only a router can keep a share of FLOPs or of answers ({request}): leave out --rule and "
                        "--drop-at. `compare` compares rules with it at equal FLOPs."
                    )
        except ValueError as error:
            raise InputError(f"{source.name}: {error}") from error
        if rule.drop_at is not None and not 0 <= rule.drop_at <= source.num_layers:
            raise InputError(f"--drop-at {rule.drop_at}: give a number from 0 to {source.num_layers}.")
        return [request if not request.budget.is_off else None for request in requests]


def router_settings(source: Source, rule: Rule = ROUTER) -> RouterSettings:
    """Return a folder's router settings; without a router, for rules that need none, the default ones."""
    if "router" not in source.raw_config:
        if "router" in (rule.tokens, rule.layers):
            raise InputError(
                f"{source.name} has no router, so that it can't run under a budget: train one with `lvlm-exporter "
                "route`, or have a rule choose (--rule fastv+shortgpt)."
            )
        source.config.router = default_settings(source.config)
    return read_settings(source.config, source.name)


# --- a serving router -------------------------------------------------------------------------------------------------

SERVING = "serving router"
TOLD = "serving router, told the question"


def is_for_serving_router(source: Source, grid: BudgetGrid) -> bool:
    """Tell whether a folder has a serving router. Raises InputError where one is asked for and there is none."""
    if "serving_router" in source.raw_config:
        return True
    if presets := [name for name in grid.presets if name.startswith("serve-")]:
        raise InputError(
            f"{source.name} has no serving router, so that it has no preset {presets[0]!r}: train one with "
            "`lvlm-exporter route --serve`."
        )
    if grid.tell_question:
        raise InputError(f"{source.name} has no serving router to tell the question (--tell-question): leave it out.")
    return False


def serving_requests(source: Source, grid: BudgetGrid) -> Iterator[BudgetRequest | None]:
    """Yield the requests to a folder with a serving router, checked. Raises InputError."""
    settings = read_serving_settings(source.config, source.name)
    for name in ("keep_layers", "flops", "quality", "drop_at"):
        if (value := getattr(grid, name)) not in (None, ()):
            number = value[0] if isinstance(value, tuple) else value
            raise InputError(
                f"{source.name} has a serving router, which keeps a number of visual tokens and all layers: "
                f"--{name.replace('_', '-')} {number} is for other routers; give --preset or --keep-visual-tokens."
            )
    if grid.rule != "router":
        raise InputError(f"--rule {grid.rule} chooses inside the decoder, and {source.name} has a serving router.")
    if grid.tell_question and not settings.question_aware:
        raise InputError(
            f"{source.name}: its serving router was trained without questions: leave --tell-question out, or train it "
            "with `route --serve --question-aware`."
        )
    who = TOLD if grid.tell_question else SERVING
    try:
        for count in grid.keep_visual_tokens:
            yield BudgetRequest(Budget(settings.budget(keep_visual_tokens=count)), serving=who)
        for name in grid.presets:
            share = settings.budget(name)
            yield None if share is None else BudgetRequest(Budget(share), preset=name, serving=who)
    except ValueError as error:
        raise InputError(f"{source.name}: {error}") from error
