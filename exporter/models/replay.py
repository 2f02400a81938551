"""Running a model's decoder layers one at a time, in any order and number, for every family alike.

One call of the model with its layers switched off records what it hands to each layer (masks, rotary embeddings) and
what it adds between layers (Qwen3-VL's deepstack features). After that a layer is a function of the hidden state: the
vision tower and the embeddings are run once a batch, prefixes that several variants share are run once, layers can be
left out or replaced.

Shapes: B samples, S tokens, L layers, D hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..plan import Folded
from ..probe.stack import head_logits
from .loading import text_decoder
from .residency import let_go

LENGTHS: dict[type, int] = {}  # of the tuple that layers of a class return; 0: they return the hidden state alone


@dataclass(frozen=True)
class Trace:
    """The inputs of a model's layers for one batch."""

    entry: Tensor  # [B, S, D] input of layer 0
    keywords: tuple[dict[str, Any], ...]  # per layer, without the hidden state
    added: dict[int, Tensor] = field(default_factory=dict)  # [B, S, D] what the model adds after a layer

    def step(self, layer: Any, layer_idx: int, state: Tensor) -> Tensor:
        """Return what the layer puts out for this state, [B, S, D]; nothing added yet."""
        output = layer(state, **self.keywords[layer_idx])
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    def after(self, layer_idx: int, output: Tensor) -> Tensor:
        """Return the state that the next layer gets."""
        return output + self.added[layer_idx] if layer_idx in self.added else output


@contextlib.contextmanager
def switched_off(layers: Sequence[Any], record: list[tuple[Tensor, dict[str, Any]]] | None = None) -> Iterator[None]:
    """Replace the layers by the identity, recording what each is called with."""

    def identity_of(layer: Any) -> Callable[..., Any]:
        real = layer.forward
        names = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]

        def identity(*args: Any, **kwargs: Any) -> Any:
            keywords = dict(zip(names, args, strict=False)) | kwargs
            if type(layer) not in LENGTHS:  # annotations don't tell: Gemma 3's are those of years ago
                with torch.no_grad():
                    output = real(**keywords)
                LENGTHS[type(layer)] = len(output) if isinstance(output, tuple) else 0
            hidden_states = keywords.pop(names[0])
            if record is not None:
                record.append((hidden_states, keywords))
            length = LENGTHS[type(layer)]
            return (hidden_states, *[None] * (length - 1)) if length else hidden_states

        return identity

    with forwards_replaced(layers, lambda layer_idx, _: identity_of(layers[layer_idx])):
        yield


@contextlib.contextmanager
def forwards_replaced(layers: Sequence[Any], wrap: Callable[[int, Any], Any]) -> Iterator[None]:
    """Put `wrap(layer_idx, forward)` in place of each layer's forward until the block ends."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer_idx, layer in enumerate(layers):
        layer.forward = wrap(layer_idx, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:  # accelerate's hooks put their own there
                layer.forward = forward


def trace(model: Any, batch: Batch, mode: Callable[[], Any] = torch.inference_mode) -> Trace:
    """Run everything but the decoder layers: vision tower, embeddings, masks, rotary embeddings.

    Args:
        mode: torch.no_grad where gradients of what the layers make of it are wanted.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    layers = text_decoder(model).layers
    with mode(), switched_off(layers, calls):
        model.base_model(**batch.inputs, use_cache=False)
    states = [state for state, _ in calls]
    added = {i: after - before for i, (before, after) in enumerate(itertools.pairwise(states)) if after is not before}
    return Trace(states[0], tuple(kwargs for _, kwargs in calls), added)


def walk(
    layers: Sequence[Any],
    traced: Trace,
    *,
    start: int = 0,
    stop: int | None = None,
    state: Tensor | None = None,
    leave_out: frozenset[int] | set[int] = frozenset(),
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run the layers, yielding (layer_idx, input, output) [B, S, D] of each that is not left out.

    A layer that is left out hands on what it gets, as if it had been removed; layers keep their own masks and rotary
    embeddings. From `start`, whose input `state` is (layer 0: the embeddings), up to and with `stop`.
    """
    state = traced.entry if state is None else state
    for layer_idx in range(start, len(layers) if stop is None else min(stop + 1, len(layers))):
        if layer_idx in leave_out:
            state = traced.after(layer_idx, state)
            continue
        before = state
        with torch.inference_mode():
            output = traced.step(layers[layer_idx], layer_idx, before)
            state = traced.after(layer_idx, output)
        yield layer_idx, before, output


def last_outputs(layers: Sequence[Any], traced: Trace, sets: Sequence[frozenset[int]]) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, last output [B, S, D]) of the layers without each of the sets.

    Sets share every layer up to where they part: what several begin with is run once. At most one state is held for
    each layer of a set.
    """

    def run(start: int, state: Tensor, output: Tensor, numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
        for layer_idx in range(start, len(layers)):
            without = [number for number in numbers if layer_idx in sets[number]]
            if len(without) == len(numbers):
                state = traced.after(layer_idx, state)
                continue
            if without:
                yield from run(layer_idx + 1, traced.after(layer_idx, state), output, without)
                numbers = [number for number in numbers if number not in without]
            with torch.inference_mode():
                output = traced.step(layers[layer_idx], layer_idx, state)
                state = traced.after(layer_idx, output)
        for number in numbers:
            yield number, output

    yield from run(0, traced.entry, traced.entry, list(range(len(sets))))


def last_output(steps: Iterator[tuple[int, Tensor, Tensor]], default: Tensor) -> Tensor:
    """Run a walk to its end: the last layer's output."""
    last = deque(steps, maxlen=1)
    return last[0][2] if last else default


def logits(model: Any, output: Tensor) -> Tensor:
    """Return the language-model head on the last layer's output, [..., D] to [..., vocabulary]."""
    with torch.inference_mode():
        return head_logits(model, output)


@contextlib.contextmanager
def replaced(model: Any, folded: Folded) -> Iterator[None]:
    """Put new tensors into the model in place of its own, until the block ends."""
    layers = text_decoder(model).layers
    with contextlib.ExitStack() as stack:
        for (layer, full_name), tensor in folded.items():
            path, _, name = full_name.rpartition(".")
            stack.enter_context(_replaced_in(layers[layer].get_submodule(path), name, tensor))
        yield


@contextlib.contextmanager
def _replaced_in(module: Any, name: str, tensor: Tensor) -> Iterator[None]:
    let_go(module)  # what is kept for later is of the model as it came
    parameter = module.get_parameter(name)
    tensor = tensor.to(dtype=parameter.dtype)
    hook = getattr(module, "_hf_hook", None)
    if parameter.is_meta and hook is not None:  # accelerate reads it from disk whenever the module runs
        before = hook.weights_map
        hook.weights_map = ChainMap({name: tensor}, before)
        try:
            yield
        finally:
            hook.weights_map = before
        return
    data = parameter.data
    parameter.data = tensor.to(parameter.device)
    try:
        yield
    finally:
        parameter.data = data
