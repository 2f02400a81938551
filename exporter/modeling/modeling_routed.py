"""LVLMs that run with fewer visual tokens and fewer layers, chosen for each question by a small router.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs, keep_visual_tokens=144, keep_layers=28)
    model.generate(**inputs, preset="fast")  # or once for all: model.set_budget("fast")

The classes that this file makes are those of transformers with three additions, in the order of the file: a router
that scores visual tokens and layers (after "PAR", Pruning All-Rounder, ICCV 2025), a key-value cache that stores less
than it speaks of, and decoder layers that run on what is left. The weights of the LVLM lie where they always lie, those
of the router in router/model.safetensors: loaded without this file, the folder is the plain model.

How a question runs. The router reads the states that enter layer `read_at`: visual tokens, text, and one embedding for
each layer that may be skipped. Its scores and the budget make a route, which holds for the whole answer. From layer
`drop_at` on, the visual tokens that were not kept (and padding) are gone from the hidden states, positions, masks and
the cache; what is left keeps its position. A layer that some rows of a batch skip runs for the others only, with cache
entries for them only. Everything outside the decoder still sees sequences of the original length: the cache reports
it, masks are made for it and narrowed here, and the last hidden state is spread out to it again.

Later turns on the same cache: the layers stay as they were chosen first; the visual tokens that a turn brings are
scored among themselves, under the budget of that call.

Shapes: B rows, S tokens of a pass, K <= S tokens that stay, P entries of a layer's cache, L layers, N of them that may
be skipped, D hidden size, R width of the router, H heads.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file  # transformers cannot do without it either
from torch import Tensor, nn
from torch.nn import functional as F

TESTED = ("5.20.0", "5.23.0", "5.24.0")  # releases of transformers that all tests of these files have run on
INSTALL = "pip install 'transformers>=5.20,<5.25'"


def unsupported(reason: str) -> str:
    """Say in one sentence why this transformers cannot run the checkpoint, and what to do."""
    return (
        f"This checkpoint's modeling files do not understand transformers {transformers.__version__}: {reason}. They "
        f"were tested with transformers {', '.join(TESTED)}. Install one of these ({INSTALL}), or load the folder "
        "without trust_remote_code=True, as the plain model."
    )


try:
    from transformers.cache_utils import (
        Cache,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticCache,
        StaticLayer,
        StaticSlidingWindowLayer,
    )
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.utils import cached_file, logging
except ImportError as error:
    raise ImportError(unsupported(str(error).split(" (")[0])) from None

logger = logging.get_logger(__name__)
ROUTER_FILE = "router/model.safetensors"
ROUTER_FORMAT = 2  # of how the router computes: weights of another would run, and choose badly
IGNORED_LABEL = -100
END_OF_IMAGE = 2  # tokens that may follow an image and ask nothing: its end, a line break
GRIDS = ("image_grid_thw", "video_grid_thw", "image_sizes")  # inputs that say how visual tokens lie in their images


# --- what these files rest on in transformers beyond its documented interface, each with a probe ---------------------

CACHE_NAMES = ("cache", "past_key_values")  # the cache's argument since 5.24, and before; of both, the first counts
DECODER_TAKES = frozenset(
    "input_ids attention_mask position_ids inputs_embeds use_cache visual_pos_masks deepstack_visual_embeds".split()
).union(CACHE_NAMES)
DECODER_NEEDS = frozenset({"attention_mask", "inputs_embeds", "use_cache"})
LAYER_TAKES = frozenset("hidden_states attention_mask position_ids position_embeddings use_cache".split()).union(
    CACHE_NAMES
)
LAYER_NEEDS = frozenset({"hidden_states", "attention_mask", "position_ids", "position_embeddings"})
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")  # arguments that say where packed sequences end


def _dynamic_caches_grow() -> bool:
    """A dynamic cache has layers, whose keys and values [B, H, P, D] grow; the cache tells masks how long they are."""
    cache, states = DynamicCache(), torch.zeros(2, 1, 3, 4)
    keys, _ = cache.update(states, states, 0)
    layer = cache.layers[0]
    grown = type(layer) is DynamicLayer and layer.is_initialized and keys.shape == layer.keys.shape == states.shape
    return grown and cache.get_seq_length() == 3 and tuple(cache.get_mask_sizes(2, 0)) == (5, 0)


def _dynamic_layers_are_filled_by_hand() -> bool:
    layer, states = DynamicLayer(), torch.zeros(2, 1, 3, 4)
    layer.lazy_initialization(states, states)
    layer.keys = layer.values = states
    layer.crop(-1)
    return layer.is_initialized and layer.keys.shape[2] == layer.get_seq_length() == 2


def _sliding_layers_say_how_far() -> bool:
    layer = DynamicSlidingWindowLayer(sliding_window=4)
    return layer.sliding_window == 4 and layer.record_past is False and not layer.is_initialized


def _static_layers_count() -> bool:
    """A static layer is as long as it will ever be, and writes its next entry where it has counted to."""
    layer, states = StaticLayer(8), torch.zeros(2, 1, 3, 4)
    keys, _ = layer.update(states, states)
    return layer.max_cache_len == keys.shape[2] == 8 and int(layer.get_seq_length()) == 3


def _caches_are_asked_by_these_names() -> bool:
    """What the routed caches answer in place of transformers' own."""
    asked = {
        "get_seq_length": ["layer_idx"],
        "get_mask_sizes": ["query_length", "layer_idx"],
        "reorder_cache": ["beam_idx"],
        "batch_select_indices": ["indices"],
        "batch_repeat_interleave": ["repeats"],
        "activate_past_recording": [],
        "crop": None,  # what it takes is a negative number of tokens, by position
        "reset": [],
    }
    return all(
        names in (None, [*inspect.signature(getattr(Cache, method)).parameters][1:]) for method, names in asked.items()
    )


def _hub_names_are_registered() -> bool:
    parameters = [inspect.signature(register_checkpoint_conversion_mapping).parameters]
    return "overwrite" in parameters[0] and callable(get_checkpoint_conversion_mapping)


PROBES: dict[str, Callable[[], bool]] = {
    "DynamicCache.layers and get_mask_sizes": _dynamic_caches_grow,
    "DynamicLayer.lazy_initialization, keys, values and crop": _dynamic_layers_are_filled_by_hand,
    "DynamicSlidingWindowLayer.sliding_window and record_past": _sliding_layers_say_how_far,
    "StaticLayer.max_cache_len and update": _static_layers_count,
    "the methods of Cache": _caches_are_asked_by_these_names,
    "register_checkpoint_conversion_mapping": _hub_names_are_registered,
}


def check_transformers(decoder: Any) -> None:
    """Refuse a transformers whose caches, decoder or decoder layers do not work as these files take them to.

    Args:
        decoder: a text model of transformers, not yet routable.

    Raises:
        ValueError: one sentence that names what is not understood.
    """
    with torch.device("cpu"):  # also while a model is made on meta
        for name, probe in PROBES.items():
            try:
                reason = "" if probe() else f"{name} work in another way"
            except Exception as error:
                reason = f"{name} work in another way ({type(error).__name__}: {error})"
            if reason:
                raise ValueError(unsupported(reason))
    check_forward(type(decoder), DECODER_TAKES, DECODER_NEEDS)
    for layer_class in {type(layer): None for layer in decoder.layers}:
        check_forward(layer_class, LAYER_TAKES, LAYER_NEEDS)


def check_forward(module_class: Any, known: frozenset[str], needed: frozenset[str]) -> None:
    """Refuse a forward with an argument that is not known, or without one that is needed."""
    parameters = inspect.signature(module_class.forward).parameters
    named = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD][1:]
    where = f"{module_class.__name__}.forward"
    if others := [name for name in named if name not in known]:
        raise ValueError(unsupported(f"{where} takes an argument that they do not know, {others[0]!r}"))
    if missing := sorted(needed - set(named)):
        raise ValueError(unsupported(f"{where} has no argument {missing[0]!r}"))
    if not any(name in named for name in CACHE_NAMES):
        raise ValueError(unsupported(f"{where} takes no cache by the name of {' or '.join(CACHE_NAMES)}"))
    if len(named) == len(parameters) - 1:
        raise ValueError(unsupported(f"{where} hands on no further keywords"))


