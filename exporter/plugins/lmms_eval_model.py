"""A checkpoint as lmms-eval asks it: under a budget, which is logged, and with the very answers that `evaluate` gets.

    lmms-eval --model lvlm_exporter --model_args pretrained=DIR,preset=fast --tasks pope

Only answers that are generated greedily are to be had: nothing else is what a routed checkpoint's figures are of.
"""

from __future__ import annotations

import logging
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from ..clean_room import greedy_answers
from ..data.batches import make_batch
from ..data.chats import Turn
from ..data.samples import Sample
from ..errors import InputError
from ..evaluation.loaded import Loaded, load
from ..recipe import RunOptions
from ..routing.requests import BudgetGrid, BudgetRequest

logger = logging.getLogger("lmms_eval")
DEFAULT_ANSWER_TOKENS = 1024  # where a task names no max_new_tokens


class LvlmExporter(lmms):
    """A plain, compressed or routed checkpoint.

    Args:
        pretrained: folder or hub id.
        preset, keep_visual_tokens, keep_layers, flops: the budget; none: it runs whole, as in `lvlm-exporter evaluate`.
        rule, drop_at, calibration, seed: who chooses under it, as `lvlm-exporter evaluate` takes them.
        device, dtype, memory, batch_size: how it is run.
    Raises: InputError, in one sentence.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        preset: str | None = None,
        keep_visual_tokens: int | float | None = None,
        keep_layers: int | None = None,
        flops: float | None = None,
        rule: str = "router",
        drop_at: int | None = None,
        calibration: str | None = None,
        seed: int = 0,
        device: str | None = None,
        dtype: str = "auto",
        memory: str | None = None,
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise InputError(f"--model_args: lvlm_exporter has no argument '{next(iter(others))}'.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"--batch_size {batch_size}: a whole number from 1 up is needed.")
        self.batch_size = int(batch_size)
        request = budget_asked(
            pretrained,
            preset,
            keep_visual_tokens=keep_visual_tokens,
            keep_layers=keep_layers,
            flops=flops,
            rule=rule,
            drop_at=drop_at,
        )
        options = RunOptions(device=device, dtype=dtype, memory=memory, batch_size=self.batch_size)
        self.loaded: Loaded = load(pretrained, options, [request], calibration=calibration)
        self.loaded.request, self.loaded.seed = request, seed
        logger.warning("lvlm_exporter: %s under %s", pretrained, request or "no budget: all of it runs")

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Return the greedy answers to all requests, in their order."""
        questions = [self._question(request.args) for request in requests]
        order = sorted(range(len(requests)), key=lambda n: (str(requests[n].args[2]), questions[n].pixels, n))
        answers: dict[int, GenerationResult] = {}
        while order:
            settings = requests[order[0]].args[2]
            batch = [n for n in order[: self.batch_size] if requests[n].args[2] == settings]
            batch = [n for n in batch if questions[n].kind == questions[order[0]].kind]
            order = [n for n in order if n not in set(batch)]
            for number, answer in zip(batch, self._answer([questions[n] for n in batch], settings), strict=True):
                answers[number] = answer
        return [answers[number] for number in range(len(requests))]

    def _question(self, arguments: tuple[Any, ...]) -> Sample:
        _, doc_to_messages, _, doc_id, task, split = arguments
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        images = tuple(part["url"] for turn in messages for part in turn["content"] if part["type"] == "image")
        if any(part["type"] not in ("image", "text") for turn in messages for part in turn["content"]):
            raise InputError(f"task {task}: lvlm_exporter takes images and text, not video or sound.")
        turns: list[Turn] = [
            {"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in messages
        ]
        return Sample(f"{task} {split} {doc_id}", images, tuple(turns))

    def _answer(self, questions: list[Sample], settings: dict[str, Any]) -> list[GenerationResult]:
        if settings.get("do_sample") or (settings.get("num_beams") or 1) > 1 or (settings.get("temperature") or 0) > 0:
            raise InputError("lvlm_exporter answers greedily: a task with do_sample, num_beams or temperature is none.")
        loaded = self.loaded
        batch = make_batch(questions, loaded.processor, loaded.model.config).to(loaded.model.device)
        longest = settings.get("max_new_tokens") or DEFAULT_ANSWER_TOKENS
        tokens = greedy_answers(
            loaded.model, batch.inputs, longest, route=loaded.route(batch), **loaded.serving_arguments(batch)
        )
        texts = loaded.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        until = settings.get("until") or []
        return [
            GenerationResult(_cut(text.strip(), until), TokenCounts(output_tokens=len(row)))
            for text, row in zip(texts, tokens.tolist(), strict=True)
        ]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse: figures of these checkpoints are of generated answers."""
        raise NotImplementedError("lvlm_exporter generates answers: choose a task of output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse: a route holds for one answer."""
        raise NotImplementedError("lvlm_exporter answers one question at a time, not in rounds.")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _cut(text: str, until: str | list[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def budget_asked(
    pretrained: str,
    preset: str | None,
    keep_visual_tokens: int | float | None,
    keep_layers: int | None,
    flops: float | None,
    rule: str,
    drop_at: int | None,
) -> BudgetRequest | None:
    """Return the budget that the arguments name, checked against the folder; None for the model as it is."""
    from ..checkpoints.source import open_source

    grid = BudgetGrid(
        keep_visual_tokens=() if keep_visual_tokens is None else (keep_visual_tokens,),
        keep_layers=() if keep_layers is None else (keep_layers,),
        presets=() if preset is None else (preset,),
        flops=() if flops is None else (flops,),
        rule=rule,
        drop_at=drop_at,
    )
    requests = grid.requests_for(open_source(pretrained))
    if len(requests) != 1:
        raise InputError(
            f"lvlm_exporter runs under one budget, and {len(requests)} are named: leave out preset, or the rest."
        )
    return requests[0]
