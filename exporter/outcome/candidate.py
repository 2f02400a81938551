"""Candidates of a search: how many layers go, and what is done with what is left. Pure.

A mix is everything but the number of layers: healed or not, a router's share of visual tokens, int8 weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..plan import LayerBudget
from ..recipe import HealRecipe, Recipe, RouterRecipe
from .goal import SearchRecipe

TOKEN_SHARES = (0.5, 0.25)  # of the visual tokens, that a router keeps


@dataclass(frozen=True)
class Mix:
    """What is done with the layers that stay."""

    healed: bool = False
    tokens: float | None = None  # share of the visual tokens that a router keeps; None: no router
    int8: bool = False  # an ONNX folder with int8 weights

    @property
    def label(self) -> str:
        parts = [
            "healed" if self.healed else "",
            "" if self.tokens is None else f"{self.tokens:g} of the visual tokens",
            "int8 (ONNX)" if self.int8 else "",
        ]
        return ", ".join(filter(None, parts))

    @property
    def unhealed(self) -> Mix:
        """Return the mix that costs as much: healing changes weights alone."""
        return dataclasses.replace(self, healed=False)

    @property
    def number(self) -> int:
        """Return how many things are done: of two mixes that do the same the one with fewer is taken."""
        return self.healed + (self.tokens is not None) + self.int8


@dataclass(frozen=True)
class Candidate:
    """One model that may be made."""

    drop: int
    mix: Mix = Mix()

    @property
    def label(self) -> str:
        plural = "s" if self.drop > 1 else ""
        layers = f"{self.drop} layer{plural} gone" if self.drop else "all layers"
        return f"{layers}, {self.mix.label}" if self.mix.label else layers

    @property
    def slug(self) -> str:
        """Return its name as a file."""
        parts = [
            f"drop{self.drop}",
            "healed" if self.mix.healed else "",
            "" if self.mix.tokens is None else f"tokens{self.mix.tokens:g}",
            "int8" if self.mix.int8 else "",
        ]
        return "-".join(filter(None, parts))

    @property
    def is_original(self) -> bool:
        return not self.drop and self.mix == Mix()

    @property
    def before(self) -> Candidate | None:
        """Return the candidate that its folder is made from, which may be the original; None for the original."""
        mix = self.mix
        if mix.int8 or mix.tokens is not None:
            return Candidate(self.drop, Mix(healed=mix.healed))
        if mix.healed:
            return Candidate(self.drop)
        return Candidate(0) if self.drop else None

    @property
    def folder(self) -> str:
        """Return its folder's name: one with a router serves all shares of tokens."""
        return self.slug.replace(f"tokens{self.mix.tokens:g}", "routed") if self.mix.tokens is not None else self.slug

    @property
    def budget(self) -> dict[str, Any] | None:
        """Return the budget that it runs under, as `generate` takes it."""
        return None if self.mix.tokens is None else {"keep_visual_tokens": self.mix.tokens}

    def recipe(self, search: SearchRecipe) -> Recipe:
        """Return the recipe that `compress` makes its folder by; int8 weights are what `onnx` makes of it."""
        budget = LayerBudget(drop_layers=self.drop) if self.drop else LayerBudget(layers=())
        recipe = Recipe(search.model, search.calibration, budget, seed=search.seed)
        if self.mix.healed:
            calibration = None if search.heal_samples is None else search.heal_calibration
            recipe = dataclasses.replace(recipe, heal=HealRecipe(calibration=calibration))
        if self.mix.tokens is not None:
            router = RouterRecipe(calibration=search.calibration.unanswered, seed=search.seed)
            recipe = dataclasses.replace(recipe, router=router)
        return recipe


def mixes(available: tuple[str, ...]) -> tuple[Mix, ...]:
    """Return what is combined, those that do least first.

    Args:
        available: of EXTRAS, what this model and this machine take.
    """
    healed = (False, True) if "heal" in available else (False,)
    others: list[dict[str, Any]] = [{}]
    others += [{"int8": True}] if "int8" in available else []
    others += [{"tokens": share} for share in TOKEN_SHARES] if "router" in available else []
    return tuple(sorted((Mix(healed=h, **other) for h in healed for other in others), key=lambda mix: mix.number))