def cache_name(forward: Any) -> str:
    """Return the name by which a forward of the transformers that is installed takes its cache."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_in(named: dict[str, Any]) -> Any:
    """Return the cache among keyword arguments, whichever its name; None if there is none."""
    return next((named[name] for name in CACHE_NAMES if name in named), None)


def with_cache_as(name: str, named: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the cache under one name: releases ignore it under the other, or warn."""
    if not any(other in named for other in CACHE_NAMES if other != name):
        return named
    cache = cache_in(named)
    return {key: value for key, value in named.items() if key not in CACHE_NAMES} | {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output holds, whichever its name; None without one."""
    return next((getattr(output, name) for name in CACHE_NAMES if getattr(output, name, None) is not None), None)


@functools.cache
def checkpointing_spares_caches() -> bool:
    """Tell whether layers with gradient checkpointing keep their cache in passes without a gradient: since 5.24."""

    class Probe(GradientCheckpointingLayer):
        def forward(self, states: Any, **keywords: Any) -> dict[str, Any]:
            return keywords

    probe = Probe()
    probe.gradient_checkpointing, probe._gradient_checkpointing_func = True, lambda run, *args: run(*args)
    with torch.no_grad():
        return all(probe(None, **{name: True})[name] for name in CACHE_NAMES)


def uses_flash_attention(config: Any) -> bool:
    return "flash" in str(getattr(config, "_attn_implementation", None))


# --- what is asked for: budgets and settings --------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How much may run. None: all of it."""

    keep_visual_tokens: int | float | None = None  # a count for each row, or a share of what the row has
    keep_layers: int | None = None  # a count, of all decoder layers

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, plain_number(getattr(self, one.name)))

    @property
    def is_off(self) -> bool:
        return self.keep_visual_tokens is None and self.keep_layers is None

    def check(self, settings: RouterSettings, num_layers: int) -> None:
        tokens, layers = self.keep_visual_tokens, self.keep_layers
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

    def tokens_of(self, available: Tensor) -> Tensor:
        """How many visual tokens each row keeps, of those it has: [B] -> [B]."""
        if self.keep_visual_tokens is None:
            return available
        if isinstance(self.keep_visual_tokens, int):
            return available.clamp(max=self.keep_visual_tokens)
        share = (available * self.keep_visual_tokens).round().long()
        return torch.minimum(share.clamp(min=1), available)


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

    @classmethod
    def of(cls, config: Any) -> RouterSettings:
        """Read and check them against the model that the rest of the configuration describes."""
        given = getattr(config, "router", None)
        if not isinstance(given, dict):
            raise ValueError("config.json has no entry 'router': this folder is a plain model, load its own class.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"config.json: router has no setting {unknown[0]!r}; it has: {', '.join(sorted(known))}.")
        settings = cls(**{**given, "candidates": tuple(given["candidates"])})
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
    """What tells one base model from another."""
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }


@dataclass(frozen=True, eq=False)
class Route:
    """What runs, for one pass over a prompt. To impose one: `model.generate(**inputs, route=Route(keep, layers))`.

    One made by hand needs `keep` or `layers` only; None keeps everything. It may let visual tokens leave before another
    layer than the router's: rules that read attention know what to keep only after the first layers have run.
    """

    keep: Any = None  # Tensor [B, S] False: a visual token that leaves at layer drop_at
    layers: Any = None  # Tensor [B, L] False: a layer that the row skips
    visual: Any = None  # Tensor [B, S] True: a visual token
    places: Any = None  # Tensor [B, S, 3] of visual tokens: number of the image, row and column in it, from 0 to 1
    token_logits: Tensor | None = None  # [B, S]
    layer_logits: Tensor | None = None  # [B, N]
    drop_at: int | None = None  # visual tokens leave before this layer; None: where the settings say

    def kept_tokens(self) -> list[Tensor]:
        """For each row, which of its visual tokens stay, counted among them: 0 is the first of the first image."""
        return [keep[visual].nonzero()[:, 0] for keep, visual in zip(self.keep, self.visual, strict=True)]

    def kept_places(self) -> list[Tensor]:
        """For each row, image number, row and column (0 to 1) of the visual tokens that stay: [K, 3] each."""
        return [p[k & v] for p, k, v in zip(self.places, self.keep, self.visual, strict=True)]

    def executed_layers(self) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in self.layers]

    def select(self, chosen: Tensor) -> Route:
        """The route of a batch made of the chosen rows."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {k: v[chosen.to(v.device)] if isinstance(v, Tensor) else v for k, v in parts.items()}
        return replace(self, **parts)

    def for_rows(self, num_rows: int) -> Route:
        """The route for a batch in which each row was repeated, as for beams."""
        own = next(len(part) for part in (self.keep, self.layers) if part is not None)
        if num_rows % own:
            raise ValueError(f"the route given is for {own} rows, the batch has {num_rows}.")
        return self if own == num_rows else self.select(torch.arange(own).repeat_interleave(num_rows // own))


# --- the router -------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Scores visual tokens and layers: one bidirectional block over [tokens; layers], narrower than the LVLM.

    Visual tokens see the question and each other, layers see both. The order of the words is known by rotary
    embeddings (which padding does not shift), the place of a visual token by its row and column in the image. A layer
    begins as its embedding and what is asked, so that it need not find the question among the visual tokens first.
    """

    OCTAVES = 6  # of the sines that tell rows and columns apart: down to 1/64 of an image's side

    def __init__(self, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__()
        width = settings.bottleneck
        if width % (2 * settings.num_heads):
            raise ValueError(f"router: bottleneck={width} is no multiple of twice num_heads={settings.num_heads}.")
        self.num_heads = settings.num_heads
        self.num_candidates = len(settings.candidates)
        self.input_norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, width)
        self.kind = nn.Embedding(2, width)  # text, visual
        self.place = nn.Linear(4 * self.OCTAVES, width, bias=False)
        self.layer = nn.Embedding(max(1, self.num_candidates), width)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.token_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.layer_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(
        self, states: Tensor, visual: Tensor, visible: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits, higher is more needed; those at text tokens mean nothing. Differentiable in the router's weights.

        Args:
            states: [B, S, D] what enters layer `read_at`.
            visual: [B, S] True at visual tokens.
            visible: [B, S] False at padding, and at answer tokens, which no question comes with.
            places: [B, S, 3] image number, row and column of each visual token, as `places_of` has them.

        Returns:
            Token logits [B, S] and layer logits [B, N], float32.
        """
        states, visual, visible = self._here(states), self._here(visual), self._here(visible)
        x = self.down(self.input_norm(states)) + self.kind(visual.long())  # [B, S, R]
        if places is not None:
            places = self._here(places)
            x = x + self.place(waves(places[..., 1:], self.OCTAVES).to(x.dtype)) * visual[..., None]
        numbers = torch.arange(self.num_candidates, device=x.device)
        layers = self.layer(numbers).to(x.dtype) + asked(x, visible, visual)[:, None]  # [B, N, R]
        x = torch.cat([x, layers], 1)  # [B, S + N, R]
        x = x + self._attend(self.attention_norm(x), visible)
        x = x + self.mlp(self.mlp_norm(x))
        tokens, layers = x.split([states.shape[1], self.num_candidates], 1)
        return self.token_head(tokens)[..., 0].float(), self.layer_head(layers)[..., 0].float()

    def _here(self, tensor: Tensor) -> Tensor:
        """On the router's device and, if floating, in its dtype. Weights on meta are offloaded: a hook moves inputs."""
        own = next(self.parameters())
        tensor = tensor if own.is_meta else tensor.to(own.device)
        return tensor.to(own.dtype) if tensor.is_floating_point() else tensor

    def _attend(self, x: Tensor, visible: Tensor) -> Tensor:
        """Everything sees every visible token and every layer: [B, S + N, R] -> [B, S + N, R]."""
        order = visible.long().cumsum(1)  # counts what is visible, so that padding shifts nothing
        order = F.pad(order, (0, self.num_candidates))  # layers have no place in the text: 0
        seen = F.pad(visible, (0, self.num_candidates), value=True)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, S + N, R / H]
        q, k = rotated(q, order), rotated(k, order)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
        return self.out(x.transpose(1, 2).flatten(2))


def asked(x: Tensor, visible: Tensor, visual: Tensor) -> Tensor:
    """What a question says: its last token, which has seen all others, and the mean of its text, [B, R]."""
    order = visible.long().cumsum(1)
    last = visible & (order == order[:, -1:])
    text = (visible & ~visual).to(x.dtype)
    mean = text / text.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bs,bsr->br", last.to(x.dtype) + mean, x)


