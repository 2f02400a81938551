"""Routes by rule: what a router has to beat, and the actions that its training learns from.

Tokens are kept at random or by the attention that they receive early on (FastV, arXiv 2403.06764), layers at random or
by block influence (ShortGPT, arXiv 2403.03853). A rule makes a `Route`, which a routed model runs like its router's:

    route = make_route(model, batch, Budget(0.25, 28), Rule.parse("fastv+shortgpt"), influence=influence)
    model.generate(**batch.inputs, route=route)

Draws depend on the seed and the question, never on the batch that the question is in.

Shapes: B sequences, S tokens of a pass, L layers, N of them that may be skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.samples import Sample
from ..errors import InputError
from ..localize.block_influence import block_influence
from ..modeling.routed_places import coordinates_of
from ..modeling.routed_route import Budget, Route, RouterSettings
from ..modeling.routed_router import best_layers, best_tokens
from ..models.capture import attention_means, layer_statistics
from ..models.loading import text_decoder
from ..models.replay import trace
from .folder import has_router

FASTV_LAYER = 2  # layers that have run when FastV looks: the attention is that of layer 1, counted from 0
TOKEN_RULES = ("router", "random", "fastv", "all")
LAYER_RULES = ("router", "random", "shortgpt", "all")
SHORT_NAMES = {"router": "router+router", "random": "random+random", "fastv": "fastv+all", "shortgpt": "all+shortgpt"}


@dataclass(frozen=True)
class Rule:
    """Who chooses the tokens and who the layers; 'all' keeps all of them."""

    tokens: str
    layers: str
    drop_at: int | None = None  # the layer before which tokens leave; None: after FastV has looked, or the router's

    @classmethod
    def parse(cls, text: str, drop_at: int | None = None) -> Rule:
        """Read 'fastv+shortgpt', tokens first; 'router', 'random', 'fastv' and 'shortgpt' may stand alone."""
        parts = SHORT_NAMES.get(text, text).split("+")
        if len(parts) != 2 or parts[0] not in TOKEN_RULES or parts[1] not in LAYER_RULES:
            raise InputError(
                f"rule '{text}' is not known: {', '.join(SHORT_NAMES)}, or TOKENS+LAYERS with "
                f"{', '.join(TOKEN_RULES)} and {', '.join(LAYER_RULES)}, like fastv+shortgpt."
            )
        return cls(parts[0], parts[1], drop_at)

    def __str__(self) -> str:
        full = f"{self.tokens}+{self.layers}"
        name = next((short for short, long in SHORT_NAMES.items() if long == full), full)
        return name if self.drop_at is None else f"{name} at {self.drop_at}"

    def check(self, budget: Budget) -> None:
        """Raise InputError where a part of the budget has nobody who chooses."""
        if self.tokens == "all" and budget.keep_visual_tokens is not None:
            raise InputError(f"rule '{self}' keeps all visual tokens: leave out keep_visual_tokens, or use fastv+...")
        if self.layers == "all" and budget.keep_layers is not None:
            raise InputError(f"rule '{self}' keeps all layers: leave out keep_layers, or use ...+shortgpt.")

    def drops_at(self, settings: RouterSettings) -> int:
        if self.drop_at is not None:
            return self.drop_at
        return FASTV_LAYER if self.tokens == "fastv" else settings.drop_at


# --- draws that belong to a question ----------------------------------------------------------------------------------


def generators(samples: Sequence[Sample], seed: object) -> list[torch.Generator]:
    """Return a generator for each question, seeded by it, its images and `seed` (by how that prints)."""
    return [torch.Generator().manual_seed(_number(sample, seed)) for sample in samples]


def _number(sample: Sample, seed: object) -> int:
    digest = hashlib.sha256(json.dumps([str(seed), sample.messages], sort_keys=True).encode())
    for image in sample.images:
        digest.update(image.name.encode() if isinstance(image, Path) else image.tobytes())
    for video in sample.videos:
        digest.update(video.digest(sample.origin))
    return int.from_bytes(digest.digest()[:7], "big")


def drawn(visual: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """Return standard normal numbers at the visual tokens, [B, S]; 0 elsewhere. Padding moves nothing."""
    numbers = torch.zeros(visual.shape)
    for sequence, generator in enumerate(draws):
        of_sequence = visual[sequence].cpu()
        numbers[sequence, of_sequence] = torch.randn(int(of_sequence.sum()), generator=generator)
    return numbers.to(visual.device)


# --- scores -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def fastv_scores(
    model: Any,
    batch: Batch,
    layer: int = FASTV_LAYER,
    *,
    noise: float = 0.0,
    draws: Sequence[torch.Generator] | None = None,
    asked_by: str = "last",
) -> Tensor:
    """Return the logarithm of the attention that visual tokens receive, mean over heads: [B, S]; -inf at others.

    Runs the vision tower and the first `layer` layers, the last of them with its attention reduced block by block to
    one number a token. On the logarithm a number added is one added to attention's logits, for all heads alike.

    Args:
        model: plain or routed; a routed one runs as the plain one here.
        layer: how many layers run; 2 is FastV's "layer 2": the attention is that of the decoder layer with index 1,
            and the tokens can leave before the one with index 2.
        noise: standard deviation of Gaussian noise on the logarithm, 1 for PAR's actions.
        draws: where it comes from, a generator for each sequence; `drawn` draws several times from one pass.
        asked_by: "last", by the last token of the prompt, as FastV's code does it, or "all", the mean over all tokens
            of the prompt, as its paper says.
    """
    layers = text_decoder(model).layers
    if not 1 <= layer <= len(layers):
        raise InputError(f"layer={layer}: FastV reads attention after 1 to {len(layers)} layers.")
    batch = batch.to(model.device)
    with attention_means(model) as reducer:
        reducer.is_visual, reducer.is_text = batch.is_visual, _asking(batch, asked_by)
        traced = trace(model, batch)
        state = traced.entry
        for layer_idx in range(layer):
            state = traced.after(layer_idx, traced.step(layers[layer_idx], layer_idx, state))
        received = reducer.take().visual_from_text  # "text" is whoever asks
    scores = received.clamp(min=torch.finfo(received.dtype).tiny).log()  # 0 outside a sliding window
    scores = scores.to(batch.is_visual.device)
    if noise:
        assert draws is not None, "noise needs a generator for each sequence"
        scores = scores + noise * drawn(batch.is_visual, draws)
    return scores.masked_fill(~batch.is_visual, -torch.inf)


def _asking(batch: Batch, asked_by: str) -> Tensor:
    """Return tokens whose attention counts, [B, S]."""
    real = batch.inputs["attention_mask"].bool()
    if asked_by == "all":
        return real
    if asked_by != "last":
        raise InputError(f"asked_by='{asked_by}' is not known: last, all.")
    return real & (real.flip(1).long().cumsum(1).flip(1) == 1)


def block_influences(model: Any, batches: Iterable[Batch]) -> Tensor:
    """Measure ShortGPT's block influence of every layer, [L]: one minus the mean cosine of its input and output."""
    scores = block_influence(layer_statistics(model, batches, attention=False), 0)
    return 1 - torch.tensor(scores.values, dtype=torch.float64)


