"""What is timed: a model that sees, prefills and decodes. Plain and routed checkpoints in torch are one kind of it.

Another runtime is another class with the attributes and methods of `Subject`; what times it knows nothing else of it.

Shapes: B rows, S tokens of the prompt, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ..data.batches import Batch

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
GenerateKwargs = dict[str, Any]  # a budget as `generate` takes it: keep_visual_tokens and keep_layers, or preset


@dataclass(frozen=True)
class Setup:
    """How models are run."""

    device: str
    dtype: str = "auto"
    attention: str | None = None  # None: the checkpoint's own
    compile: bool = False  # the dense parts of decoder layers


@dataclass(frozen=True)
class Cost:
    """Counted, not timed. None where a runtime can't tell."""

    flops: int | None  # of prefill, by torch's counter
    vision_flops: int | None  # of see
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
        """None: it runs whole."""

    @property
    def routed(self) -> bool:
        """It has a router."""

    @property
    def runtime(self) -> str:
        """For people: 'torch, sdpa, float32'."""

    @property
    def processor(self) -> Any: ...

    @property
    def config(self) -> Any: ...

    @property
    def input_device(self) -> Any:
        """Return where prompts are to lie."""

    @property
    def gives_memory_back(self) -> bool:
        """Free what a run takes, so that the growth in another run can be measured."""

    def see(self, prompt: Batch) -> Any:
        """Vision tower and projector, on pixels that the processor has made already."""

    def prefill(self, prompt: Batch, seen: Any) -> Any:
        """From image features and token ids to the first answer token of each row, and a cache that holds the prompt;
        in a routed model the router too. A runtime that has the tower in this graph returns None from `see`."""

    def decode(self, state: Any) -> Any:
        """Return one more token for each row: in, and the next one out."""

    def cost(self, prompt: Batch, new_tokens: int) -> Cost:
        """Return what the three take in counted operations and bytes."""