def rotated(x: Tensor, order: Tensor) -> Tensor:
    """Rotary position embedding: x [B, H, S, C], order [B, S]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = order[:, None, :, None] * frequency  # [B, 1, S, C / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def waves(coordinates: Tensor, octaves: int) -> Tensor:
    """Sines and cosines of rising frequency: [..., 2] in 0 to 1 -> [..., 4 * octaves]."""
    angle = coordinates[..., None] * math.pi * 2.0 ** torch.arange(octaves, device=coordinates.device)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def best_tokens(
    logits: Tensor, visual: Tensor, budget: Budget, patches: Tensor | None = None, image_floor: float = 0.0
) -> Tensor:
    """Keep each row's highest visual tokens, as many as the budget says, and all text: [B, S] bool.

    By logits, not by their sigmoids, which saturate to ties.

    Args:
        patches: [B, S, 3] image number, row and column of the visual tokens; needed for a floor only.
        image_floor: `RouterSettings.image_floor`.
    """
    ranked = logits.masked_fill(~visual, -math.inf).argsort(dim=1, descending=True, stable=True)
    count = budget.tokens_of(visual.sum(1))  # [B]
    if image_floor and patches is not None:
        ranked = floors_first(ranked, visual, patches[..., 0].to(visual.device), count, image_floor)
    first = torch.arange(logits.shape[1], device=logits.device) < count[:, None]
    return torch.zeros_like(visual).scatter(1, ranked, first) | ~visual


def floors_first(ranked: Tensor, visual: Tensor, images: Tensor, count: Tensor, image_floor: float) -> Tensor:
    """Put the best tokens of each image before all others, so that no image of a row is starved.

    Of `count` tokens, each of M images has a floor of `image_floor * count / M` tokens, rounded down, at least one.
    Where there are more images than tokens, those with the highest best token get one.

    Args:
        ranked: [B, S] indices of the tokens, the best first, text last.
        images: [B, S] number of each visual token's image, from 0.
    """
    images = torch.where(visual, images.long(), images.new_full((), -1, dtype=torch.long))
    number = images.amax(1) + 1  # [B]
    least = (count * image_floor / number.clamp(min=1)).floor().long().clamp(min=1)
    place = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    image = images.gather(1, ranked)
    grouped = image.argsort(dim=1, stable=True)  # image by image, the best of each first
    image = image.gather(1, grouped)
    starts = F.pad(image[:, 1:] != image[:, :-1], (1, 0), value=True)
    rank = place - torch.where(starts, place, 0).cummax(1).values  # within the image
    floor = torch.zeros_like(visual).scatter(1, grouped, (rank < least[:, None]) & (image >= 0))  # in ranked order
    return ranked.gather(1, (~floor).byte().argsort(dim=1, stable=True))


def best_layers(logits: Tensor, settings: RouterSettings, keep_layers: int | None, num_layers: int) -> Tensor:
    """Skip each row's lowest candidates until `keep_layers` are left: [B, N] -> [B, L] bool."""
    layers = torch.ones(len(logits), num_layers, dtype=torch.bool, device=logits.device)
    skipped = 0 if keep_layers is None else num_layers - keep_layers
    if skipped:
        lowest = logits.argsort(dim=1, stable=True)[:, :skipped]
        candidates = torch.tensor(settings.candidates, device=logits.device)
        layers.scatter_(1, candidates[lowest], False)
    return layers


# --- where visual tokens lie in their images --------------------------------------------------------------------------


