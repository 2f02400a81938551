"""What a compression would cost, before it is run: parameters, bytes, time and memory. Nothing is loaded or written."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .calibration import by_size, make_batches, spread
from .localize import FEW_SAMPLES
from .pipeline import Job, kv_bytes_per_token

LOOKED_AT = 16  # questions that are processed to learn how long they are
PASSES = {"tis": 1.15, "block_influence": 1.0, "angular": 1.0, "random": 0.0, "first": 0.0, "last": 0.0}
FEW_PASSES = {"best_of": 8.0, "fisher": 5.0}  # over the few questions that they read, answering included
ACTIVATION_COPIES = 12  # of [B, S, D] that a layer and its measurement hold at a time, roughly


@dataclass(frozen=True)
class Estimate:
    layers: int
    drop: int
    parameters: int
    parameters_after: int
    bytes: int
    bytes_after: int
    kv_bytes_per_token: int
    tokens: int
    seconds: float
    memory_bytes: int


def estimate(job: Job) -> Estimate:
    """Sizes are exact up to which layers go; time and memory are estimates for this machine."""
    per_layer = job.source.parameters_per_layer
    weights = job.source.weights
    gone = round(job.count * sum(per_layer) / len(per_layer))
    gone_bytes = round(
        job.count
        * sum(entry.num_bytes for name, entry in weights.entries.items() if job.source.layer_of(name) is not None)
        / len(per_layer)
    )
    tokens, longest = _tokens(job)
    width = job.source.config.get_text_config().hidden_size
    folds = 0.0 if job.fold.name == "none" else 1.0
    passes = _localizer_passes(job) + folds
    flops = passes * 2 * tokens * sum(per_layer)
    seconds = flops / _flops_per_second(job) + 2 * weights.num_bytes / 1e9
    memory = (
        weights.num_parameters * job.dtype.itemsize
        + ACTIVATION_COPIES * job.options.batch_size * longest * width * 4
        + 6 * width * width * 8
    )
    return Estimate(
        len(per_layer),
        job.count,
        weights.num_parameters,
        weights.num_parameters - gone,
        weights.num_bytes,
        weights.num_bytes - gone_bytes,
        kv_bytes_per_token(job.source.config, job.dtype),
        tokens,
        seconds,
        memory,
    )


def _localizer_passes(job: Job) -> float:
    """Forward passes over all calibration questions."""
    method = job.recipe.localizer
    if method.name in FEW_PASSES:
        few = method.options.get("samples", FEW_SAMPLES) / len(job.calibration.samples)
        return FEW_PASSES[method.name] * min(1.0, few)
    return PASSES.get(method.name, job.source.num_layers / 2 * max(job.count, 1))


def _tokens(job: Job) -> tuple[int, int]:
    """Tokens of all calibration questions, from a few of all sizes, and the longest of these."""
    samples = by_size(job.calibration.samples)
    lengths = [
        batch.is_visual.numel()
        for batch in make_batches(
            list(spread(samples, LOOKED_AT / len(samples))), job.processor, job.source.config, batch_size=1
        )
    ]
    return round(sum(lengths) / len(lengths) * len(samples)), max(lengths)


def _flops_per_second(job: Job, size: int = 1024) -> float:
    """Matrix products of a decoder's kind on the device, and two thirds of that for everything around them."""
    import torch

    a = torch.randn(size, size, dtype=job.dtype, device=job.device)
    for _ in range(3):
        a @ a
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best * 2 / 3