# --- routes -----------------------------------------------------------------------------------------------------------


def make_route(
    model: Any,
    batch: Batch,
    budget: Budget,
    rule: Rule,
    *,
    seed: object = 0,
    influence: Tensor | None = None,
) -> Route:
    """Return the route of a batch of questions under a budget, by rule or by the model's own router.

    Args:
        model: a routed model, with or without a trained router (`routing.routable`).
        seed: of what is random.
        influence: `block_influences` of the model, for the layer rule 'shortgpt'.
    """
    rule.check(budget)
    budget.check(model.router_settings, model.num_layers)
    batch = batch.to(model.device)
    visual = batch.is_visual
    routed = None
    if "router" in (rule.tokens, rule.layers):
        if not has_router(model):
            raise InputError(f"rule '{rule}' needs a router, and this model has none: train one, or use another rule.")
        routed = model.route(**batch.inputs, **vars(budget)) if not budget.is_off else None
        if routed is not None and (budget.flops is not None or budget.quality is not None):
            limited: Route = replace(routed, visual=visual)
            return limited  # how much of each sequence is the router's affair too
    tokens = _token_scores(model, batch, rule=rule, routed=routed, seed=seed)
    layers = _layer_scores(model, batch, rule=rule, routed=routed, seed=seed, influence=influence)
    return assemble(
        model, batch, budget=budget, tokens=tokens.to(visual.device), layers=layers.to(visual.device), rule=rule
    )


