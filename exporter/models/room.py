"""Memory that layers from disk share with the states between them.

Passes go through the layers in the same order, again and again: what was used last is then what is wanted last, and to
keep that would be worth nothing. So those layers stay that are furthest behind, pass after pass, and the others come
and go before them. The last ones and not the first: a pass may begin late, where two variants part, and goes to the
end. Layers that stay give way to states: a state that has to lie in a file is written and read at every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class InMemory:
    """A layer from disk whose weights are in memory."""

    number: int  # in the order in which layers run
    users: int = 0  # that hold it
    num_bytes: int = 0
    _modules: dict[int, tuple[Any, Any, dict[str, Any], int]] = field(default_factory=dict)  # by hook, what was there

    def add(self, module: Any, hook: Any, tensors: dict[str, Tensor]) -> None:
        """Give a module its weights."""
        there = {name: tensor.to(hook.execution_device) for name, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in there.values())
        self._modules[id(hook)] = module, hook, {name: module._parameters[name] for name in there}, size
        self.num_bytes += size
        for name, tensor in there.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        hook.offload, hook.held, hook.kept = False, True, self

    def let_go(self, hook: Any = None) -> None:
        """Leave the weights on disk again: of all modules, or of that with a hook."""
        for key in list(self._modules) if hook is None else [id(hook)] if id(hook) in self._modules else []:
            module, its_hook, parameters, size = self._modules.pop(key)
            module._parameters.update(parameters)
            its_hook.offload, its_hook.held, its_hook.kept = True, False, None
            self.num_bytes -= size


@dataclass(eq=False)
class Room:
    """Bytes for layers from disk, beside the one that is read ahead, and for states between layers.

    Args:
        num_bytes: for both.
        for_states: of these, at most: layers in use need the rest; None: any number.
    """

    num_bytes: int
    for_states: int | None
    states: int = 0
    layers: dict[int, InMemory] = field(default_factory=dict)  # by the identity of the layer

    def make(self, num_bytes: int) -> None:
        """Let go of layers that nobody holds, until so much more fits or none of them is left."""
        idle = sorted((kept for kept in self.layers.values() if not kept.users), key=lambda kept: kept.number)
        for kept in idle:
            if self.used + num_bytes <= self.num_bytes:
                break
            self.forget(kept)

    def take(self, num_bytes: int) -> bool:
        """Take room for a state; return whether there is any."""
        if self.for_states is not None and self.states + num_bytes > self.for_states:
            return False
        self.make(num_bytes)
        self.states += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Give up what a state took."""
        self.states -= num_bytes

    @property
    def used(self) -> int:
        return self.states + sum(kept.num_bytes for kept in self.layers.values())

    def forget(self, *some: InMemory) -> None:
        """Let layers go."""
        for kept in some:
            kept.let_go()
        self.layers = {key: kept for key, kept in self.layers.items() if kept not in some}
