"""vLLM's own classes, with a serving router between projector and decoder where a folder has one.

Each takes the place of the stock class under its architecture's name. Without an entry `serving_router` in config.json
nothing of a stock class changes. With one, a request with a budget comes with fewer placeholders (`ServedProcessor`),
and the router chooses as many rows of each picture (`ServedPictures`); the count is checked, never padded.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processor import processor_factory
from .served import ServedAxes, ServedPictures


def with_processor(stock: type) -> Any:
    """Register the stock class's multimodal processor for a class of ours, with a budget where a folder has one."""
    factories = stock._processor_factory  # type: ignore[attr-defined]
    return MULTIMODAL_REGISTRY.register_processor(
        processor_factory(factories.processor), info=factories.info, dummy_inputs=factories.dummy_inputs
    )


@with_processor(LlavaForConditionalGeneration)
class ServedLlava(ServedPictures, LlavaForConditionalGeneration):
    pass


@with_processor(LlavaNextForConditionalGeneration)
class ServedLlavaNext(ServedPictures, LlavaNextForConditionalGeneration):
    pass


@with_processor(InternS1ForConditionalGeneration)  # vLLM runs InternVL of transformers by this class
class ServedInternVL(ServedPictures, InternS1ForConditionalGeneration):
    pass


@with_processor(Qwen2_5_VLForConditionalGeneration)
class ServedQwen25VL(ServedAxes, Qwen2_5_VLForConditionalGeneration):
    pass


@with_processor(Qwen3VLForConditionalGeneration)
class ServedQwen3VL(ServedAxes, Qwen3VLForConditionalGeneration):
    pass
