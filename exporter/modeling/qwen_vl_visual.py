"""Qwen-VL's vision tower: a picture's patches, and 256 learned queries that gather them as features.

Shapes: N images, P patches, W width of the tower, h heads, d head size, Q queries, D hidden size of the language model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES_PER_HEAD = 128  # of the pooling's attention
POSITIONS = 256  # learned ones of the tower, a square that is scaled to the patches


def scaled_positions(table: Tensor, count: int) -> Tensor:
    """Scale learned positions of a square grid to another one, bicubically: [P, W] -> [count, W]."""
    side, new_side = math.isqrt(table.shape[0]), math.isqrt(count)
    if side == new_side:
        return table
    grid = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class QWenVisualAttention(nn.Module):
    """Attention among patches; `in_proj` holds query, key and value of one head after the other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        q, k, v = self.in_proj(states).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)  # [N, h, P, d]
        seen = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return out


class QWenVisualMLP(nn.Module):
    """The feed-forward part of a block of the tower."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(states)))
        return out


class QWenVisualBlock(nn.Module):
    """A block of the tower, with norms before its parts."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = QWenVisualAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = QWenVisualMLP(width, inner)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attn(self.ln_1(states))
        out: Tensor = states + self.mlp(self.ln_2(states))
        return out


class QWenVisualBlocks(nn.Module):
    """The blocks, under the name that they have on the hub."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(QWenVisualBlock(width, heads, inner) for _ in range(layers))

    def forward(self, states: Tensor) -> Tensor:
        for block in self.resblocks:
            states = block(states)
        return states


class QWenCrossAttention(nn.Module):
    """Attention of the learned queries to the patches, in the layout of torch's MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(states, weight, bias).view(*states.shape[:-1], self.heads, -1).transpose(1, 2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        seen = F.scaled_dot_product_attention(q, k, v)  # [N, h, Q, d]
        out: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return out


class QWenResampler(nn.Module):
    """A picture's patches as a fixed number of features: [N, P, W] -> [N, Q, D]."""

    def __init__(self, queries: int, width: int, inner: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(inner, width, bias=False) if inner != width else nn.Identity()
        self.attn = QWenCrossAttention(width, width // FEATURES_PER_HEAD)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)

    def forward(self, states: Tensor) -> Tensor:
        states = self.ln_kv(self.kv_proj(states))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(states), -1, -1)
        key = states + scaled_positions(self.pos_embed, states.shape[1])
        out: Tensor = self.attn(query, key, states)
        return out


class QWenVisual(nn.Module):
    """The tower: pictures [N, 3, height, width] -> features [N, Q, D]."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, out = visual["width"], visual["output_dim"]
        self.conv1 = nn.Conv2d(3, width, visual["patch_size"], visual["patch_size"], bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(POSITIONS, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        inner = int(width * visual["mlp_ratio"])
        self.transformer = QWenVisualBlocks(visual["layers"], width, visual["heads"], inner)
        self.attn_pool = QWenResampler(visual.get("n_queries", 256), out, width)
        self.ln_post = nn.LayerNorm(out, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(out, out))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # [N, P, W]
        states = self.ln_pre(patches + scaled_positions(self.positional_embedding, patches.shape[1]))
        out: Tensor = self.ln_post(self.attn_pool(self.transformer(states))) @ self.proj
        return out