def places_of(config: Any, visual: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Image number, row and column of each visual token, [B, S, 3]; zero at text.

    Visual tokens come in runs, one or more an image. The grids are read from the inputs where they hold them
    (`image_grid_thw`, `image_sizes`); a run that is one square, or several squares of `image_seq_length`, is taken as
    such. In other runs the row is how far the token is in the run and the column is the middle.
    """
    runs = runs_of(visual)
    places = torch.zeros(*visual.shape, 3)
    shapes = run_shapes(config, [end - start for _, start, end in runs], inputs)
    number, previous = -1, None
    for (row, start, end), shape in zip(runs, shapes, strict=True):
        if shape.first_of_image:
            number = 0 if row != previous else number + 1
            previous = row
        places[row, start:end] = F.pad(shape.coordinates(end - start), (1, 0), value=number)
    return places.to(visual.device)


def part_of(places: Tensor, past: int, visual: Tensor) -> Tensor:
    """Of places for the whole text [B, T, 3] those of a pass, zero for what was generated since: [B, S, 3]."""
    end = past + visual.shape[1]
    return F.pad(places, (0, 0, 0, max(0, end - places.shape[1])))[:, past:end]


def runs_of(visual: Tensor) -> list[tuple[int, int, int]]:
    """Row, start and end of each run of True in [B, S], in order."""
    edges = F.pad(visual.cpu().byte(), (1, 1)).diff(dim=1).nonzero().tolist()  # one at each start, one at each end
    return [(row, start, end) for (row, start), (_, end) in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class RunShape:
    """How a run of visual tokens lies in an image: tiles of rows and columns one after the other.

    In LLaVA-NeXT and its kin one coarse tile is followed by a finer grid over the same image, whose rows each end with
    a token that only says so: its place is the right edge.
    """

    height: int
    width: int
    top: float = 0.0  # where the run begins in its image, and how much of it it covers, from 0 to 1
    share: float = 1.0
    first_of_image: bool = True
    finer: tuple[int, int] | None = None  # rows and columns of the finer grid, line ends not counted

    @property
    def length(self) -> int:
        rows, columns = self.finer or (0, 0)
        return self.height * self.width + rows * (columns + 1)

    def coordinates(self, length: int) -> Tensor:
        """The middle of each token, [length, 2]. What comes after whole tiles is not known to be a grid."""
        tile = self.height * self.width
        rows = (torch.arange(self.height) + 0.5) / self.height * self.share + self.top
        columns = (torch.arange(self.width) + 0.5) / self.width
        grid = torch.cartesian_prod(rows, columns)  # [tile, 2]
        if self.finer is not None:
            rows = (torch.arange(self.finer[0]) + 0.5) / self.finer[0]
            columns = F.pad((torch.arange(self.finer[1]) + 0.5) / self.finer[1], (0, 1), value=1.0)
            return torch.cat([grid, torch.cartesian_prod(rows, columns)])
        tiles = length // tile
        rest = (torch.arange(length - tiles * tile) + 0.5) / max(1, length - tiles * tile)
        return torch.cat([grid.repeat(tiles, 1), torch.stack([rest, torch.full_like(rest, 0.5)], 1)])


def run_shapes(config: Any, lengths: list[int], inputs: dict[str, Any]) -> list[RunShape]:
    """The shape of each run, by what the inputs say of the images, and by the run's length where they say nothing."""
    vision = config.vision_config
    known: list[RunShape] = []
    if (grids := inputs.get("image_grid_thw")) is not None and inputs.get("video_grid_thw") is None:
        merge = vision.spatial_merge_size
        known = [RunShape(h // merge, w // merge) for _, h, w in grids.tolist()]
    elif getattr(vision, "model_type", None) == "pixtral" and (sizes := inputs.get("image_sizes")) is not None:
        side = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        for h, w in torch.as_tensor(sizes).tolist():  # a run is one row of patches, then comes [IMG_BREAK]
            count = int(h) // side
            known += [RunShape(1, int(w) // side, row / count, 1 / count, row == 0) for row in range(count)]
    elif getattr(config, "image_grid_pinpoints", None) and (sizes := inputs.get("image_sizes")) is not None:
        counts = inputs.get("batch_num_images")  # LLaVA-OneVision's: several images are not cut into tiles
        alone = [n == 1 for n in counts.tolist() for _ in range(n)] if counts is not None else [True] * len(sizes)
        known = [any_resolution_shape(config, *of) for of in zip(torch.as_tensor(sizes).tolist(), alone, strict=True)]
    if [shape.length for shape in known] == lengths:
        return known
    return [guessed_shape(config, length) for length in lengths]


def any_resolution_shape(config: Any, size: list[int], tiled: bool = True) -> RunShape:
    """LLaVA-NeXT's and LLaVA-OneVision's: the whole image in one tile, then tiles of which padding is cut off again.

    Args:
        size: height and width of the image in pixels.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if not tiled:
        return RunShape(side, side, finer=(1, 0))
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    padded = torch.empty(1, down * side, across * side, device="meta")
    rows, columns = unpad_image(padded, size).shape[1:]
    if limit := str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_"):  # LLaVA-OneVision's
        ratio = math.sqrt(rows * columns / (int(limit) * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return RunShape(side, side, finer=(rows, columns))


def guessed_shape(config: Any, length: int) -> RunShape:
    """Square tiles of the size that the configuration speaks of, or one square; else one token a row."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size if isinstance(getattr(vision, "image_size", None), int) else 0
    for tile in (getattr(config, "image_seq_length", 0), side * side, length):
        if 1 < tile <= length and math.isqrt(tile) ** 2 == tile:
            return RunShape(math.isqrt(tile), math.isqrt(tile))
    return RunShape(length, 1)


# --- the cache: short inside, of the original length outside ----------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """Which tokens a layer's cache holds: entry p of row b is token index[b, p] of the text, if it is valid.

    A row with fewer tokens than the longest has entries that are not valid, in front.
    """

    index: Tensor  # [B, P]
    valid: Tensor  # [B, P]
    all_valid: bool
    newest: list[int]  # [P] highest valid index of each column, on the host: what sliding windows have passed

    @classmethod
    def counted(cls, start: int, end: int, num_rows: int, device: torch.device) -> Entries:
        """All tokens from start to end."""
        index = torch.arange(start, end, device=device).expand(num_rows, -1)
        return cls(index, torch.ones_like(index, dtype=torch.bool), True, list(range(start, end)))

    def followed_by(self, other: Entries) -> Entries:
        return Entries(
            torch.cat([self.index, other.index.to(self.index.device)], 1),
            torch.cat([self.valid, other.valid.to(self.valid.device)], 1),
            self.all_valid and other.all_valid,
            self.newest + other.newest,
        )

    def part(self, start: int, end: int | None = None) -> Entries:
        part = slice(start, end)
        return Entries(self.index[:, part], self.valid[:, part], self.all_valid, self.newest[part])

    def select(self, chosen: Tensor) -> Entries:
        chosen = chosen.to(self.index.device)
        return replace(self, index=self.index[chosen], valid=self.valid[chosen])


Group = tuple[bool, int | None]  # layers whose caches hold the same tokens: after drop_at?, sliding window


class _RoutedCache(Cache):
    """What both kinds of cache share. Lengths are those of the text, as if nothing had been dropped or skipped.

    A cache is taken over where it is, because `generate` and its callers hold on to the object: `take_over` gives a
    cache of transformers this class.
    """

    whole_rows = False  # True: a layer stores all rows as soon as one of them runs it

    route: Any  # Route of the first routed pass, whose layers hold for all later ones; None before it
    seen: int  # tokens of the text so far
    entries: dict[Group, Entries]  # a group that is not here holds all tokens
    rows: list[tuple[int, ...] | None]  # per layer, the rows that run it, None for all
    windows: list[int | None]  # per layer
    recording: bool  # assisted decoding may take tokens back: windows are not cut

    def _begin(self, seen: int) -> None:
        self.route, self.seen, self.entries, self.recording = None, seen, {}, False
        self.rows, self.windows = [None] * len(self.layers), [None] * len(self.layers)

    def hold(self, route: Route, rows: list[tuple[int, ...] | None]) -> None:
        """Follow a route from now on. Of earlier turns, layers keep the entries of the rows that go on using them."""
        self.route, self.rows = route, list(rows)
        for layer, chosen in zip(self.layers, rows, strict=True):
            if chosen is not None and not self.whole_rows:
                take_rows(layer, torch.tensor(chosen, dtype=torch.long))

    def extend(self, entries: dict[Group, Entries], num_tokens: int, drop_at: int) -> None:
        """Note what a pass over `num_tokens` tokens has added."""
        self.entries, self.seen = entries, self.seen + num_tokens
        if not self.recording:
            self._slide(drop_at)

    def _slide(self, drop_at: int) -> None:
        """Forget the entries that no row's sliding window will see again."""
        for group, entries in list(self.entries.items()):
            if group[1] is None:
                continue
            passed = sum(newest <= self.seen - group[1] for newest in entries.newest)
            self.entries[group] = entries.part(passed)
            for layer_idx, layer in enumerate(self.layers):
                if layer.is_initialized and self.group(layer_idx, drop_at) == group:
                    layer.keys, layer.values = layer.keys[:, :, passed:], layer.values[:, :, passed:]

    def group(self, layer_idx: int, drop_at: int) -> Group:
        return layer_idx >= drop_at, self.windows[layer_idx]

    def select_rows(self, chosen: Tensor) -> None:
        """Make this the cache of a batch of the chosen rows, in the order given."""
        self.entries = {group: entries.select(chosen) for group, entries in self.entries.items()}
        self.route = self.route and self.route.select(chosen)
        for layer_idx, (layer, rows) in enumerate(zip(self.layers, self.rows, strict=True)):
            if rows is None:
                take_rows(layer, chosen)
                continue
            stored = {row: place for place, row in enumerate(rows)}
            places = [stored.get(row) for row in chosen.tolist()]
            self.rows[layer_idx] = tuple(row for row, place in enumerate(places) if place is not None)
            there = torch.tensor([place for place in places if place is not None], dtype=torch.long)
            take_rows(layer, chosen if self.whole_rows else there)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self.route.layers)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number); not those of a routed prompt, some of which are not there."""
        count = -tokens_to_remove
        for entries in self.entries.values():
            last = torch.arange(self.seen - count, self.seen, device=entries.index.device)
            if entries.index.shape[1] < count or bool(
                (entries.index[:, entries.index.shape[1] - count :] != last).any()
            ):
                raise ValueError(
                    f"the last {count} tokens are not all in the cache: a routed prompt cannot be cropped."
                )
        for layer in self.layers:
            if layer.is_initialized:
                layer.crop(tokens_to_remove)
        self.seen -= count
        self.entries = {group: entries.part(0, len(entries.newest) - count) for group, entries in self.entries.items()}

    def activate_past_recording(self) -> None:
        self.recording = True

    def reset(self) -> None:
        super().reset()
        windows = self.windows
        self._begin(seen=0)
        self.windows = windows


class RoutedCache(_RoutedCache, DynamicCache):
    """Grows as it is filled. A layer has entries only of the rows that run it and of the tokens that reach it."""

    @classmethod
    def take_over(cls, cache: DynamicCache, num_layers: int) -> RoutedCache:
        if others := {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ValueError(f"a cache with layers of type {others.pop().__name__} cannot hold a route.")
        seen = cache.get_seq_length()
        cache.layers += [DynamicLayer() for _ in range(num_layers - len(cache.layers))]
        cache.__class__ = cls
        cache._begin(seen)
        for layer_idx, layer in enumerate(cache.layers):
            if type(layer) is DynamicSlidingWindowLayer:  # it counts entries; here tokens count, and `_slide` cuts
                cache.recording |= layer.record_past
                cache.windows[layer_idx] = layer.sliding_window
                cache.layers[layer_idx] = whole = DynamicLayer()
                if layer.is_initialized:
                    whole.lazy_initialization(layer.keys, layer.values)
                    whole.keys, whole.values = layer.keys, layer.values
        return cache

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0


class RoutedStaticCache(_RoutedCache, StaticCache):
    """Of fixed size. Dropped tokens take no place in it, skipped layers none if all rows skip them."""

    whole_rows = True

    @classmethod
    def take_over(cls, cache: StaticCache, num_layers: int) -> RoutedStaticCache:
        seen = int(cache.get_seq_length())
        whole = [layer for layer in cache.layers if type(layer) is StaticLayer]
        if not whole or any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise ValueError(f"a static cache of {', '.join(kinds)} cannot hold a route; use a dynamic one.")
        if seen and len(whole) < len(cache.layers):
            raise ValueError("a static cache with sliding windows cannot be routed after its first turn.")
        size = whole[0].max_cache_len
        cache.layers = [layer if type(layer) is StaticLayer else StaticLayer(size) for layer in cache.layers]
        cache.__class__ = cls
        cache._begin(seen)
        return cache

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].max_cache_len, 0


def take_rows(layer: Any, chosen: Tensor) -> None:
    """Keep the chosen rows of a layer's keys and values."""
    if layer.is_initialized:
        chosen = chosen.to(layer.keys.device)
        layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]


def routed_cache(cache: Any, num_layers: int) -> RoutedCache | RoutedStaticCache:
    """The cache itself, able to hold a route."""
    if isinstance(cache, _RoutedCache):
        return cache
    if type(cache) is DynamicCache:
        return RoutedCache.take_over(cache, num_layers)
    if type(cache) is StaticCache:
        return RoutedStaticCache.take_over(cache, num_layers)
    raise ValueError(f"a {type(cache).__name__} cannot hold a route: use a dynamic or static cache, or preset='off'.")


# --- one pass through the decoder -------------------------------------------------------------------------------------


@dataclass
class Request:
    """What the model hands its decoder for one pass, and what it gets back."""

    router: Any  # Router
    settings: RouterSettings
    budget: Budget
    visual: Any  # Tensor [B, S] True at visual tokens, None if the pass has none
    deepstack: int = 0  # after that many layers the decoder itself adds visual features to the states
    imposed: Route | None = None
    hidden: Tensor | None = None  # [B, S] tokens that the router must not see: answers
    labels: Tensor | None = None  # [B, S] a copy of ours
    places: Any = None  # Tensor [B, S, 3]
    run: bool = True  # False: only up to the router
    route: Any = None  # result: a Route
    router_inputs: Any = None  # result, if not run: RouterInputs

    def check_reached(self) -> None:
        """Refuse a model that has kept the request from its decoder, and so has run whole."""
        if self.route is None:
            raise RuntimeError(unsupported("the budget did not reach the decoder"))


@dataclass(frozen=True)
class RouterInputs:
    """What `Router.forward` takes, in its order: `router(*inputs)`."""

    states: Tensor  # [B, S, D]
    visual: Tensor  # [B, S]
    visible: Tensor  # [B, S]
    places: Tensor  # [B, S, 3]

    def __iter__(self) -> Any:
        return iter((self.states, self.visual, self.visible, self.places))


class Pass:
    """One pass through the decoder's layers: what each of them runs on."""

    def __init__(self, decoder: Any, request: Request, inputs: dict[str, Any]) -> None:
        embeddings = inputs["inputs_embeds"]
        self.request = request
        self.config, self.num_layers = decoder.config, decoder.config.num_hidden_layers
        self.num_rows, self.num_tokens = embeddings.shape[:2]
        self.cache: Any = prepared_cache(decoder, inputs)  # None without one
        self.static = isinstance(self.cache, RoutedStaticCache)
        self.past = self.cache.seen if self.cache is not None else 0
        self.real = real_tokens(inputs.get("attention_mask"), self.past, embeddings)  # [B, S]
        held: Any = self.cache.route if self.cache is not None else None
        self.drop_at = drop_layer(request, held, self.num_layers)
        self.short_from = max(self.drop_at, request.deepstack)  # from here on, states are short between layers
        self.rows: list[tuple[int, ...] | None] = [None] * self.num_layers
        if self.cache is not None and held is not None:
            self.rows = list(self.cache.rows)
        self.stay: Any = None  # Entries: the tokens that stay; None: all of them
        self.settled = False
        self.reached = 0  # layers that were called
        self._memo: dict[Any, Any] = {}
        if request.visual is None and request.imposed is None:  # text goes on with the route there is
            everything = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            request.route = Route(everything, held.layers, visual=~everything, drop_at=self.drop_at)
            self.settled = True
        elif request.settings.read_at == 0 or request.imposed is not None:
            self._decide(embeddings)

    # --- the decision ---

    @torch.no_grad()
    def _decide(self, states: Tensor) -> None:
        """Ask the router, or follow what is imposed: states [B, S, D]."""
        request = self.request
        if request.imposed is not None:
            route = self._imposed(request.imposed.for_rows(self.num_rows))
        else:
            visual = request.visual.to(states.device)
            visible = self.real if request.hidden is None else self.real & ~request.hidden.to(self.real.device)
            inputs = RouterInputs(states, visual, visible, request.places)
            if not request.run:
                request.router_inputs = inputs
            tokens, layers = (logits.to(states.device) for logits in request.router(*inputs))
            shown = visual & self.real
            keep = best_tokens(tokens, shown, request.budget, request.places, request.settings.image_floor)
            if request.run and not request.budget.is_off:
                warn_of_no_question(visible, shown)
            run = best_layers(layers, request.settings, request.budget.keep_layers, self.num_layers)
            run |= ~visual.any(1)[:, None]  # a row of text alone runs whole
            route = Route(keep, run, visual, request.places, tokens, layers)
        self._settle(replace(route, drop_at=self.drop_at))

    def _imposed(self, route: Route) -> Route:
        """Check a hand-made route and fill in what it leaves open."""
        device = self.real.device
        keep = torch.ones_like(self.real) if route.keep is None else route.keep.to(device, torch.bool)
        if keep.shape[1] > self.num_tokens:
            raise ValueError(f"the route given is for {keep.shape[1]} tokens, the prompt has {self.num_tokens}.")
        keep = F.pad(keep, (0, self.num_tokens - keep.shape[1]), value=True)  # what was generated since
        layers = torch.ones(self.num_rows, self.num_layers, dtype=torch.bool, device=device)
        if route.layers is not None:
            if route.layers.shape[1] != self.num_layers:
                raise ValueError(f"the route given is for {route.layers.shape[1]} layers, there are {self.num_layers}.")
            layers = route.layers.to(device, torch.bool)
        visual = self.request.visual
        if visual is not None and bool((~keep & ~visual.to(device) & self.real).any()):
            raise ValueError("the route given drops text: only visual tokens can leave.")
        return replace(route, keep=keep, layers=layers, visual=visual, places=self.request.places)

    def _settle(self, route: Route) -> None:
        """Prepare what the layers need to know. Looks at the values, which synchronises on a GPU."""
        held = self.cache.route if self.cache is not None else None
        if held is not None:  # layers are chosen once for a conversation
            route = replace(route, layers=held.layers)
        keep = route.keep & self.real
        self.rows = rows_of(route.layers)
        kept, real = torch.stack([keep.sum(1), self.real.sum(1)]).tolist()
        if kept != real and self.drop_at < self.num_layers:
            check_windows(self.config)
            self.stay = self._staying(keep, max(kept), min(kept) == max(kept))
        if self.request.labels is not None:  # a label is predicted by the token before it, which must be there
            self.request.labels[:, 1:].masked_fill_(~route.keep[:, :-1], IGNORED_LABEL)
        if self.cache is not None and held is None:
            self.cache.hold(route, self.rows)
        self.request.route = route
        self.settled = True

    def _staying(self, keep: Tensor, width: int, all_valid: bool) -> Entries:
        """The tokens that stay, in their order at the end of each row; in front, others that fill it up, not valid."""
        index = keep.byte().argsort(dim=1, stable=True)[:, -width:]  # [B, K]
        valid = keep.gather(1, index)
        newest = [self.past + self.num_tokens] * width
        if self.cache is not None and any(self.cache.windows):
            newest = (self.past + torch.where(valid, index, -1)).amax(0).tolist()
        return Entries(index, valid, all_valid, newest)

    # --- the layers ---

    def layer(self, layer_idx: int, forward: Any, states: Tensor, keywords: dict[str, Any]) -> Tensor:
        """Run a decoder layer on the tokens and rows that it is for: [B, S or K, D] -> [B, S or K, D]."""
        self.reached += 1
        if packed := [name for name in PACKED if keywords.get(name) is not None]:
            raise ValueError(f"packed sequences ({packed[0]}) cannot be routed: pad them, or use preset='off'.")
        if not self.settled and layer_idx == self.request.settings.read_at:
            self._decide(states)
        if self.settled and not self.request.run:
            return states
        whole = None
        if self.stay is not None and self.drop_at <= layer_idx <= self.short_from:
            whole, states = states, states.gather(1, self._spread(states))
        rows = self.rows[layer_idx]
        if rows is None:
            states = forward(states, **self._keywords(layer_idx, keywords, None))
        elif rows and self.static:  # run all, take some
            ran = forward(states, **self._keywords(layer_idx, keywords, None))
            index = index_of(rows, states.device)
            states = states.index_copy(0, index, ran[index])
        elif rows:
            index = index_of(rows, states.device)
            ran = forward(states[index], **self._keywords(layer_idx, keywords, rows))
            states = states.index_copy(0, index, ran)
        if whole is not None and layer_idx < self.short_from:
            states = whole.scatter(1, self._spread(states), states)
        return states

    def finish(self, output: Any) -> Any:
        """Spread the last hidden state out to the original length, zero where a token has left; note what is cached."""
        if self.reached != self.num_layers:
            raise RuntimeError(
                unsupported(f"{self.reached} of {self.num_layers} decoder layers were told of the route")
            )
        if self.cache is not None:
            groups = {self.cache.group(layer_idx, self.drop_at) for layer_idx in range(self.num_layers)}
            entries = {group: found for group in groups if (found := self._entries(group)) is not None}
            self.cache.extend(entries, self.num_tokens, self.drop_at)
        if self.stay is None or self.short_from >= self.num_layers or not self.request.run:
            return output
        last = output.last_hidden_state  # [B, K, D]
        last = last.masked_fill(~self.stay.valid.to(last.device)[..., None], 0)
        full = last.new_zeros(self.num_rows, self.num_tokens, last.shape[-1])
        output.last_hidden_state = full.scatter(1, self._spread(last), last)
        return output

    def _spread(self, states: Tensor) -> Tensor:
        """The index of the tokens that stay, as gather and scatter want it: [B, K, D]."""
        return self.stay.index.to(states.device)[..., None].expand(-1, -1, states.shape[-1])

    def _once(self, key: Any, make: Any, given: Any = None) -> Any:
        """Layers are given the same masks and positions: each is narrowed once a pass, told apart by identity."""
        key = (key, id(given))
        if key not in self._memo:
            self._memo[key] = (make(), given)  # held, so that no other object gets its identity
        return self._memo[key][0]

    # --- what the layers are given ---

    def _keywords(self, layer_idx: int, keywords: dict[str, Any], rows: tuple[int, ...] | None) -> dict[str, Any]:
        """A layer's keywords, for the tokens that stay and the rows that run it."""
        window = self.cache.windows[layer_idx] if self.cache is not None else None
        group = (layer_idx >= self.drop_at, window)
        narrowed = dict(keywords)
        mask, positions = keywords.get("attention_mask"), keywords.get("position_embeddings")
        narrowed["attention_mask"] = self._once(
            ("mask", group, rows), lambda: self._rows(self._mask(mask, group), rows, -4), mask
        )
        if positions is not None:
            narrowed["position_embeddings"] = self._once(
                ("positions", group[0], rows),
                lambda: tuple(self._rows(self._tokens(part, group[0]), rows, -3) for part in positions),
                positions,
            )
        if rows is not None or (group[0] and self.stay is not None):
            narrowed["position_ids"] = None  # only read to find packed sequences, for which gaps would be taken
        return narrowed

    def _rows(self, tensor: Tensor | None, rows: tuple[int, ...] | None, dim: int) -> Tensor | None:
        """The rows of a mask (dimension -4 of four, or the first of two) or of cos and sin (dimension -3)."""
        if rows is None or tensor is None:
            return tensor
        dim = 0 if tensor.ndim == 2 else dim
        if tensor.shape[dim] != self.num_rows:  # one for all
            return tensor
        return tensor.index_select(dim, index_of(rows, tensor.device))

    def _tokens(self, positions: Tensor, dropped: bool) -> Tensor:
        """Cosines or sines of the tokens that stay: [..., B or 1, S, C] -> [..., B, K, C]."""
        if not dropped or self.stay is None:
            return positions
        positions = positions.expand(*positions.shape[:-3], self.num_rows, *positions.shape[-2:])
        index = self.stay.index.to(positions.device)[..., None].expand(*positions.shape[:-2], -1, positions.shape[-1])
        return positions.gather(-2, index)

    def _entries(self, group: Group) -> Entries | None:
        """The tokens in the caches of a group of layers after this pass; None: all tokens of the text."""
        return self._once(("entries", group), lambda: self._extended(group))

    def _extended(self, group: Group) -> Entries | None:
        before = self.cache.entries.get(group) if self.cache is not None else None
        adds = self.stay if group[0] else None
        if before is None and adds is None and group[1] is None:
            return None
        device = self.real.device
        if adds is None:
            added = Entries.counted(self.past, self.past + self.num_tokens, self.num_rows, device)
        else:
            added = replace(adds, index=adds.index + self.past)
        if before is None and self.past:
            before = Entries.counted(self._stored_from(group), self.past, self.num_rows, device)
        return added if before is None else before.followed_by(added)

    def _stored_from(self, group: Group) -> int:
        """The first token that an unrouted cache still had of an earlier turn: sliding windows forget."""
        return 0 if group[1] is None else max(0, self.past - group[1] + 1)

    def _mask(self, mask: Any, group: Group) -> Any:
        """A mask made for the whole text [B, 1, S, T], for the tokens that stay and the entries that a layer has."""
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"a route cannot narrow a mask of type {type(mask).__name__}: use sdpa, eager or flash.")
        narrowed = mask
        if (entries := self._entries(group)) is not None:
            stay = self.stay if group[0] else None
            if mask is None:
                narrowed = self._explicit_mask(entries, stay)
            elif mask.ndim == 2:  # flash attention's: True at entries that are no padding
                narrowed = mask.gather(1, entries.index.to(mask.device)) & entries.valid.to(mask.device)
            else:
                narrowed = narrowed_mask(mask, entries, stay, self.num_rows)
        if self.static and narrowed is not None:  # layers are as long as the cache, sliding ones too
            spare = self.cache.layers[0].max_cache_len - narrowed.shape[-1]
            narrowed = F.pad(narrowed, (0, spare), value=masked_value(narrowed))
        return narrowed

    def _explicit_mask(self, entries: Entries, stay: Entries | None) -> Tensor | None:
        """In place of a mask that transformers left out: without padding, a token sees all that come before it."""
        if entries.all_valid and not self.static:
            return None
        if uses_flash_attention(self.config):
            return entries.valid
        tokens = Entries.counted(0, self.num_tokens, self.num_rows, entries.index.device) if stay is None else stay
        before = entries.index[:, None, None, :] <= self.past + tokens.index[:, None, :, None]
        return before & entries.valid[:, None, None, :]


def drop_layer(request: Request, held: Route | None, num_layers: int) -> int:
    """The layer before which this pass's visual tokens leave: the first turn's, as a cache has it once for all."""
    imposed = request.imposed.drop_at if request.imposed is not None else None
    if held is not None and held.drop_at is not None:
        if imposed not in (None, held.drop_at):
            raise ValueError(f"the route given drops at layer {imposed}, the one of the cache at {held.drop_at}.")
        if request.visual is not None and request.imposed is None and held.drop_at < request.settings.read_at:
            raise ValueError(
                f"the tokens of this cache left before layer {held.drop_at}, the router reads at layer "
                f"{request.settings.read_at}: give a route for the new image, or begin with a new cache."
            )
        return held.drop_at
    if imposed is None:
        return request.settings.drop_at
    if isinstance(imposed, bool) or not isinstance(imposed, int) or not 0 <= imposed <= num_layers:
        raise ValueError(f"the route given drops at layer {imposed!r}: give a number from 0 to {num_layers}.")
    return imposed


@functools.lru_cache(maxsize=1024)
def index_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept from step to step: copying the numbers to a GPU would wait for all that was asked of it before."""
    with torch.inference_mode(False):  # or it could not be used in training later
        return torch.tensor(rows, device=device)


def rows_of(layers: Tensor) -> list[tuple[int, ...] | None]:
    """For each layer the rows that run it, None for all: [B, L]."""
    columns = layers.T.tolist()
    return [None if all(runs) else tuple(row for row, run in enumerate(runs) if run) for runs in columns]


def check_windows(config: Any) -> None:
    kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) and "sliding_attention"]
    if uses_flash_attention(config) and "sliding_attention" in kinds:
        raise ValueError(
            "flash attention counts the entries in a sliding window, of which some are dropped here: load the model "
            "with attn_implementation='sdpa', or keep all visual tokens."
        )


def prepared_cache(decoder: Any, inputs: dict[str, Any]) -> RoutedCache | RoutedStaticCache | None:
    """The pass's cache, able to hold a route, put into its inputs; a new one if a cache is wanted and there is none."""
    name, cache = decoder.routed_cache_name, cache_in(inputs)
    wanted = inputs.get("use_cache")
    wanted = decoder.config.use_cache if wanted is None else wanted
    checkpointed = decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers)
    if checkpointed and (torch.is_grad_enabled() or not checkpointing_spares_caches()):
        wanted, cache = False, None  # transformers takes it away from the layers
        inputs[name], inputs["use_cache"] = None, False
    if cache is None and wanted:
        cache = inputs[name] = DynamicCache(config=decoder.config)
    if cache is None:
        return None
    if isinstance(cache, StaticCache) and uses_flash_attention(decoder.config):
        raise ValueError("flash attention reads a static cache to its end: use a dynamic one for a route, or sdpa.")
    return routed_cache(cache, decoder.config.num_hidden_layers)


