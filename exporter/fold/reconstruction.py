"""Reconstruction: refit what stays, layer after layer, to the states that the original model has there.

The last layer before a gap learns to end where the gap ended; every later layer is refitted too, on the inputs that the
smaller model really gives it, so that it makes up for what the layers before it could not. Each refit is a ridge
regression of the output matrix towards its old value: what layer-wise post-training pruning does for sparse weights
(SparseGPT, arXiv 2301.00774, equation 1), done here for whole missing layers.

Shapes: B samples, S tokens, N counted tokens, D hidden size, P inputs of the refitted matrix.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration import Batch
from ..capture import on_module
from ..moments import Moments
from ..replay import Folded, Trace, replaced, trace, walk
from ..source import text_decoder
from .job import FoldJob

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LAYER_COST = 4.5  # of refitting a layer, in forward passes through it: two regressions with their sums, the state after


@dataclass
class Stream:
    """One batch at the boundary between two layers, in the original and in the smaller model."""

    given: Trace
    weights: Tensor  # [B, S] of the tokens in the regressions; 0 for those that don't count
    original: Tensor  # [B, S, D]
    smaller: Tensor  # [B, S, D]


def reconstruct(
    job: FoldJob, ridge: float | str, share: float | None, share_of_text: float | None, modules: Sequence[str]
) -> Folded:
    """Walk both models through the calibration data together, refitting `modules` of each kept layer on the way."""
    layers = text_decoder(job.model).layers
    reached = max(0, min(job.plan.drop) - 1)  # the first layer that changes: up to its input both models are one
    refitted = [layer_idx for layer_idx in job.plan.keep if layer_idx >= reached]
    if share is None:
        share = 1 / (1 + LAYER_COST * len(refitted) / job.plan.num_layers)
    streams = [_stream(job, batch.to(job.model.device), reached, share_of_text) for batch in job.batches(share)]
    folded: Folded = {}
    for kept, following in itertools.pairwise([*refitted, job.plan.num_layers]):
        for stream in streams:
            stream.original = _run(job, stream.given, stream.original, reached, following)
        reached = following
        for number, module in enumerate(modules):  # fitted together with those after it, which then adapt to it
            key = (kept, f"{module}.weight")
            folded[key] = _refit(job, kept, modules[number:], streams, folded, ridge)[key]
        if following == job.plan.num_layers:  # nothing comes behind it
            break
        with replaced(job.model, _of_layer(folded, kept)), torch.inference_mode():
            for stream in streams:
                output = stream.given.step(layers[kept], kept, stream.smaller)
                stream.smaller = stream.given.after(kept, output)
    return folded


def _stream(job: FoldJob, batch: Batch, first: int, share_of_text: float | None) -> Stream:
    """A batch at the input of the first layer that changes."""
    given = trace(job.model, batch)
    state = _run(job, given, given.entry, 0, first)
    return Stream(given, token_weights(batch.is_visual, batch.is_text, share_of_text), state, state)


def _run(job: FoldJob, given: Trace, state: Tensor, start: int, stop: int) -> Tensor:
    """The original model's state at the input of layer `stop`, from that at the input of layer `start`."""
    for layer_idx, _, output in walk(text_decoder(job.model).layers[:stop], given, start=start, state=state):
        state = given.after(layer_idx, output)
    return state


def token_weights(is_visual: Tensor, is_text: Tensor, share_of_text: float | None) -> Tensor:
    """Weights [B, S] of mean 1 over the counted tokens: all alike, or text with a given share of the total."""
    counted = (is_visual | is_text).float()
    if share_of_text is None or not is_visual.any() or not is_text.any():
        return counted
    visual = is_visual * ((1 - share_of_text) / is_visual.sum())
    return (visual + is_text * (share_of_text / is_text.sum())) * counted.sum()


def _refit(
    job: FoldJob, layer_idx: int, modules: Sequence[str], streams: Sequence[Stream], folded: Folded, ridge: float | str
) -> Folded:
    """The modules' weights, fitted together, that bring the layer's output closest to the original's state after it."""
    halves: list[Moments] = []
    biases = [job.read(layer_idx, f"{module}.bias") for module in modules]  # these stay what they are
    with replaced(job.model, _of_layer(folded, layer_idx)):
        for number, stream in enumerate(streams):
            inputs, wanted, weights = _regression(job, layer_idx, modules, stream)
            wanted = wanted - sum(bias.to(wanted) for bias in biases if bias is not None)
            if not halves:
                halves = [Moments.empty(inputs.shape[-1], wanted.shape[-1]) for _ in range(2)]
            halves[number % 2].add(inputs * weights, wanted * weights)
    old = [_weight(job, layer_idx, module) for module in modules]
    device = job.model.device if job.model.device.type == "cuda" else "cpu"  # others have no float64, or gain nothing
    new = solve(halves, torch.cat(old, dim=1), ridge, device).split([weight.shape[1] for weight in old], dim=1)
    return {
        (layer_idx, f"{module}.weight"): fitted.to(weight.dtype).contiguous()
        for module, fitted, weight in zip(modules, new, old, strict=True)
    }


def _regression(job: FoldJob, layer_idx: int, modules: Sequence[str], stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the modules side by side [N, P], what they should add up to [N, D], roots of the weights [N, 1]."""
    layer = text_decoder(job.model).layers[layer_idx]
    seen: list[tuple[Tensor, Tensor]] = []
    with contextlib.ExitStack() as taps, torch.inference_mode():
        for module in modules:
            taps.enter_context(on_module(layer.get_submodule(module), lambda x, y: seen.append((x, y))))
        output = stream.given.step(layer, layer_idx, stream.smaller)
    counted = stream.weights > 0  # [B, S]
    missing = (stream.original - stream.given.after(layer_idx, output)) / job.multiplier
    wanted = sum((put for _, put in seen), missing)
    return torch.cat([x[counted] for x, _ in seen], -1), wanted[counted], stream.weights[counted].sqrt()[:, None]


def _weight(job: FoldJob, layer_idx: int, module: str) -> Tensor:
    weight = job.read(layer_idx, f"{module}.weight")
    assert weight is not None, f"layer {layer_idx} has no {module}.weight"
    return weight


def solve(halves: Sequence[Moments], weight: Tensor, ridge: float | str, device: Any = "cpu") -> Tensor:
    """Refit on both halves of the data; ridge 'auto' is the one that serves each half best when fitted on the other."""

    def loss(ridge: float) -> float:
        return sum(a.error(b.refit(weight, ridge, device)) for a, b in (halves, halves[::-1]))

    if ridge == "auto":
        ridge = min(RIDGES, key=loss) if all(half.count for half in halves) else RIDGES[-1]
    return (halves[0] + halves[1]).refit(weight, float(ridge), device)


def _of_layer(folded: Folded, layer_idx: int) -> Folded:
    return {key: tensor for key, tensor in folded.items() if key[0] == layer_idx}
