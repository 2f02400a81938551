"""A checkpoint ready to answer, under a budget if it is routed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..checkpoints.source import Source, open_source
from ..clean_room import load_processor
from ..data.batches import Batch, by_size, check_prompt, make_batch
from ..data.calibration import load_calibration
from ..data.task import Task
from ..data.uses import check_not_kept_aside
from ..errors import InputError
from ..modeling.routed_route import Route
from ..models.answers import AnsweredBatch
from ..models.loading import compute_dtype, load_model, pick_device
from ..probe.stack import logits_of
from ..recipe import DEFAULT_SAMPLES, RunOptions
from ..routing.cost import Flops, few_prompts, flops_of
from ..routing.folder import load_routed
from ..routing.requests import TOLD, BudgetRequest
from ..routing.rules import block_influences, make_route
from ..routing.serving.folder import has_serving_router, load_served
from ..routing.serving.questions import question_ids


@dataclass
class Loaded:
    """A checkpoint ready to answer, under a budget if it is routed."""

    path: str
    source: Source
    model: Any
    processor: Any
    prompts: Sequence[Batch] = ()  # a few, to count what they cost
    unrouted: Flops = field(default_factory=Flops)  # what they cost without a budget
    influence: Tensor | None = None  # of layers, for the rule that needs it
    seed: int = 0
    request: BudgetRequest | None = None

    @property
    def influence_key(self) -> list[float] | None:
        """Return the influence of layers, as a fingerprint takes it."""
        return None if self.influence is None else self.influence.tolist()

    def route(self, batch: Batch) -> Route | None:
        """Return the route of questions, None for the model as it is."""
        if self.request is None or self.request.serving is not None:
            return None
        return make_route(
            self.model, batch, self.request.budget, self.request.rule, seed=self.seed, influence=self.influence
        )

    def serving_arguments(self, batch: Batch) -> dict[str, Any]:
        """Return what `generate` and `forward` take beside a batch of questions for a serving router; {} else."""
        if self.request is None or self.request.serving is None:
            return {}
        serving: dict[str, Any] = {"keep_visual_tokens": self.request.budget.keep_visual_tokens}
        if self.request.serving == TOLD:
            serving["question_ids"] = question_ids(batch.samples, self.processor)
        return serving

    def answer_logits(self, answered_batch: AnsweredBatch, route: Route | None) -> Tensor:
        """Return logits where answer tokens are predicted, [N, vocabulary]; `route` is that of the questions."""
        with torch.inference_mode():
            if serving := self.serving_arguments(answered_batch.batch):
                served = self.model(**answered_batch.batch.inputs, use_cache=False, **serving)
                served_logits: Tensor = served.logits[answered_batch.predicts]
                return served_logits
            if route is None:
                return logits_of(self.model, self.answer_states(answered_batch))
            last = answered_batch.predicts.shape[1] - route.keep.shape[1] + 1  # the prompt's last token and the answer
            output = self.model(**answered_batch.batch.inputs, route=route, use_cache=False, logits_to_keep=last)
            routed_logits: Tensor = output.logits[answered_batch.predicts[:, -last:]]
            return routed_logits

    def flops_shares(self) -> tuple[float, float] | tuple[None, None]:
        """Return the FLOPs of prompts as shares of those of the unrouted model: all of it, its decoder."""
        if self.request is None:
            return None, None
        flops = flops_of(self.model, self.prompts, self.request, seed=self.seed, influence=self.influence)
        return flops.total / self.unrouted.total, flops.decoder / self.unrouted.decoder

    def answer_states(self, answered_batch: AnsweredBatch) -> Tensor:
        """Return the last hidden states at the positions that predict answer tokens, [N, D]."""
        with torch.inference_mode():
            states: Tensor = self.model.base_model(**answered_batch.batch.inputs, use_cache=False).last_hidden_state[
                answered_batch.predicts
            ]
            return states


def load(
    path: str,
    options: RunOptions,
    requests: Sequence[BudgetRequest | None] = (None,),
    task: Task | None = None,
    calibration: str | None = None,
) -> Loaded:
    """Return the stock model; the one with its router if it is asked to run under a budget."""
    device = pick_device(options.device)
    source = open_source(path)
    dtype = compute_dtype(options.dtype, source.config, device)
    processor = load_processor(source.folder)
    if task is not None:
        check_prompt(task.samples, processor, source.config)
    if not any(requests):
        return Loaded(path, source, load_model(source, device, dtype, options.memory)[0], processor)
    open_model = load_served if has_serving_router(source) else load_routed
    model = open_model(source, device, dtype, options.memory)
    loaded = Loaded(path, source, model, processor)
    if task is not None:
        loaded.prompts = few_prompts(task.samples, processor, model.config)
        loaded.unrouted = flops_of(model, loaded.prompts, None)
    if any(request is not None and request.rule.layers == "shortgpt" for request in requests):
        if calibration is None:
            raise InputError("the rule 'shortgpt' measures layers on questions: give --calibration FILE.")
        loaded.influence = influence_of(loaded, calibration, options.batch_size)
    return loaded


def influence_of(loaded: Loaded, calibration: str, batch_size: int, seed: int = 0) -> Tensor:
    """Return the block influence of the layers, [L], on a few calibration questions."""
    check_not_kept_aside(calibration, "calibration")
    chosen = by_size(load_calibration(calibration, samples=DEFAULT_SAMPLES, seed=seed).samples)
    starts = ranks.share(range(0, len(chosen), batch_size))
    parts = (chosen[start : start + batch_size] for start in starts)
    return block_influences(loaded.model, (make_batch(part, loaded.processor, loaded.model.config) for part in parts))