def real_tokens(mask: Any, past: int, embeddings: Tensor) -> Tensor:
    """Where the tokens of a pass are no padding, [B, S], from any mask that transformers makes.

    None is no padding; `generate` makes it of a mask of ones. In four dimensions, padding is what no token sees.
    """
    num_rows, num_tokens = embeddings.shape[:2]
    if isinstance(mask, dict):  # by kind of layer
        mask = next((part for part in mask.values() if part is not None), None)
    if mask is None:
        return torch.ones(num_rows, num_tokens, dtype=torch.bool, device=embeddings.device)
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = seen.flatten(1, 2).any(1).expand(num_rows, -1)
    return mask[:, past : past + num_tokens].to(embeddings.device, torch.bool)


def narrowed_mask(mask: Tensor, entries: Entries, stay: Entries | None, num_rows: int) -> Tensor:
    """Rows for the tokens that stay, columns for the entries there are: [B, 1, S, T] -> [B, 1, K, P]."""
    mask = mask.expand(num_rows, *mask.shape[1:])
    if stay is not None:
        index = stay.index.to(mask.device)[:, None, :, None]
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = entries.index.to(mask.device)[:, None, None, :]
    mask = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))
    return mask.masked_fill(~entries.valid.to(mask.device)[:, None, None, :], masked_value(mask))