def assemble(model: Any, batch: Batch, budget: Budget, tokens: Tensor, layers: Tensor, rule: Rule) -> Route:
    """Return the route that keeps the highest tokens [B, S] and layers [B, N]; sequences without images run whole."""
    settings, visual = model.router_settings, batch.is_visual
    run = best_layers(layers, settings, budget.keep_layers, model.num_layers) | ~visual.any(1)[:, None]
    coordinates = coordinates_of(model.config, visual, batch.inputs)
    keep = best_tokens(tokens, visual, budget=budget, patches=coordinates, image_floor=settings.image_floor)
    return Route(
        keep=keep,
        layers=run,
        visual=visual,
        coordinates=coordinates,
        token_logits=tokens,
        layer_logits=layers,
        drop_at=rule.drops_at(settings),
    )


def _token_scores(model: Any, batch: Batch, rule: Rule, routed: Route | None, seed: object) -> Tensor:
    if rule.tokens == "router" and routed is not None and routed.token_logits is not None:
        return routed.token_logits
    if rule.tokens == "random":
        return drawn(batch.is_visual, generators(batch.samples, ("tokens", seed)))
    if rule.tokens == "fastv" and batch.is_visual.any():
        return fastv_scores(model, batch)
    return torch.zeros(batch.is_visual.shape)


def _layer_scores(
    model: Any, batch: Batch, rule: Rule, routed: Route | None, seed: object, influence: Tensor | None
) -> Tensor:
    candidates = model.router_settings.candidates
    if rule.layers == "router" and routed is not None and routed.layer_logits is not None:
        return routed.layer_logits
    if rule.layers == "random":
        return random_layers(len(candidates), generators(batch.samples, ("layers", seed)))
    if rule.layers == "shortgpt":
        if influence is None:
            raise InputError("the rule 'shortgpt' measures layers on questions: give --calibration FILE.")
        return influence[list(candidates)].expand(len(batch.samples), -1)
    return torch.zeros(len(batch.samples), len(candidates))


def random_layers(num_candidates: int, draws: Sequence[torch.Generator]) -> Tensor:
    """Draw scores that order the candidates at random, sequence by sequence: [B, N]."""
    return torch.stack([torch.rand(num_candidates, generator=generator) for generator in draws])


def par_actions(
    model: Any, batch: Batch, budget: Budget, number: int = 5, *, noise: float = 1.0, seed: object = 0
) -> Iterator[Route]:
    """Draw PAR's pruning actions of each question in one pass: tokens by FastV with noise, layers at random.

    They drop before the router's own layer, which is what it is trained for.
    """
    batch = batch.to(model.device)
    scores = fastv_scores(model, batch)
    rule = Rule("fastv", "random", model.router_settings.drop_at)
    for action in range(number):
        noisy = scores + noise * drawn(batch.is_visual, generators(batch.samples, ("noise", seed, action)))
        draws = generators(batch.samples, ("layers", seed, action))
        layers = random_layers(len(model.router_settings.candidates), draws)
        yield assemble(model, batch, budget=budget, tokens=noisy, layers=layers.to(noisy.device), rule=rule)
