"""Budgets, the router's settings, and the routes that come of them.

Shapes: B sequences, S tokens of a pass, K <= S tokens that stay, L layers, N of them that may be skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

FEWEST_JUDGED = 128  # questions to train on, of which one in eight is held out, for budgets by outcome
ROUTER_FORMAT = 2  # of how the router computes: weights of another would run, and choose badly


@dataclass(frozen=True)
class Budget:
    """A limit to what runs. None: no limit."""

    keep_visual_tokens: int | float | None = None  # a count for each sequence, or a share of what the sequence has
    keep_layers: int | None = None  # a count, of all decoder layers
    flops: float | None = None  # a share of the decoder's operations for this prompt; tokens and layers follow from it
    quality: float | None = None  # the share of answers that are to stay what they were; tokens follow from it

    def __post_init__(self) -> None:
        for limit in fields(self):
            object.__setattr__(self, limit.name, plain_number(getattr(self, limit.name)))

    @property
    def is_off(self) -> bool:
        counts = self.keep_visual_tokens is None and self.keep_layers is None
        return counts and self.quality is None and (self.flops is None or self.flops == 1)

    def check(self, settings: RouterSettings, num_layers: int) -> None:
        tokens, layers = self.keep_visual_tokens, self.keep_layers
        self._check_outcomes(settings)
        if tokens is not None:
            if isinstance(tokens, bool) or not isinstance(tokens, (int, float)):
                raise ValueError(f"keep_visual_tokens={tokens!r} is neither a count (144) nor a share (0.25).")
            if isinstance(tokens, float) and not 0 < tokens <= 1:
                raise ValueError(f"keep_visual_tokens={tokens} is no share: give a float in (0, 1], or a whole count.")
            if isinstance(tokens, int) and tokens < 1:
                raise ValueError(f"keep_visual_tokens={tokens} keeps nothing of the image: give 1 or more.")
        if layers is not None:
            free = len(settings.candidates)
            least = num_layers - free
            if isinstance(layers, bool) or not isinstance(layers, int) or not least <= layers <= num_layers:
                raise ValueError(
                    f"keep_layers={layers!r} is out of range: of the {num_layers} layers {free} may be skipped, so "
                    f"give a number from {least} to {num_layers}."
                )

    def _check_outcomes(self, settings: RouterSettings) -> None:
        """Check the shares of cost and of answers, which stand alone, and what they are computed from."""
        flops, quality = self.flops, self.quality
        counts = self.keep_visual_tokens is not None or self.keep_layers is not None
        if counts + (flops is not None) + (quality is not None) > 1:
            raise ValueError("give keep_visual_tokens and keep_layers, or flops, or quality: each of them is a budget.")
        if flops is not None and not (is_number(flops) and 0 < flops <= 1):
            raise ValueError(
                f"flops={flops!r} is no share of the decoder's operations: give a number above 0 and up to 1, 0.5 for "
                "half of them."
            )
        if quality is not None and not (is_number(quality) and 0 < quality < 1):
            raise ValueError(
                f"quality={quality!r} is no share of answers to keep: give a number between 0 and 1, such as 0.99."
            )
        name = "flops" if flops is not None else "quality"
        if (flops, quality) == (None, None) or flops == 1:
            return
        if {"flops": "front", "quality": "quality"}[name] not in settings.budgets:
            raise ValueError(
                f"{name}={getattr(self, name)} is computed from what was measured after training, and this router has "
                f"no such measurement: route it again with `lvlm-exporter route` and {FEWEST_JUDGED} questions or "
                "more, or give keep_visual_tokens and keep_layers."
            )
        if quality is not None and quality > (most := settings.budgets["quality"]["at"][-1][0]):
            raise ValueError(
                f"quality={quality} is above {most}, the most that {settings.budgets['quality']['answers']} held-out "
                "answers can tell of: route it again with more questions, or ask for less."
            )

    def tokens_of(self, available: Tensor) -> Tensor:
        """Return how many visual tokens each sequence keeps, of those it has: [B] -> [B]."""
        if self.keep_visual_tokens is None:
            return available
        if isinstance(self.keep_visual_tokens, int):
            return available.clamp(max=self.keep_visual_tokens)
        share = (available * self.keep_visual_tokens).round().long()
        return torch.minimum(share.clamp(min=1), available)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain_number(value: Any) -> Any:
    """Return a number of numpy or torch as one of Python, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


OFF = Budget()