def masked_value(mask: Tensor) -> bool | float:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


# --- the decoder's classes --------------------------------------------------------------------------------------------


class _RoutedDecoder:
    """A text model of transformers that takes a request, `routing`, and hands its pass on to its layers."""

    routed_cache_name: str

    def forward(self, *args: Any, routing: Request | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(*args, **kwargs)
        if args:
            raise TypeError("a routed text model takes its inputs by name.")
        kwargs = with_cache_as(self.routed_cache_name, kwargs)
        run = Pass(self, routing, kwargs)
        return run.finish(super().forward(routing=run, **kwargs))


class _RoutedLayer:
    """A decoder layer of transformers that runs on what the pass leaves it."""

    routed_idx: int

    def forward(self, hidden_states: Tensor, *args: Any, routing: Pass | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(hidden_states, *args, **kwargs)
        if args:
            raise TypeError("a routed layer takes everything but the hidden states by name.")
        return routing.layer(self.routed_idx, super().forward, hidden_states, kwargs)


@functools.cache
def _mixed(addition: Any, stock: Any) -> Any:
    """A subclass under the same name, by which device maps, plans and adapters find modules."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (addition, stock), names)


def make_routable(decoder: Any) -> None:
    """Give a text model and its layers the classes above, in place: parameters and their names stay."""
    check_transformers(decoder)
    decoder.routed_cache_name = cache_name(type(decoder).forward)
    decoder.__class__ = _mixed(_RoutedDecoder, decoder.__class__)
    for layer_idx, layer in enumerate(decoder.layers):
        layer.__class__ = _mixed(_RoutedLayer, layer.__class__)
        layer.routed_idx = layer_idx


# --- the models -------------------------------------------------------------------------------------------------------


@dataclass
class Generation:
    """A call of `generate` that is under way. Its passes read here what it was asked for beside the model's inputs.

    transformers would hand such arguments to an assistant too, which need not know them.
    """

    model: Any
    asked: dict[str, Any]  # by the names of ROUTING_ARGUMENTS
    route: Any = None  # of its first routed pass

    def arguments(self, num_rows: int) -> dict[str, Any]:
        """What a pass is asked for: tensors with their rows repeated, as `generate` does for beams and samples."""
        return {name: repeated(value, num_rows) for name, value in self.asked.items()}


GENERATION: ContextVar[Generation | None] = ContextVar("generation", default=None)


def repeated(value: Any, num_rows: int) -> Any:
    if not isinstance(value, Tensor) or len(value) == num_rows or num_rows % len(value):
        return value
    return value.repeat_interleave(num_rows // len(value), 0)


class RoutedModel:
    """What every routed class has beside its stock one's methods.

    `forward` and `generate` take these arguments more:
        keep_visual_tokens: a count (144; rows with fewer keep all) or a share (0.25) of each row's visual tokens.
        keep_layers: how many decoder layers run.
        preset: a name of `config.router["presets"]`, or "off", the plain model bit for bit.
        route: a `Route` to follow in place of the router's.
        visual_mask: [B, S] True at visual tokens; needed with `inputs_embeds` only.
        prompt_length: tokens of the text that are the prompt, the router sees no others; `generate` knows it, and with
            `labels`, what is labelled is hidden. None: all of it.
    Outputs have the route followed as `output.route`.
    """

    _auto_class = "AutoModelForImageTextToText"  # save_pretrained copies this file and names the class in auto_map
    _supports_flex_attn = False  # its block masks cannot be narrowed
    _can_compile_fullgraph = False  # the route is read on the host; compile the layers' dense parts instead

    def __init__(self, config: Any, *args: Any, with_router: bool = True, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.router_settings = RouterSettings.of(config)
        self.budget = self.router_settings.preset(self.router_settings.default)
        for name in self.router_settings.presets:
            self.router_settings.preset(name).check(self.router_settings, self.num_layers)
        make_routable(self._text_model())
        if with_router:
            self._attach_router()

    def _text_model(self) -> Any:
        decoder = self.get_decoder()
        return decoder if hasattr(decoder, "layers") else decoder.get_decoder()

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    # --- budgets ---

    def set_budget(
        self,
        preset: str | None = None,
        *,
        keep_visual_tokens: int | float | None = None,
        keep_layers: int | None = None,
    ) -> None:
        """The budget of all calls that name none: `set_budget("fast")`, `set_budget(keep_layers=28)`."""
        self.budget = self._budget(preset, keep_visual_tokens, keep_layers)

    def _budget(self, preset: str | None, keep_visual_tokens: int | float | None, keep_layers: int | None) -> Budget:
        if preset is not None and not (keep_visual_tokens is None and keep_layers is None):
            raise ValueError(f"give either preset={preset!r} or keep_visual_tokens and keep_layers, not both.")
        if preset is not None:
            return self.router_settings.preset(preset)
        if keep_visual_tokens is None and keep_layers is None:
            return self.budget
        budget = Budget(keep_visual_tokens, keep_layers)
        budget.check(self.router_settings, self.num_layers)
        return budget

    # --- running ---

    def _request(
        self,
        named: dict[str, Any],
        *,
        keep_visual_tokens: int | float | None = None,
        keep_layers: int | None = None,
        preset: str | None = None,
        route: Route | None = None,
        visual_mask: Tensor | None = None,
        places: Tensor | None = None,
        prompt_length: int | None = None,
        run: bool = True,
    ) -> Request | None:
        """What a pass with these inputs asks of the decoder; None: nothing, the plain model runs."""
        budget = self._budget(preset, keep_visual_tokens, keep_layers)
        cache = cache_in(named)
        held = getattr(cache, "route", None)
        if held is not None and preset == "off":
            raise ValueError(
                "preset='off' asks for the whole model, and this cache holds a route: tokens and layers are missing in "
                "it. Begin with a new cache, or leave the preset out to go on with the route."
            )
        if held is None and route is None and budget.is_off and run:
            return None
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        decoding = cache is not None and tokens.shape[1] == 1  # no look at the values: it would synchronise
        past = 0 if cache is None or decoding else int(cache.get_seq_length())
        visual = None if decoding else self._visual(named, visual_mask)
        if visual is None and (decoding or past):
            route = None  # it was for the prompt
        if visual is None and route is None and held is None:
            return None
        router = getattr(self, "router", None)  # none: routes are imposed
        request = Request(router, self.router_settings, budget, visual, self._deepstack(), route, run=run)
        labels = named.get("labels")
        request.labels = None if labels is None else labels.clone()
        if visual is not None:
            warn_of_excess(budget, visual)
            request.places = places_of(self.config, visual, named) if places is None else part_of(places, past, visual)
            request.hidden = hidden_tokens(visual, labels, prompt_length, past)
        return request

    def _visual(self, named: dict[str, Any], visual_mask: Tensor | None) -> Tensor | None:
        """[B, S] True at visual tokens; None if there are none."""
        if (input_ids := named.get("input_ids")) is not None:
            ids = [getattr(self.config, name, None) for name in ("image_token_id", "video_token_id")]
            visual = torch.isin(input_ids, torch.tensor([i for i in ids if i is not None], device=input_ids.device))
        elif visual_mask is not None:
            visual = visual_mask.bool()
        else:
            raise ValueError(
                "inputs_embeds alone do not tell which tokens are visual: pass visual_mask [B, S] with them, input_ids "
                "in place of them, or preset='off'."
            )
        return visual if bool(visual.any()) else None

    def _deepstack(self) -> int:
        return len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))

    def route(self, **inputs: Any) -> Route:
        """The route of inputs under a budget: `model.route(**inputs, preset="fast")`. Runs up to the router only."""
        request = self._up_to_router(**inputs)
        if request is not None:
            return request.route
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
        everything = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        layers = everything.new_ones(len(tokens), self.num_layers)
        return Route(everything, layers, ~everything, places=torch.zeros(*tokens.shape, 3, device=tokens.device))

    def router_inputs(self, **inputs: Any) -> RouterInputs:
        """What the router sees of inputs, to train it: `model.router(*model.router_inputs(**inputs))`."""
        request = self._up_to_router(**inputs)
        if request is None:
            raise ValueError("these inputs have no visual token: there is nothing to route.")
        return request.router_inputs

    @torch.no_grad()
    def _up_to_router(self, **inputs: Any) -> Request | None:
        given = {name: inputs.pop(name) for name in ROUTING_ARGUMENTS if name in inputs}
        request = self._request(inputs, **given, run=False)
        inputs.pop("labels", None)
        if request is not None:
            inputs = with_cache_as(cache_name(self._stock.forward), inputs)
            self._stock.forward(self, **{**inputs, "use_cache": False, "logits_to_keep": 1, "routing": request})
            request.check_reached()
        return request

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, which see; the outputs of `return_dict_in_generate` have `.route`.

        A draft for assisted decoding sees nothing of the budget: a routed one runs under its own (`set_budget`).
        """
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        if kwargs.get("prefill_chunk_size") or settings.prefill_chunk_size:
            raise ValueError(
                "prefill_chunk_size would choose the route by the first chunk of the prompt: leave it out."
            )
        kwargs = with_cache_as(cache_name(self._stock.forward), kwargs)
        asked = {name: kwargs.pop(name) for name in ROUTING_ARGUMENTS if name in kwargs}
        self._budget(*(asked.get(name) for name in ("preset", "keep_visual_tokens", "keep_layers")))
        asked.setdefault("prompt_length", prompt_length(inputs, kwargs))
        if asked.get("places") is None:
            asked["places"] = self._places(inputs, kwargs, asked["prompt_length"])
        kwargs.setdefault("disable_compile", True)  # of the whole pass, as transformers does with static caches
        generation = Generation(self, asked)
        before = GENERATION.set(generation)
        try:
            made = super().generate(inputs, *args, **kwargs)
        finally:
            GENERATION.reset(before)
        if not isinstance(made, Tensor):
            held = getattr(cache_of(made), "route", None)
            made.route = generation.route if held is None else held
        return made

    def _places(self, inputs: Tensor | None, kwargs: dict[str, Any], total: int | None) -> Tensor | None:
        """Places for the whole text, [B, T, 3]: `generate` encodes images itself and hands no pass their grids."""
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        if tokens is None or total is None or all(kwargs.get(name) is None for name in GRIDS):
            return None
        cache = cache_in(kwargs)
        new = tokens if cache is None or tokens.shape[1] < total else tokens[:, cache.get_seq_length() :]
        visual = self._visual({"input_ids": new}, None)
        return (
            None if visual is None else F.pad(places_of(self.config, visual, kwargs), (0, 0, total - new.shape[1], 0))
        )

    # --- the router's file ---

    def _attach_router(self) -> None:
        """Last, and by torch's own initialisation: it is no part of what transformers loads and places."""
        self.router = Router(self.config.get_text_config().hidden_size, self.router_settings)
        self._keys_to_ignore_on_save |= {f"router.{name}" for name in self.router.state_dict()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for the stock class, the router beside: on the device of the embeddings, never offloaded (it is small).

        Args:
            kwargs: `preset="fast"` among them is the budget of all calls that name none, as by `set_budget`.
        """
        preset = kwargs.pop("preset", None)
        weights = load_file(cls._router_file(pretrained_model_name_or_path, kwargs))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs, with_router=False)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._attach_router()
        model._load_router(weights)
        if preset is not None:
            model.set_budget(preset)
        return loaded

    @classmethod
    def _router_file(cls, name: Any, kwargs: dict[str, Any]) -> str:
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, kwargs.get("subfolder") or "", ROUTER_FILE)):
            raise OSError(
                f"{name} has no {ROUTER_FILE}: fetch the router's folder too, or load the plain model, without "
                "trust_remote_code."
            )
        hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        path: str = cached_file(name, ROUTER_FILE, **{key: kwargs[key] for key in hub if key in kwargs})
        return path

    def _load_router(self, weights: dict[str, Tensor]) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in self.router.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if expected != found:
            name = next(n for n in [*expected, *found] if expected.get(n) != found.get(n))
            raise ValueError(
                f"{ROUTER_FILE} is not the router that config.json describes: {name} has the shape "
                f"{found.get(name)}, not {expected.get(name)}."
            )
        self.router.load_state_dict(weights)
        embedding = self.get_input_embeddings()
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        self.router.to(embedding.weight.device if device is None else device, self.dtype).eval()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As for the stock class, with this file and the router's weights in a folder of their own."""
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            given = kwargs.get("state_dict") or {f"router.{n}": t for n, t in self.router.state_dict().items()}
            own = {n.removeprefix("router."): t for n, t in given.items() if n.startswith("router.")}
            if any(tensor.is_meta for tensor in own.values()):
                raise ValueError("the router's weights are offloaded: move it to a device to save it.")
            path = os.path.join(save_directory, ROUTER_FILE)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_file({n: t.detach().cpu().contiguous() for n, t in own.items()}, path, metadata={"format": "pt"})
        super().save_pretrained(save_directory, *args, **kwargs)


def hidden_tokens(visual: Tensor, labels: Tensor | None, prompt_length: int | None, past: int) -> Tensor | None:
    """Tokens that are answers and not shown to the router: [B, S], or None."""
    hidden = torch.zeros_like(visual)
    if prompt_length is not None:
        hidden |= torch.arange(past, past + visual.shape[1], device=visual.device) >= prompt_length
    if labels is not None:
        hidden |= (labels.to(visual.device) != IGNORED_LABEL) & ~visual
    return hidden if prompt_length is not None or labels is not None else None


def prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int | None:
    """Length of the text that `generate` is given to go on from: what a cache holds included, candidates not yet."""
    tokens = next((t for t in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if t is not None), None)
    if tokens is None:
        return None
    cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
    if cache is None:
        return tokens.shape[1]
    return max(mask.shape[-1], tokens.shape[1]) if isinstance(mask, Tensor) else None  # the new ones only, or all


def warn_of_excess(budget: Budget, visual: Tensor) -> None:
    if isinstance(budget.keep_visual_tokens, int) and (most := int(visual.sum(1).max())) < budget.keep_visual_tokens:
        logger.warning_once(
            f"keep_visual_tokens={budget.keep_visual_tokens} is above the {most} visual tokens there are: all are kept."
        )


def warn_of_no_question(visible: Tensor, visual: Tensor) -> None:
    """Warn where a picture is routed before its question: nothing but the end of an image follows it in this pass."""
    order = torch.arange(visual.shape[1], device=visual.device)
    last = torch.where(visual, order, -1).amax(1)  # [B]
    follow = (visible & (order > last[:, None])).sum(1)
    if bool(((last >= 0) & (follow <= END_OF_IMAGE)).any()):
        logger.warning_once(
            "a picture was routed before its question: no text follows it in this pass, and tokens that leave now are "
            "gone for the whole conversation. Give the picture and its question in one pass."
        )


ROUTING_ARGUMENTS = {
    name: parameter
    for name, parameter in inspect.signature(RoutedModel._request).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "run"
}


STOCK = {  # model_type -> the class that is routed, without ForConditionalGeneration
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma3",
    "mistral3": "Mistral3",
    "glm4v": "Glm4v",
}


def class_name(model_type: str) -> str:
    """What config.json names in auto_map, after the name of this file."""
    return f"Routed{STOCK[model_type]}ForConditionalGeneration"


def number_of_rows(named: dict[str, Any]) -> int:
    tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    return len(tokens)


@functools.cache
def routed(stock: Any) -> Any:
    """The routed class of a stock one: `forward` takes the arguments of both, the hub's names are kept."""
    signature = inspect.signature(stock.forward)
    names, cache = list(signature.parameters)[1:], cache_name(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = with_cache_as(cache, {**dict(zip(names, args, strict=False)), **kwargs})
        given = {name: named.pop(name) for name in ROUTING_ARGUMENTS if name in named}
        generation = GENERATION.get()
        if generation is not None and generation.model is self:
            given = generation.arguments(number_of_rows(named)) | given
        request = self._request(named, **given)
        if request is None:
            return stock.forward(self, **named)
        if request.labels is not None:
            named["labels"] = request.labels
        output = stock.forward(self, **named, routing=request)
        request.check_reached()
        if generation is not None and generation.model is self and generation.route is None:
            generation.route = request.route
        if not isinstance(output, tuple):
            output.route = request.route
        return output

    *own, rest = signature.parameters.values()  # `generate` reads the signature
    forward.__signature__ = signature.replace(parameters=[*own, *ROUTING_ARGUMENTS.values(), rest])
    name = f"Routed{stock.__name__}"
    model_type = stock.config_class.model_type
    mapping = get_checkpoint_conversion_mapping(stock.__name__) or get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:  # transformers keeps the names of the hub from classes that are not its own
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    return type(name, (RoutedModel, stock), {"__module__": __name__, "forward": forward, "_stock": stock})


def __getattr__(name: str) -> Any:
    """Make the class that is asked for: a checkpoint needs one, and importing all families takes seconds."""
    if name not in map(class_name, STOCK):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return routed(getattr(transformers, name.removeprefix("Routed")))
