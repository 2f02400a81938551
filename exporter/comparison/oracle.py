"""An upper bound for routers: a search for the visual tokens to keep that knows the unpruned model's answers.

A router sees the question only. The search may try selections and look at KL(unpruned || pruned) on the unpruned
model's own answer: what it finds is a lower bound of what is possible, and shows what a router leaves on the table.

Shapes: B sequences, S tokens of a prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..modeling.routed_route import Budget, Route
from ..routing.folder import has_router
from ..routing.rules import Rule, assemble, drawn, fastv_scores, generators, make_route

Divergence = Callable[[Route], Tensor]  # of each sequence under a route, [B]


@dataclass(frozen=True)
class Search:
    """The effort of the search for each question."""

    candidates: int = 16  # whole selections: the router's, FastV's, then noisy and random ones in turn
    swaps: int = 32  # changes of the best one, each kept if it is better: many tokens first, one in the end

    @property
    def passes(self) -> int:
        return self.candidates + self.swaps

    def __str__(self) -> str:
        return f"best of {self.candidates} selections and {self.swaps} swaps by KL on the unpruned answer"


@contextlib.contextmanager
def images_seen_once(model: Any) -> Iterator[None]:
    """Run the vision tower for the first pass only: all passes inside must be over the same images."""
    base = model.base_model
    names = [name for name in ("get_image_features", "get_video_features") if hasattr(base, name)]
    running: list[str] = []
    for name in names:
        setattr(base, name, _remembered(name, getattr(base, name), running=running))
    try:
        yield
    finally:
        for name in names:
            delattr(base, name)


def _remembered(name: str, features: Callable[..., Any], running: list[str]) -> Callable[..., Any]:
    """Return a function that calls another one once, and returns the same whatever it is given then.

    Args:
        running: names of those that are being called. What one of them asks of another (Qwen3-VL's for videos asks the
            one for images) is about other pixels, and is not remembered.
    """
    known: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        if running:
            return features(*args, **kwargs)
        if not known:
            running.append(name)
            try:
                known.append(features(*args, **kwargs))
            finally:
                running.remove(name)
        return known[0]

    return remembered


def search(
    model: Any,
    batch: Batch,
    budget: Budget,
    divergence: Divergence,
    effort: Search = Search(),
    *,
    layers: str = "all",
    drop_at: int = 0,
    seed: object = 0,
    influence: Tensor | None = None,
) -> Route:
    """Return the best route of each question that was found, all questions of the batch at a time.

    Args:
        divergence: what is to be low, for each sequence.
        layers: who chooses the layers, a rule's name; they are not searched.
    """
    batch = batch.to(model.device)
    best: Route | None = None
    lowest = torch.full((len(batch.samples),), torch.inf)
    for route in _selections(
        model, batch, budget=budget, effort=effort, layers=layers, drop_at=drop_at, seed=seed, influence=influence
    ):
        best, lowest = better(best, lowest, route, divergence(route))
    assert best is not None
    for number in range(effort.swaps):
        route = swapped(best, 1 - number / effort.swaps, generators(batch.samples, ("swap", seed, number)))
        best, lowest = better(best, lowest, route, divergence(route))
    return best


def _selections(
    model: Any,
    batch: Batch,
    budget: Budget,
    effort: Search,
    layers: str,
    drop_at: int,
    seed: object,
    influence: Tensor | None,
) -> Iterator[Route]:
    """Return whole selections under one choice of layers."""
    first = Rule("router" if has_router(model) else "random", layers, drop_at)
    start = make_route(model, batch, budget, first, seed=seed, influence=influence)
    yield start
    attention = fastv_scores(model, batch)
    for number in range(effort.candidates - 1):
        noise = drawn(batch.is_visual, generators(batch.samples, ("oracle", seed, number)))
        scores = noise if number % 2 else attention + (noise if number else 0)
        rule = Rule("fastv", layers, drop_at)
        undecided = torch.zeros(len(scores), len(model.router_settings.candidates), device=scores.device)
        yield replace(
            assemble(model, batch, budget=budget, tokens=scores, layers=undecided, rule=rule), layers=start.layers
        )


def better(best: Route | None, lowest: Tensor, route: Route, divergence: Tensor) -> tuple[Route, Tensor]:
    """Choose sequence by sequence the route of the lower divergence; ties leave a sequence as it is."""
    if best is None:
        return route, divergence
    wins = divergence < lowest
    keep = torch.where(wins.to(route.keep.device)[:, None], route.keep, best.keep)
    return replace(best, keep=keep), torch.minimum(lowest, divergence)


def swapped(route: Route, share: float, draws: Sequence[torch.Generator]) -> Route:
    """Exchange kept visual tokens of each sequence for dropped ones: a quarter of them times `share`, at least one."""
    keep = route.keep.clone()
    for sequence, generator in enumerate(draws):
        kept, gone = (
            (which & route.visual[sequence]).nonzero()[:, 0].cpu()
            for which in (route.keep[sequence], ~route.keep[sequence])
        )
        count = min(max(1, round(share * len(kept) / 4)), len(kept), len(gone))
        out = kept[torch.randperm(len(kept), generator=generator)[:count]]
        into = gone[torch.randperm(len(gone), generator=generator)[:count]]
        keep[sequence, out.to(keep.device)], keep[sequence, into.to(keep.device)] = False, True
    return replace(route, keep=keep)