@dataclass(frozen=True)
class RouterSettings:
    """The entry "router" of config.json."""

    drop_at: int  # visual tokens leave before this layer: 0 is before the first
    candidates: tuple[int, ...]  # layers that may be skipped, in the order of the layer logits
    bottleneck: int  # R
    num_heads: int
    read_at: int = 0  # the router reads the states that enter this layer
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    default: str = "off"  # the preset of a call that names no budget
    trained_for: dict[str, Any] = field(default_factory=dict)  # what the base model must be
    format: int = 1  # ROUTER_FORMAT of the file that it was trained with; settings of format 1 did not say so
    image_floor: float = 0.0  # no image keeps less than this share of an even one, nor nothing; 0: no floor
    budgets: dict[str, Any] = field(default_factory=dict)  # measured: "cost" and "front" for flops, "quality"

    @classmethod
    def of(cls, config: Any) -> RouterSettings:
        """Read and check them against the model that the rest of the configuration describes."""
        entry = getattr(config, "router", None)
        if not isinstance(entry, dict):
            raise ValueError("config.json has no entry 'router': this folder is a plain model, load its own class.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"config.json: router has no setting {unknown[0]!r}; it has: {', '.join(sorted(known))}.")
        settings = cls(**{**entry, "candidates": tuple(entry["candidates"])})
        settings._check(config)
        return settings

    def _check(self, config: Any) -> None:
        if self.format != ROUTER_FORMAT:
            raise ValueError(
                f"this router is of format {self.format}, this code runs format {ROUTER_FORMAT}: load the folder with "
                "its own modeling file (trust_remote_code=True), or train the router again."
            )
        here = base_model(config)
        for name, value in self.trained_for.items():
            if here.get(name) != value:
                raise ValueError(
                    f"this router was trained for another base model: {name} {value}, here it is {here.get(name)}."
                )
        num_layers = here["num_hidden_layers"]
        if not 0 <= self.read_at <= self.drop_at <= num_layers or self.read_at == num_layers:
            raise ValueError(
                f"router: read_at={self.read_at} and drop_at={self.drop_at} must be ordered and within the "
                f"{num_layers} layers: 0 <= read_at <= drop_at <= {num_layers}, and read_at below it."
            )
        if any(not self.read_at <= layer < num_layers for layer in self.candidates):
            raise ValueError(
                f"router: candidates {list(self.candidates)} must lie from layer read_at={self.read_at} to "
                f"{num_layers - 1}: a layer that has run cannot be skipped any more."
            )
        if self.budgets and len(self.budgets["cost"]["layers"]) != num_layers:
            raise ValueError(
                f"router: budgets.cost tells of {len(self.budgets['cost']['layers'])} layers, the model has "
                f"{num_layers}."
            )
        if not 0 <= self.image_floor <= 1:
            raise ValueError(f"router: image_floor={self.image_floor} is no share: give a number from 0 to 1.")
        if self.default not in {"off", *self.presets}:
            raise ValueError(f"router: the default preset {self.default!r} is not among {self.preset_names()}.")

    def preset(self, name: str) -> Budget:
        if name == "off":
            return OFF
        if name not in self.presets:
            raise ValueError(f"preset {name!r} is not known: this model has {self.preset_names()}.")
        return Budget(**self.presets[name])

    def preset_names(self) -> str:
        return ", ".join(["off", *self.presets])


def base_model(config: Any) -> dict[str, Any]:
    """Return the facts that tell one base model from another."""
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


@dataclass(frozen=True, eq=False)
class Route:
    """The tokens and layers that run. To impose one: `model.generate(**inputs, route=Route(keep, layers))`.

    One made by hand needs `keep` or `layers` only; None keeps everything. It may let visual tokens leave before another
    layer than the router's: rules that read attention know what to keep only after the first layers have run.
    """

    keep: Any = None  # Tensor [B, S] False: a visual token that leaves at layer drop_at
    layers: Any = None  # Tensor [B, L] False: a layer that the sequence skips
    visual: Any = None  # Tensor [B, S] True: a visual token
    coordinates: Any = None  # Tensor [B, S, 3] of visual tokens: number of the image, row and column in it, from 0 to 1
    token_logits: Tensor | None = None  # [B, S]
    layer_logits: Tensor | None = None  # [B, N]
    drop_at: int | None = None  # visual tokens leave before this layer; None: where the settings say

    @classmethod
    def of_text(cls, tokens: Tensor, num_layers: int) -> Route:
        """Make the route of text alone [B, S]: all of it."""
        everything = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        layers = everything.new_ones(len(tokens), num_layers)
        return cls(everything, layers, ~everything, coordinates=torch.zeros(*tokens.shape, 3, device=tokens.device))

    def kept_tokens(self) -> list[Tensor]:
        """Return for each sequence which of its visual tokens are kept: 0 is the first of the first image."""
        return [keep[visual].nonzero()[:, 0] for keep, visual in zip(self.keep, self.visual, strict=True)]

    def kept_coordinates(self) -> list[Tensor]:
        """Return for each sequence the patch coordinates of its visual tokens that stay: [K, 3] each."""
        return [p[k & v] for p, k, v in zip(self.coordinates, self.keep, self.visual, strict=True)]

    def executed_layers(self) -> list[list[int]]:
        return [runs.nonzero()[:, 0].tolist() for runs in self.layers]

    def select(self, chosen: Tensor) -> Route:
        """Return the route of a batch made of the chosen sequences."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {k: v[chosen.to(v.device)] if isinstance(v, Tensor) else v for k, v in parts.items()}
        return replace(self, **parts)

    def for_sequences(self, num_sequences: int) -> Route:
        """Return the route for a batch in which each sequence was repeated, as for beams."""
        routed = next(len(part) for part in (self.keep, self.layers) if part is not None)
        if num_sequences % routed:
            raise ValueError(f"the route given is for {routed} sequences, the batch has {num_sequences}.")
        if routed == num_sequences:
            return self
        return self.select(torch.arange(routed).repeat_interleave(num_sequences // routed))
