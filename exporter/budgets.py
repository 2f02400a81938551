"""What `evaluate` and `compare` are asked of a routed model: budgets, who chooses under them, and what a prompt costs.

Shapes: B rows, S tokens of a pass.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .calibration import Batch, Sample, make_batch, spread
from .errors import InputError
from .modeling.modeling_routed import OFF, Budget, RouterSettings
from .routing import default_settings
from .rules import Rule, make_route
from .scoring import describe
from .source import Source, text_decoder

COUNTED_SAMPLES = 8  # questions whose prompts are counted
ROUTER = Rule("router", "router")


@dataclass(frozen=True)
class Ask:
    """A budget and who chooses under it."""

    budget: Budget
    rule: Rule = ROUTER
    preset: str | None = None  # by whose name the budget was asked for

    def __str__(self) -> str:
        return describe(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """As it stands in JSON and in compression.json."""
        who = {"rule": str(Rule(self.rule.tokens, self.rule.layers)), "drop_at": self.rule.drop_at}
        return {"preset": self.preset, **vars(self.budget), **who}

    @property
    def natural(self) -> bool:
        """The model itself does it when it is given the budget."""
        return self.rule == ROUTER

    def parts(self) -> Rule:
        """The rule without what the budget has no use for: FastV alone where all layers run."""
        tokens = "all" if self.budget.keep_visual_tokens is None else self.rule.tokens
        layers = "all" if self.budget.keep_layers is None else self.rule.layers
        return Rule(tokens, layers, self.rule.drop_at)


# --- from the command line --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Lists of budgets, before it is known for which folder; every token count goes with every layer count."""

    keep_visual_tokens: tuple[int | float | None, ...] = ()
    keep_layers: tuple[int | None, ...] = ()
    presets: tuple[str, ...] = ()
    rule: str = "router"
    drop_at: int | None = None

    @property
    def any(self) -> bool:
        return bool(self.keep_visual_tokens or self.keep_layers or self.presets)

    def of(self, source: Source) -> list[Ask | None]:
        """The asks for one folder, checked against it; None is the model as it is. Raises InputError."""
        rule = Rule.parse(self.rule, self.drop_at)
        if not self.any:
            if self.rule != "router" or self.drop_at is not None:
                raise InputError(
                    f"--rule {self.rule} chooses under a budget: give --keep-visual-tokens or --keep-layers."
                )
            return [None]
        settings = router_settings(source, rule)
        asked = [
            Budget(*pair) for pair in itertools.product(self.keep_visual_tokens or (None,), self.keep_layers or (None,))
        ]
        asked = [] if not (self.keep_visual_tokens or self.keep_layers) else asked
        asks = [Ask(budget, rule) for budget in asked]
        try:
            asks += [Ask(settings.preset(name), rule, name) for name in self.presets]
            for ask in asks:
                ask.budget.check(settings, source.num_layers)
                ask.rule.check(ask.budget)
        except ValueError as error:
            raise InputError(f"{source.name}: {error}") from error
        if rule.drop_at is not None and not 0 <= rule.drop_at <= source.num_layers:
            raise InputError(f"--drop-at {rule.drop_at}: give a number from 0 to {source.num_layers}.")
        return [ask if ask.budget != OFF else None for ask in asks]


def router_settings(source: Source, rule: Rule = ROUTER) -> RouterSettings:
    """Settings of a folder's router; without one, for rules that need none, what a router of it would have."""
    if "router" not in source.raw_config:
        if "router" in (rule.tokens, rule.layers):
            raise InputError(
                f"{source.name} has no router, so that it can't run under a budget: train one with `lvlm-exporter "
                "route`, or have a rule choose (--rule fastv+shortgpt)."
            )
        source.config.router = default_settings(source.config)
    try:
        return RouterSettings.of(source.config)
    except ValueError as error:
        raise InputError(f"{source.name}: {error}") from error


# --- what a prompt costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of prompts, by torch's counter: all of the model, and its decoder with the router alone."""

    total: int = 0
    decoder: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.total + other.total, self.decoder + other.decoder)


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """torch's counter; attention is made of matrix products meanwhile, since not every kernel of it is counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def prefill_flops(model: Any, batch: Batch, **options: Any) -> Flops:
    """One pass over prompts, keys and values cached; `options` as the model's forward takes them."""
    with torch.inference_mode(), counted() as counter:
        model(**batch.to(model.device).inputs, use_cache=True, logits_to_keep=1, **options)
    decoder = text_decoder(model)
    name = next(name for name, module in model.named_modules() if module is decoder)
    of_decoder = counter.get_flop_counts()[f"{type(model).__name__}.{name}"]
    return Flops(counter.get_total_flops(), sum(of_decoder.values()))


def few_prompts(samples: Sequence[Sample], processor: Any, config: Any, number: int = COUNTED_SAMPLES) -> list[Batch]:
    """A few questions, evenly spread, one a batch, so that no padding is counted."""
    chosen = itertools.islice(spread(samples, number / len(samples)), number)
    return [make_batch([sample], processor, config) for sample in chosen]


def flops_of(model: Any, prompts: Sequence[Batch], ask: Ask | None, **given: Any) -> Flops:
    """Under a budget, or of the unrouted model (None). What it takes a rule to choose is not counted, the router is.

    Args:
        given: what `make_route` needs more.
    """
    total = Flops()
    for batch in prompts:
        if ask is None:
            options: dict[str, Any] = {"preset": "off"}
        elif ask.natural:
            options = {name: value for name, value in vars(ask.budget).items() if value is not None}
        else:
            options = {"route": make_route(model, batch, ask.budget, ask.rule, **given)}
        total += prefill_flops(model, batch, **options)
    return total
