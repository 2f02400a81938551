"""Fewer placeholders for a picture, counted before it is encoded: a stock multimodal processor of vLLM with a budget.

Legend: N rows of a picture, n of them that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from exporter.modeling.served_router import OFF, ServingSettings, tokens_kept

from .folder import serving_settings
from .requests import ServedRequest, asked_for, without_keys

ROWS = "serving_rows"  # of a picture with a budget, for the model: [N, n]
QUESTION = "serving_question"  # the question's token ids, [Q]; none of them is a question that is not known


def processor_factory(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes the processor of a class: vLLM's own where a folder has no serving router."""

    def make(info: Any, dummy_inputs: Any) -> Any:
        processor = stock(info, dummy_inputs)
        settings = serving_settings(info.ctx.model_config)
        if settings is None:
            return processor
        served = served_class(type(processor))(info, dummy_inputs)
        served.serving = settings
        served.check_start()
        return served

    return make


def served_class(stock: Any) -> Any:
    return type(f"Served{stock.__name__}", (ServedProcessor, stock), {})


class ServedProcessor:
    """Mixed into a stock processor. What a request asks of the router never reaches transformers' processor."""

    info: Any
    serving: ServingSettings

    def check_start(self) -> None:
        """Raise ValueError where the engine's own options and a serving router exclude each other."""
        config = self.info.ctx.get_mm_config()
        if key := asked_for(config.mm_processor_kwargs or {}):
            raise ValueError(
                f"--mm-processor-kwargs names {key}: the budget of all requests is given by --hf-overrides "
                '\'{"serving_router": {"default": PRESET}}\'.'
            )
        if config.is_multimodal_pruning_enabled():
            raise ValueError(
                "--video-pruning-rate changes what a picture's rows are, and the serving router was trained on the "
                "stock ones: leave one of the two out."
            )
        vision = self.info.get_hf_config().vision_config
        if getattr(vision, "model_type", None) == "pixtral":
            raise ValueError(
                "this LLaVA has Pixtral's vision tower, whose pictures have line ends among their text: serving "
                f"routers do not run with it; serve the plain model without the entry, or with the preset {OFF!r}."
            )

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a prompt, its request put as `ServedRequest.normalised` has it; refuse what the router can't have."""
        vocabulary = self.info.get_hf_config().get_text_config().vocab_size
        request = ServedRequest.of(inputs.hf_processor_mm_kwargs, self.serving, vocabulary)
        if request.budget is not None and (videos := inputs.mm_data_items.get_all_counts().get("video", 0)):
            raise ValueError(
                f"a budget of visual tokens is for pictures, and this request has {videos} video(s): ask with the "
                f"preset {OFF!r}, or leave the video out."
            )
        inputs = replace(inputs, hf_processor_mm_kwargs=request.normalised())
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def get_dummy_inputs(self, *arguments: Any, **options: Any) -> Any:
        """Measure the engine's memory with all rows, which a request may ask for."""
        inputs = super().get_dummy_inputs(*arguments, **options)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={"preset": OFF})

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(mm_items, without_keys(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, without_keys(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Any:
        """Return what takes a placeholder's place in the prompt; tell the model the count that the prompt has now."""
        plain = without_keys(hf_processor_mm_kwargs)
        updates = super()._get_mm_prompt_updates(mm_items, plain, out_mm_kwargs)  # type: ignore[misc]
        budget = hf_processor_mm_kwargs.get("keep_visual_tokens")  # as `apply` has put it: no default comes after it
        if budget is None or not updates.get("image"):
            return updates
        question = torch.tensor(hf_processor_mm_kwargs.get("question_ids", ()), dtype=torch.long)
        shorter = []
        for item, (update,) in zip(out_mm_kwargs["image"], updates["image"], strict=True):
            content, rows = shortened(update.content, budget)
            item[ROWS], item[QUESTION] = of_item(torch.tensor(rows)), of_item(question)
            shorter.append([update.with_content(content)])
        return {**updates, "image": shorter}


def shortened(content: PromptUpdateDetails, budget: int | float) -> tuple[PromptUpdateDetails, tuple[int, int]]:
    """Return a picture's part of the prompt with the first n of its placeholders, all text around them, and (N, n)."""
    full: Sequence[int] = content.full
    is_row = [True] * len(full) if content.is_embed is None else content.is_embed(list(full)).tolist()
    number = sum(is_row)
    stays = tokens_kept(number, budget)
    leaves = number - stays
    tokens = []
    for token, row in zip(reversed(full), reversed(is_row), strict=True):
        if row and leaves:
            leaves -= 1
        else:
            tokens.append(token)
    return replace(content, full=tokens[::-1]), (number, stays)


def of_item(tensor: torch.Tensor) -> MultiModalFieldElem:
    """Return a picture's own argument for the model, which stays on the CPU: the count is read there."""
    return MultiModalFieldElem(data=tensor, field=MultiModalBatchedField(keep_on_cpu=True))
