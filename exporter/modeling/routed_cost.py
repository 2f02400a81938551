"""What a prompt costs under a budget, what a share of that cost buys (`flops=0.5`), and what `quality=0.99` needs.

Operations are those that torch's counter finds in the decoder's matrix products, attention over the whole square of its
tokens. A layer that S tokens pass, P of the text before them, costs

    2 S a + 4 S (S + P) w

with `a` weights in its linear maps and queries of all heads together `w` wide. The budget `flops` is a share of this,
summed over all layers, for the tokens of one pass over a prompt without its padding. What the router computes counts as
spent. The vision tower, the head and the steps after the prompt are not in it.

`quality` asks for a share of the answers that stay what they were. At the end of the router's training it was seen on
held-out questions down to which token an answer needs its picture; `RouterSettings.budgets` has the quantiles.

Shapes: B sequences, S tokens, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .routed_api import logger
from .routed_route import Budget, RouterSettings


@dataclass(frozen=True)
class DecoderCost:
    """Operations of a prompt in the decoder, and in the router."""

    layers: tuple[int, ...]  # [L] weights of each layer's linear maps
    width: int  # of the queries of all heads
    router_token: int  # weights of the router's linear maps that a token passes
    router_layer: int  # and the embedding of a layer that may be skipped
    router_width: int
    drop_at: int
    candidates: tuple[int, ...]

    @classmethod
    def of(cls, settings: RouterSettings) -> DecoderCost:
        counts = settings.budgets["cost"]
        router: dict[str, Any] = {
            "router_width": settings.bottleneck,
            "drop_at": settings.drop_at,
            "candidates": settings.candidates,
        }
        return cls(**{**counts, "layers": tuple(counts["layers"])}, **router)

    @property
    def least_layers(self) -> int:
        return len(self.layers) - len(self.candidates)

    def layer(self, layer_idx: int, tokens: int, past: int) -> int:
        return 2 * tokens * self.layers[layer_idx] + 4 * tokens * (tokens + past) * self.width

    def router(self, tokens: int) -> int:
        number = len(self.candidates)
        linear = tokens * self.router_token + number * self.router_layer
        return 2 * linear + 4 * (tokens + number) ** 2 * self.router_width

    def whole(self, length: int, past: int = 0) -> int:
        """Count those of the model as it is, for a prompt of `length` tokens."""
        return sum(self.layer(i, length, past) for i in range(len(self.layers)))

    def routed(self, length: int, visual: int, kept: int, layers: int, past: int = 0) -> int:
        """Count those under a route that keeps so many visual tokens and layers: at most, where layers cost unlike."""
        short = length - visual + kept
        costs = [self.layer(i, length if i < self.drop_at else short, past) for i in range(len(self.layers))]
        cheapest = sorted(costs[i] for i in self.candidates)
        return sum(costs) - sum(cheapest[: len(self.layers) - layers]) + self.router(length)

    def share(self, length: int, visual: int, kept: int, layers: int, past: int = 0) -> float:
        return self.routed(length, visual, kept=kept, layers=layers, past=past) / self.whole(length, past)

    def most_tokens(self, flops: float, length: int, visual: int, layers: int, past: int = 0) -> int:
        """Find the most visual tokens that a share of the operations pays for in so many layers; 0: not even one."""
        limit = flops * self.whole(length, past)
        low, high = 0, visual  # low is paid for, or 0; above high nothing is
        while low < high:
            middle = (low + high + 1) // 2
            if self.routed(length, visual, kept=middle, layers=layers, past=past) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def mix(
        self, flops: float, front: Any, length: int, visual: int, past: int = 0, held: int | None = None
    ) -> tuple[int, int]:
        """Return how many visual tokens and how many layers a share of the operations is best spent on.

        Args:
            front: (share, layers) pairs, by share: with how many layers held-out answers suffered least at that cost.
            held: layers that are settled, since an earlier turn of the conversation runs them.
        Returns: at least one token, and the fewest layers that there may be, also where that costs more than the share.
        """
        if not visual:
            return 0, len(self.layers) if held is None else held
        layers = layers_at(front, flops, len(self.layers)) if held is None else held
        kept = self.most_tokens(flops, length, visual=visual, layers=layers, past=past)
        while not kept and held is None and layers > self.least_layers:
            layers -= 1
            kept = self.most_tokens(flops, length, visual=visual, layers=layers, past=past)
        if kept == visual and held is None:  # what is left over goes into layers
            while layers < len(self.layers) and self.share(length, visual, visual, layers + 1, past=past) <= flops:
                layers += 1
        return max(kept, 1), layers


def layers_at(front: Any, flops: float, num_layers: int) -> int:
    """Return the number of layers at a share of the operations, between the measured ones by a straight line."""
    points = [*(tuple(point) for point in front), (1.0, num_layers)]  # all that is left at the end is all of it
    if flops <= points[0][0]:
        return int(points[0][1])
    for (low, fewer), (high, more) in pairwise(points):
        if flops <= high:
            return int(fewer + (more - fewer) * (flops - low) / (high - low) + 0.5)
    return num_layers


# --- tensors ----------------------------------------------------------------------------------------------------------


def amounts(
    budget: Budget,
    settings: RouterSettings,
    num_layers: int,
    visual: Tensor,
    visible: Tensor,
    logits: Tensor,
    past: int = 0,
    held: Any = None,
) -> tuple[Tensor, Tensor]:
    """Tell how many visual tokens and how many layers each sequence keeps, [B] each. It depends on that sequence alone.

    Args:
        visual: [B, S] True at visual tokens, padding left out.
        visible: [B, S] True at the prompt's tokens.
        logits: [B, S] the router's.
        past: tokens of the text before this pass.
        held: [B, L] the layers of an earlier turn's route; None if there was none.
    """
    available = visual.sum(1)
    layers = torch.full_like(available, num_layers if budget.keep_layers is None else budget.keep_layers)
    if budget.quality is not None:
        return needed(budget.quality, settings, visual, logits), layers
    if budget.flops is None or budget.is_off:
        return budget.tokens_of(available), layers
    cost, front = DecoderCost.of(settings), settings.budgets["front"]
    running = [None] * len(visual) if held is None else held.sum(1).tolist()
    sequences = list(zip(visible.sum(1).tolist(), available.tolist(), running, strict=True))
    mixes = [cost.mix(budget.flops, front, length, count, past=past, held=run) for length, count, run in sequences]
    least = max(
        (
            cost.share(length, count, *mix, past)
            for (length, count, _), mix in zip(sequences, mixes, strict=True)
            if count
        ),
        default=0.0,
    )
    if least > budget.flops:
        logger.warning_once(
            f"flops={budget.flops} is below {least:.3f}, the least that this prompt can run at: its text and the "
            "layers that always run cost that much. It runs at that."
        )
    counts, layers_kept = torch.tensor(mixes, device=visual.device).T
    return counts, layers_kept


def needed(quality: float, settings: RouterSettings, visual: Tensor, logits: Tensor) -> Tensor:
    """Tell how many visual tokens each sequence needs for a share of answers that stay what they were, [B]."""
    fitted = settings.budgets["quality"]
    limit = value_at(fitted["at"], quality)
    levels = LEVELS[fitted["score"]](logits.double(), visual)
    count = ((levels <= limit) & in_order(visual)).sum(1)
    return torch.minimum(count.clamp(min=1), visual.sum(1))


def value_at(points: Any, quality: float) -> float:
    """Return what was found for a share of answers, between two of them by a straight line."""
    pairs = [tuple(point)[:2] for point in points]
    if quality <= pairs[0][0]:
        return float(pairs[0][1])
    for (low, before), (high, after) in pairwise(pairs):
        if quality <= high:
            return float(before + (after - before) * (quality - low) / (high - low))
    return float(pairs[-1][1])


def in_order(visual: Tensor) -> Tensor:
    """Mark the positions that a sequence's visual tokens take when they are sorted, the best first: [B, S]."""
    return torch.arange(visual.shape[1], device=visual.device) < visual.sum(1)[:, None]


def _ranked(logits: Tensor, visual: Tensor) -> Tensor:
    return logits.masked_fill(~visual, -torch.inf).sort(dim=1, descending=True, stable=True).values


def _by_share(logits: Tensor, visual: Tensor) -> Tensor:
    """Give the part of the tokens that are better, whatever the scores say."""
    rank = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    return rank / visual.sum(1, keepdim=True).clamp(min=1)


def _by_mass(logits: Tensor, visual: Tensor) -> Tensor:
    """Give the share of all importance, as the router sees it, that better tokens have."""
    mass = _ranked(logits, visual).softmax(1).nan_to_num(0)
    return mass.cumsum(1) - mass


def _by_score(logits: Tensor, visual: Tensor) -> Tensor:
    return -_ranked(logits, visual)


def _by_gap(logits: Tensor, visual: Tensor) -> Tensor:
    """Tell how far the score lies below the best one."""
    ranked = _ranked(logits, visual)
    return ranked[:, :1] - ranked


# What tells down to which token a question needs its picture: the lower, the more it is needed. Logits [B, S] and where
# visual tokens are -> [B, S] in the order of the logits, the best first, rising.
LEVELS = {"share": _by_share, "mass": _by_mass, "score": _by_score, "gap": _by_gap}
