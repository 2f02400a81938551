"""A serving router behind the vision part of a graph: fewer rows of each picture, their number fixed by one budget.

`modeling/served_router.py` says what is computed, one picture at a time. Here are all pictures of a run at once, and
which rows make up a cell is a table of constants, since it follows from where the rows lie.

Shapes: T pictures, N rows of a picture, n of them that are left, W rows of the largest cell, D hidden size, R width of
the router.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...modeling.served_cells import blocks
from ...modeling.served_places import picture_coordinates
from ...modeling.served_router import ServingRouter, sinusoidal_features, tokens_kept
from .vision import Dynamic, Samples, named


class FewerRows(nn.Module):
    """A serving router under one budget, for pictures whose rows lie in the same places; it is not told a question."""

    table: Tensor  # [n, W] rows of each cell, the first one again where a cell has fewer
    filled: Tensor  # [n, W] True where the table names a row of the cell
    place: Tensor  # [N, R] what the router adds to a row for where it lies
    turn: Tensor  # [n, R] and to one of the shorter prompt for its turn

    def __init__(self, router: ServingRouter, coordinates: Tensor, stays: int) -> None:
        super().__init__()
        self.router, self.stays = router, stays
        cells = blocks(coordinates, stays)
        members = [(cells == number).nonzero()[:, 0] for number in range(stays)]
        widest = max(map(len, members))
        table = torch.stack([torch.cat([rows, rows[:1].expand(widest - len(rows))]) for rows in members])
        filled = torch.arange(widest) < torch.tensor([len(rows) for rows in members])[:, None]
        self.uneven = not bool(filled.all())
        turns = (torch.arange(stays) + 0.5) / stays
        shares = torch.full_like(turns, stays / len(coordinates))
        with torch.no_grad():
            place = router.place(sinusoidal_features(coordinates, router.OCTAVES))
            turn = router.turn(sinusoidal_features(torch.stack([turns, shares], 1), router.OCTAVES))
        for name, constant in (("table", table), ("filled", filled), ("place", place), ("turn", turn)):
            self.register_buffer(name, constant)

    def forward(self, features: Tensor) -> Tensor:
        """Compute [T, N, D] -> [T, n, D]."""
        router, dim = self.router, features.shape[-1]
        known = router.down(router.input_norm(features)) + router.kind.weight[1] + self.place
        for block in router.blocks:
            known = run_block(block, known)  # [T, N, R]
        weights = self.weights(router.head(known)[..., 0])
        rows = torch.unflatten(torch.cat([features, known], -1)[:, self.table.flatten()], 1, tuple(self.table.shape))
        means = (weights[..., None] * rows).sum(2)  # [T, n, D + R]
        kept, mixed = means[..., :dim], means[..., dim:] + self.turn
        everything = torch.cat([mixed + router.fate.weight[1], known + router.fate.weight[0]], 1)
        correction = router.up(router.carry_norm(run_block(router.carry, everything, self.stays)))
        size = features.pow(2).mean((1, 2), keepdim=True).sqrt()
        changed: Tensor = kept + size * correction
        return changed

    def weights(self, scores: Tensor) -> Tensor:
        """Return what each row counts in the mean of its cell: [T, N] -> [T, n, W]."""
        of_cells = torch.unflatten(scores[:, self.table.flatten()], 1, tuple(self.table.shape))
        of_cells = of_cells + F.pad(self.router.first[None], (0, self.table.shape[1] - 1))
        if self.uneven:
            of_cells = of_cells.masked_fill(~self.filled, -torch.inf)
        shares: Tensor = of_cells.softmax(-1)
        return shares


def run_block(block: Any, x: Tensor, first: int | None = None) -> Tensor:
    """Run one `Block` of the router on pictures at once, [T, S, R]; of the first rows only, which see all."""
    qkv = block.qkv(block.attention_norm(x)).unflatten(-1, (3, block.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [T, heads, S, R / heads]
    if first is not None:
        x, q = x[:, :first], q[:, :, :first]
    attended = F.scaled_dot_product_attention(q, k, v)
    x = x + block.out(attended.transpose(1, 2).flatten(2))
    mixed: Tensor = x + block.mlp(block.mlp_norm(x))
    return mixed


class ServedVision(nn.Module):
    """A vision graph whose pictures all give as many rows, with a serving router behind it."""

    def __init__(self, inner: Any, router: ServingRouter, budget: int | float, size: tuple[int, int] | None) -> None:
        """Take the vision part of a model, a router, and the size of its pictures where coordinates go by that."""
        super().__init__()
        self.inner = inner
        with torch.no_grad():
            self.rows = len(inner(torch.zeros(1, *inner.tile_shape()))["image_features"])
        self.stays = tokens_kept(self.rows, budget)
        coordinates = picture_coordinates(inner.config, self.rows, size=size)
        self.fewer = FewerRows(router, coordinates, self.stays) if self.stays < self.rows else nn.Identity()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [T, C, H, W] -> [T * n, D]."""
        features = self.inner(pixel_values)["image_features"].unflatten(0, (-1, self.rows))
        return named(self.fewer(features).flatten(0, 1))

    def samples(self) -> Samples:
        samples: Samples = self.inner.samples()
        return samples

    def dynamic(self) -> Dynamic:
        dynamic: Dynamic = self.inner.dynamic()
        return dynamic
