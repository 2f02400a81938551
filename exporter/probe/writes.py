"""Which linear maps of a decoder layer write into the residual stream, found by disturbing each and looking.

A map writes directly where a change of its output changes the layer's output by as much (times one constant) at every
token: then a matrix from the left can be moved into its weights, and a fold is exact. Where a norm or a gate follows,
the change arrives as another one.

Shapes: B samples, S tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .stack import check_stack, run_text, token_inputs

CLOSE = 1e-3  # of two changes, relative to the larger


@dataclass(frozen=True)
class LayerWrites:
    """The maps by which one decoder layer adds to the residual stream."""

    attention: str | None  # name inside the layer of the map that mixes tokens, if it can be folded into
    mlp: str | None  # the last map of the feed-forward part, if it can be folded into
    factor: float = 1.0  # that multiplies what they write
    follows: str = ""  # what stands between the feed-forward part and the residual stream: a norm's name


def layer_writes(layer: nn.Module, step: Callable[[Tensor], Tensor], state: Tensor) -> LayerWrites:
    """Find the maps of one layer.

    Args:
        step: runs the layer on a state [B, S, D] and returns its output [B, S, D].
        state: an input of the layer, of the kind that it sees.
    """
    order = _called_in_order(layer, step, state)
    before = step(state)
    change = torch.randn(state.shape[-1], generator=torch.Generator().manual_seed(1)).to(state) * before.std()
    direct: list[tuple[str, float]] = []  # from the last to the first
    last: set[str] = set()  # those after which nothing else writes
    for name in reversed(order):
        module = layer.get_submodule(name)
        with _disturbed(module, change):
            factor = _constant(step(state) - before, change)
        if factor is not None:
            last.add(name)
        elif direct:
            # What writes later may pass a change on as well: silence it, but for what has no weights (dropout).
            later = [layer.get_submodule(other) for other, _ in direct if not _inside(name, other)]
            with _zeroed([other for other in later if any(True for _ in other.parameters())]):
                base = step(state)
                with _disturbed(module, change):
                    factor = _constant(step(state) - base, change)
        if factor is not None:
            direct.append((name, factor))
    return _sorted_out(layer, direct, last)


def _inside(name: str, outer: str) -> bool:
    return name.startswith(outer + ".")


def _called_in_order(layer: nn.Module, step: Callable[[Tensor], Tensor], state: Tensor) -> list[str]:
    """Return the names of submodules that put out a state [B, S, D], in the order in which they end."""
    names: list[str] = []
    with contextlib.ExitStack() as hooks:
        for name, module in layer.named_modules():
            if not name:
                continue

            def ended(_: Any, __: Any, output: Any, name: str = name) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if (
                    isinstance(tensor, Tensor)
                    and tensor.numel() == state.numel()
                    and tensor.shape[-1] == state.shape[-1]
                ):
                    names.append(name)

            hooks.callback(module.register_forward_hook(ended).remove)
        step(state)
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def _disturbed(module: nn.Module, change: Tensor) -> Iterator[None]:
    """Add a vector [D] to what the module puts out for every token."""
    with _changed(module, lambda tensor: tensor + change):
        yield


@contextlib.contextmanager
def _zeroed(modules: list[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_changed(module, lambda tensor: tensor * 0))
        yield


@contextlib.contextmanager
def _changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _constant(arrived: Tensor, change: Tensor) -> float | None:
    """Return the factor with which a change arrived, if it did so alike at every token; None if it did not."""
    factor = float((arrived * change).sum() / (change.square().sum() * arrived[..., 0].numel()))
    error = (arrived - factor * change).abs().max() / change.abs().max()
    return round(factor, 4) if factor and float(error) <= CLOSE * max(1.0, abs(factor)) else None


def _sorted_out(layer: nn.Module, direct: list[tuple[str, float]], last: set[str]) -> LayerWrites:
    """Tell the map that mixes tokens from the one behind it; a layer of one part has the latter only."""
    linear = {name: factor for name, factor in direct if isinstance(layer.get_submodule(name), nn.Linear)}
    feeding = [name for name in linear if name in last or not is_mixer(name.split(".")[0])]
    mixing = [name for name in linear if name not in feeding]
    factors = {linear[name] for name in [*mixing[:1], *feeding[:1]]} or {1.0}
    norms = [name for name, _ in direct if "norm" in name]
    if len(factors) > 1:
        return LayerWrites(None, None, 1.0, "another factor for each of its maps")
    return LayerWrites(
        mixing[0] if mixing else None,
        feeding[0] if feeding else None,
        factors.pop(),
        "" if feeding else next(iter(norms), ""),
    )


@dataclass(frozen=True)
class Watched:
    """What the layers of a model are given and put out in a pass, in running order."""

    before: list[Tensor] = field(default_factory=list)  # [B, S, D]
    after: list[Tensor] = field(default_factory=list)  # [B, S, D]
    keywords: list[dict[str, Any]] = field(default_factory=list)  # beside the states


@contextlib.contextmanager
def watched(layers: Iterable[nn.Module]) -> Iterator[Watched]:
    """Note what layers are given and put out until the block ends."""
    noted = Watched()

    def enters(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        noted.before.append(named.pop(names[0]))
        noted.keywords.append(named)

    def leaves(_: Any, __: Any, output: Any) -> None:
        noted.after.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(enters, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leaves).remove)
        yield noted


@contextlib.contextmanager
def putting_out(layer: nn.Module, states: Tensor) -> Iterator[None]:
    """Let a layer put out these states, [B, S, D], whatever it is given, until the block ends."""
    with _changed(layer, lambda _: states):
        yield


@contextlib.contextmanager
def adding(layers: Any, features: dict[int, Tensor]) -> Iterator[None]:
    """Add features [B, S, D] to what layers put out, by their numbers, until the block ends."""
    with contextlib.ExitStack() as stack:
        for layer_idx, extra in features.items():
            stack.enter_context(_changed(layers[layer_idx], functools.partial(torch.add, extra)))
        yield


@contextlib.contextmanager
def calls_of(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Note what a module is given in each of its calls, by name, until the block ends."""
    names, calls = list(inspect.signature(type(module).forward).parameters)[1:], []

    def enters(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = module.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def is_mixer(name: str) -> bool:
    """Tell whether a part of a layer, by its name, mixes tokens: attention, convolution, a state space."""
    words = ("attn", "attention", "conv", "mamba", "ssm", "mixer")
    return "norm" not in name and any(word in name for word in words)  # post_attention_layernorm mixes nothing


def layers_at_work(model: Any) -> list[tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]]:
    """Return each decoder layer with a function that runs it alone, and the state that it sees in a run on text."""
    layers = list(check_stack(model).layers)
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: calls.__setitem__(index, (args, dict(kwargs))), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        run_text(model, token_inputs(model.config), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [_at_work(layers[index], *call) for index, call in sorted(calls.items())]


def _at_work(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    state = args[0] if args else kwargs.pop("hidden_states")

    def step(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            output = layer(hidden, *args[1:], **kwargs)
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        return tensor

    return layer, step, state
