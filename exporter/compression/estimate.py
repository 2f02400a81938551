"""What a compression would cost, before it is run: parameters, bytes, time and memory. Nothing is loaded or written."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..data.batches import by_size, make_batches, spread
from ..fold.reconstruction import refitted_share
from ..localize.best_of import EXCHANGES, PROPOSERS, ROUNDS, SPARE
from ..models.flops import kv_bytes_per_token
from ..models.questions import portion
from ..plan import PruningPlan, make_plan
from .job import CompressionJob

LOOKED_AT = 16  # questions that are processed to learn how long they are
ANSWER_GUESS = 16  # tokens of an answer: how long they are is not known before the model is run
PASSES = {"tis": 1.15, "block_influence": 1.0, "angular": 1.0}
SUFFIX = 0.5  # share of the layers that a variant does not share with the original, roughly
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
    forward_passes: float
    seconds: float
    memory_bytes: int


def estimate(job: CompressionJob) -> Estimate:
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
    passes = forward_passes(job, tokens / len(job.calibration.samples))
    flops = passes * 2 * tokens * sum(per_layer)
    seconds = flops / _flops_per_second(job) + 2 * weights.num_bytes / 1e9
    memory = (
        weights.num_parameters * job.dtype.itemsize
        + ACTIVATION_COPIES * job.options.batch_size * longest * width * 4
        + 6 * width * width * 8
        + _streams(job, tokens) * width * job.dtype.itemsize
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
        passes,
        seconds,
        memory,
    )


def forward_passes(job: CompressionJob, prompt_tokens: float) -> float:
    """What localizing and folding cost, in passes of all prompts through all decoder layers, answering included.

    Args:
        prompt_tokens: of a question, on average.
    """
    questions, layers, count = len(job.calibration.samples), job.source.num_layers, job.count
    plan = make_plan(layers, range(layers - max(count, 1) - 1, layers - 1)[-layers + 1 :])  # where most choices lie
    longer = 1 + min(ANSWER_GUESS, job.recipe.calibration.answer_tokens) / prompt_tokens  # with its answer
    localizing, ranked = _localizing(job, questions, layers, count)
    folding, fitted = _folding(job, questions, plan) if count else (0.0, 0.0)
    return longer * (max(ranked, fitted) + localizing + folding)


def _streams(job: CompressionJob, tokens: int) -> float:
    """States that a refit holds: the original and the smaller model's, of all questions that it is fitted on."""
    if job.fold.name not in ("auto", "reconstruction"):
        return 0.0
    return 2 * tokens * _share("fit", len(job.calibration.samples))


def _share(name: str, questions: int) -> float:
    return portion(name, questions) / questions


def _localizing(job: CompressionJob, questions: int, layers: int, count: int) -> tuple[float, float]:
    """Passes of the localizer, and the share of the questions that it needs answers to."""
    method = job.recipe.localizer
    if job.recipe.budget.layers is not None or method.name in ("random", "first", "last"):
        return 0.0, 0.0
    if method.name == "fisher":
        few = min(1.0, method.options.get("samples", 64) / questions)
        return 4 * few, 1.0
    if method.name != "best_of":
        return PASSES.get(method.name, layers / 2 * max(count, 1)), 1.0
    used = _share("fit", questions) + _share("held_out", questions)
    exchanges = method.options.get("exchanges", EXCHANGES)
    sets = len(PROPOSERS) + 1 + exchanges * (2 * count + SPARE)
    passes = 1.15 * _share("rank", questions) + _share("sets", questions) * (1 + sets * SUFFIX)
    if method.options.get("folded", True):
        first, few = (number for number, _ in ROUNDS)
        passes += _share("fold_sets", questions) * (1 + first * 2 * SUFFIX)
        passes += _share("judge_sets", questions) * (1 + first * SUFFIX)
        passes += _share("judge_few_sets", questions) * (1 + few * SUFFIX)
    return passes, used


def _folding(job: CompressionJob, questions: int, plan: PruningPlan) -> tuple[float, float]:
    """Passes of the fold, and the share of the questions that it needs answers to."""
    name = job.fold.name
    if name == "none":
        return 0.0, 0.0
    refitted = 1 + 3 * SUFFIX  # a question in all layers, and three times in those that are refitted
    if name == "reconstruction":
        return refitted_share(plan) * refitted, 1.0
    if name != "auto":
        return 1.0, 1.0
    fit = job.fold.options.get("fitted_on") or portion("fit", questions)
    used = fit / questions + _share("held_out", questions)
    judging = _share("judge_sets", questions) * (1 + 4 * SUFFIX) + _share("held_out", questions) * (1 + 3 * SUFFIX)
    return fit / questions * (0.5 + refitted) + judging, used


def _tokens(job: CompressionJob) -> tuple[int, int]:
    """Tokens of all calibration questions, from a few of all sizes, and the longest of these."""
    samples = by_size(job.calibration.samples)
    lengths = [
        batch.is_visual.numel()
        for batch in make_batches(
            list(spread(samples, LOOKED_AT / len(samples))), job.processor, job.source.config, batch_size=1
        )
    ]
    return round(sum(lengths) / len(lengths) * len(samples)), max(lengths)


def _flops_per_second(job: CompressionJob, size: int = 1024) -> float:
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
