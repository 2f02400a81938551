"""Requests of `evaluate` and `compare` to a routed model: budgets, who chooses under them, and a prompt's cost.

Shapes: B sequences, S tokens of a pass.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..cards.figures import describe
from ..checkpoints.router_entry import read_settings
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

    def __str__(self) -> str:
        return describe(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """Return the request as it stands in JSON and in compression.json."""
        who = {"rule": str(Rule(self.rule.tokens, self.rule.layers)), "drop_at": self.rule.drop_at}
        counts = {"keep_visual_tokens": self.budget.keep_visual_tokens, "keep_layers": self.budget.keep_layers}
        outcome = {name: value for name in OUTCOMES if (value := getattr(self.budget, name)) is not None}
        return {"preset": self.preset, **counts, **outcome, **who}

    @property
    def natural(self) -> bool:
        """Return whether the model itself chooses the route when it is given the budget."""
        return self.rule == ROUTER

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
            return [None]
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
