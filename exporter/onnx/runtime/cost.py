"""What a share of the operations buys: the arithmetic of `exporter/modeling/routed_cost.py`, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class PromptCost:
    """Operations of a prompt in the decoder and in the router, counted as torch's counter does."""

    layers: tuple[int, ...]  # weights of each layer's linear maps
    width: int  # of the queries of all heads
    router_token: int  # weights that a token passes in the router
    router_layer: int  # and the embedding of a layer that may be skipped
    router_width: int
    drop_at: int
    candidates: tuple[int, ...]

    @classmethod
    def of(cls, facts: dict[str, Any]) -> PromptCost:
        counts = facts["budgets"]["cost"]
        router = {"drop_at": facts["drop_at"], "candidates": tuple(facts["candidates"])}
        return cls(**{**counts, "layers": tuple(counts["layers"])}, **router)

    def layer(self, layer_idx: int, tokens: int) -> int:
        return 2 * tokens * self.layers[layer_idx] + 4 * tokens**2 * self.width

    def whole(self, length: int) -> int:
        return sum(self.layer(i, length) for i in range(len(self.layers)))

    def routed(self, length: int, visual: int, kept: int, layers: int) -> int:
        short, number = length - visual + kept, len(self.candidates)
        costs = [self.layer(i, length if i < self.drop_at else short) for i in range(len(self.layers))]
        cheapest = sorted(costs[i] for i in self.candidates)
        router = 2 * (length * self.router_token + number * self.router_layer)
        router += 4 * (length + number) ** 2 * self.router_width
        return sum(costs) - sum(cheapest[: len(self.layers) - layers]) + router

    def most_tokens(self, flops: float, length: int, visual: int, layers: int) -> int:
        limit, low, high = flops * self.whole(length), 0, visual
        while low < high:
            middle = (low + high + 1) // 2
            if self.routed(length, visual, middle, layers) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def mix(self, flops: float, front: Any, length: int, visual: int) -> tuple[int, int]:
        """Return how many visual tokens and how many layers a share of the operations is best spent on."""
        total = len(self.layers)
        if not visual:
            return 0, total
        layers = layers_at(front, flops, total)
        kept = self.most_tokens(flops, length, visual, layers)
        while not kept and layers > total - len(self.candidates):
            layers -= 1
            kept = self.most_tokens(flops, length, visual, layers)
        if kept == visual:
            while layers < total and self.routed(length, visual, visual, layers + 1) <= flops * self.whole(length):
                layers += 1
        return max(kept, 1), layers


def layers_at(front: Any, flops: float, num_layers: int) -> int:
    """Return the number of layers at a share of the operations, between the measured ones by a straight line."""
    points = [*(tuple(point) for point in front), (1.0, num_layers)]
    if flops <= points[0][0]:
        return int(points[0][1])
    for (low, fewer), (high, more) in pairwise(points):
        if flops <= high:
            return int(fewer + (more - fewer) * (flops - low) / (high - low) + 0.5)
    return num_layers
