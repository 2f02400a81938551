"""The interface that is timed: a model that encodes images, prefills and decodes, in torch or ONNX.

Another runtime is another class with the attributes and methods of `Subject`; what times it knows nothing else of it.

Shapes: B sequences, S tokens of the prompt, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..data.batches import Batch
from ..errors import InputError

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
GenerateKwargs = dict[str, Any]  # a budget as `generate` takes it: keep_visual_tokens and keep_layers, or preset


@dataclass(frozen=True)
class Setup:
    """Settings under which models run."""

    device: str
    dtype: str = "auto"
    attention: str | None = None  # None: the checkpoint's own
    compile: bool = False  # the dense parts of decoder layers


@dataclass(frozen=True)
class Cost:
    """Counted, not timed. None where a runtime can't tell."""

    flops: int | None  # of prefill, by torch's counter
    vision_flops: int | None  # of encode_images
    decode_flops: int | None  # of the first decoding step
    kv_bytes: int | None  # keys and values of the prompt: the sizes of the cache's tensors
    kv_bytes_formula: int | None  # the same from configuration, prompt and route
    weight_bytes: int  # of the whole model
    step_bytes: int | None  # what a decoding step reads: weights of the layers that run, head, keys and values


class Subject(Protocol):
    """A model ready to be timed, under one budget."""

    @property
    def path(self) -> str: ...

    @property
    def budget(self) -> GenerateKwargs | None:
        """Return the budget; None: the model runs whole."""

    @property
    def routed(self) -> bool:
        """Tell whether it has a router."""

    @property
    def runtime(self) -> str:
        """Return the runtime's name for people: 'torch, sdpa, float32'."""

    @property
    def processor(self) -> Any: ...

    @property
    def config(self) -> Any: ...

    @property
    def input_device(self) -> Any:
        """Return the device that prompts must lie on."""

    @property
    def gives_memory_back(self) -> bool:
        """Tell whether a run's memory is freed, so that the growth in another run can be measured."""

    def encode_images(self, prompt: Batch) -> Any:
        """Run the vision tower and the projector on pixels that the processor has made already."""

    def prefill(self, prompt: Batch, seen: Any) -> Any:
        """Return each sequence's first answer token, and a cache that holds the prompt.

        It takes image features and token ids. In a routed model the router runs too. A runtime that has the tower in
        this graph encodes images here.
        """

    def decode(self, state: Any) -> Any:
        """Return one more token for each sequence: in, and the next one out."""

    def cost(self, prompt: Batch, new_tokens: int) -> Cost:
        """Return what the three take in counted operations and bytes."""


def budget_to_run(
    path: str, request: GenerateKwargs | None, default: str, checked: Callable[..., Any]
) -> GenerateKwargs | None:
    """Return the budget that a routed model is timed under, None where it is none: the model runs whole.

    Args:
        request: None: the model's own default.
        default: the preset of that name.
        checked: gives the budget of `generate`'s keyword arguments, with numbers of Python. Raises ValueError.
    """
    request = {"preset": default} if request is None else request
    try:
        budget = checked(**request)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if budget.is_off:
        return None
    return request if "preset" in request else {name: getattr(budget, name) for name in request}
