"""Samples a second with fewer layers, timed in turn with the original, as the papers' tables have it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..clean_room import greedy_answers
from ..compression.job import prepare
from ..data.batches import Batch, make_batch
from ..errors import InputError
from ..evaluation.metrics.task import compared_task
from ..models.variants import Variant, assembled
from ..plan import make_plan
from ..progress import Progress
from ..recipe import RunOptions
from .grid import Grid

Ratio = tuple[float, float, float]  # samples a second as a ratio to the original's: median, lowest, highest


@dataclass(frozen=True)
class Timing:
    """How long is timed."""

    samples: int = 8  # questions, one after the other
    rounds: int = 5
    new_tokens: int = 16  # of each answer, no fewer: what is said must not decide

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"speed: {name}={value!r}: a whole number from 1 up is needed.")


def samples_per_second(
    grid: Grid, drops: Mapping[int, tuple[int, ...]], timing: Timing, options: RunOptions, progress: Progress
) -> dict[int, Ratio]:
    """Time whole answers with and without layers in turn; folds change nothing about it.

    Args:
        drops: layers that go, by their number.
    Returns: the ratio by number of dropped layers.
    """
    job = prepare(grid.recipe(), options, progress)
    model, _ = job.load_model()
    samples = compared_task(grid.task, timing.samples, grid.questions_seed).samples
    batches = [make_batch([sample], job.processor, job.source.config).to(model.device) for sample in samples]
    plans = {0: (), **drops}
    times: dict[int, list[float]] = {count: [] for count in plans}
    for number in progress(range(timing.rounds + 1), "time answers", timing.rounds + 1):
        for count, drop in plans.items():
            with assembled(model, Variant(make_plan(job.source.num_layers, drop))):
                seconds = _seconds(model, batches, timing.new_tokens)
            if number:  # the first round warms up
                times[count].append(seconds)
    ratios = {count: [whole / few for whole, few in zip(times[0], times[count], strict=True)] for count in drops}
    return {count: (statistics.median(values), min(values), max(values)) for count, values in ratios.items()}


def _seconds(model: Any, batches: list[Batch], new_tokens: int) -> float:
    begin = time.monotonic()
    for batch in batches:
        greedy_answers(model, batch.inputs, new_tokens).sum().item()  # waits for an accelerator
    return time.monotonic() - begin
