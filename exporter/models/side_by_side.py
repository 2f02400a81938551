"""Several tasks through one loaded layer after the other: what they share of the layers on disk is read once."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from .loading import text_decoder
from .residency import held, ranges_of

T = TypeVar("T")
Task = Generator[tuple[int, ...], None, T]  # asks for layers, that are in memory when it goes on


def side_by_side(model: Any, tasks: Sequence[Task[T]]) -> list[T]:
    """Run tasks that go through the layers in their order, and return what they return.

    The one that is furthest behind goes on first. One by one where all layers are in memory.
    """
    if ranges_of(model) is None and len(tasks) > 1:
        return [side_by_side(model, [task])[0] for task in tasks]
    layers, results = text_decoder(model).layers, dict[int, T]()
    waiting: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(tasks)), ())  # layers that each asks for
    current: dict[int, contextlib.ExitStack] = {}
    with contextlib.ExitStack() as whole:
        while waiting:
            needed = min(waiting.values(), key=lambda some: max(some, default=-1))
            needed_by_any = {layer_idx for some in waiting.values() for layer_idx in some}
            for layer_idx in [held_idx for held_idx in current if held_idx not in needed_by_any]:
                current.pop(layer_idx).close()
            for layer_idx in needed:
                if layer_idx not in current:
                    following = layers[layer_idx + 1] if layer_idx + 1 < len(layers) else None
                    current[layer_idx] = whole.enter_context(contextlib.ExitStack())
                    current[layer_idx].enter_context(held(layers[layer_idx], following=following))
            for number in [number for number, some in waiting.items() if current.keys() >= set(some)]:
                try:
                    waiting[number] = next(tasks[number])
                except StopIteration as end:
                    results[number] = end.value
                    del waiting[number]
    return [results[number] for number in range(len(tasks))]
