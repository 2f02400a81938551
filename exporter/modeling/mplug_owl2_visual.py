"""mPLUG-Owl2's vision tower, and the abstractor whose learned queries gather a picture's patches as features.

Shapes: N images, P patches with the class token in front, W width of the tower, h heads, d head size; Q queries,
A width of the abstractor, D hidden size of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention of every query to every key, heads side by side: three times [N, h, S, d] -> [N, S, h * d]."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


# --- the tower --------------------------------------------------------------------------------------------------------


class MPLUGOwl2PatchEmbeddings(nn.Module):
    """Patches with a class token in front, at learned positions: [N, 3, height, width] -> [N, P, W]."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width, patch = vision["hidden_size"], vision["patch_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        positions = (vision["image_size"] // patch) ** 2 + 1
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=vision["layer_norm_eps"])

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        states = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        out: Tensor = self.pre_layernorm(states + self.position_embedding)
        return out


class MPLUGOwl2VisionAttention(nn.Module):
    """Attention among patches; `query_key_value` holds query, key and value of one head after the other."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width = vision["hidden_size"]
        self.heads = vision["num_attention_heads"]
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        heads = self.query_key_value(states).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        out: Tensor = self.dense(attended(*heads))  # each [N, h, P, d]
        return out


class MPLUGOwl2VisionMLP(nn.Module):
    """The feed-forward part of a layer of the tower, with CLIP's approximation of a GELU."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision["hidden_size"], vision["intermediate_size"])
        self.fc2 = nn.Linear(vision["intermediate_size"], vision["hidden_size"])

    def forward(self, states: Tensor) -> Tensor:
        states = self.fc1(states)
        out: Tensor = self.fc2(states * torch.sigmoid(1.702 * states))
        return out


class MPLUGOwl2VisionLayer(nn.Module):
    """A layer of the tower, with norms before its parts."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])
        self.self_attn = MPLUGOwl2VisionAttention(vision)
        self.post_attention_layernorm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])
        self.mlp = MPLUGOwl2VisionMLP(vision)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states))
        out: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


class MPLUGOwl2Encoder(nn.Module):
    """Layers under the name that they have on the hub, each given what the one before it put out."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, states: Tensor, *more: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, *more)
        return states


class MPLUGOwl2VisionModel(nn.Module):
    """The tower: pictures [N, 3, height, width] -> [N, P, W]."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = MPLUGOwl2PatchEmbeddings(vision)
        self.encoder = MPLUGOwl2Encoder([MPLUGOwl2VisionLayer(vision) for _ in range(vision["num_hidden_layers"])])
        self.post_layernorm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixel_values)))
        return out


# --- the abstractor ---------------------------------------------------------------------------------------------------


class MPLUGOwl2CrossAttention(nn.Module):
    """Attention of the queries to themselves and to the patches, with fixed positions that values are without."""

    def __init__(self, abstractor: dict[str, Any]) -> None:
        super().__init__()
        width, inner = abstractor["hidden_size"], abstractor["encoder_hidden_size"]
        self.heads = abstractor["num_attention_heads"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(inner, width)
        self.value = nn.Linear(inner, width)
        patches = abstractor["grid_size"] ** 2 + 1
        self.register_buffer("q_pos_embed", torch.zeros(abstractor["num_learnable_queries"], width))
        self.register_buffer("k_pos_embed", torch.zeros(patches, width))

    def forward(self, queries: Tensor, seen: Tensor) -> Tensor:
        """Return what the queries [N, Q, A] gather from themselves and the patches, [N, Q + P, A]: [N, Q, A]."""
        places: Any = self.q_pos_embed, self.k_pos_embed
        places = [table.to(queries.dtype) for table in places]
        parts = (
            self.query(queries + places[0]),
            self.key(seen + torch.cat(places)),
            self.value(seen),
        )
        return attended(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts))


class MPLUGOwl2AbstractorMLP(nn.Module):
    """A gated MLP with a norm before its last matrix; the gate is `w1`."""

    def __init__(self, abstractor: dict[str, Any]) -> None:
        super().__init__()
        width, inner = abstractor["hidden_size"], abstractor["intermediate_size"]
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=abstractor["layer_norm_eps"])

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.w2(self.ffn_ln(F.silu(self.w1(states)) * self.w3(states)))
        return out


class MPLUGOwl2AbstractorOutput(nn.Module):
    """What follows the attention of a layer of the abstractor, under the hub's names."""

    def __init__(self, abstractor: dict[str, Any]) -> None:
        super().__init__()
        width = abstractor["hidden_size"]
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MPLUGOwl2AbstractorMLP(abstractor)

    def forward(self, gathered: Tensor, queries: Tensor) -> Tensor:
        states = queries + self.out_proj(gathered)
        out: Tensor = states + self.mlp(self.norm2(states))
        return out


class MPLUGOwl2AbstractorAttention(nn.Module):
    """All of a layer of the abstractor. What it adds to are the queries behind their norm, not before it."""

    def __init__(self, abstractor: dict[str, Any]) -> None:
        super().__init__()
        self.attention = MPLUGOwl2CrossAttention(abstractor)
        self.output = MPLUGOwl2AbstractorOutput(abstractor)
        self.norm1 = nn.LayerNorm(abstractor["hidden_size"])
        self.normk = nn.LayerNorm(abstractor["encoder_hidden_size"])

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        queries = self.norm1(queries)
        gathered = self.attention(queries, torch.cat([queries, self.normk(patches)], 1))
        out: Tensor = self.output(gathered, queries)
        return out


class MPLUGOwl2AbstractorLayer(nn.Module):
    """A layer of the abstractor: queries [N, Q, A] and patches [N, P, W] -> [N, Q, A]."""

    def __init__(self, abstractor: dict[str, Any]) -> None:
        super().__init__()
        self.crossattention = MPLUGOwl2AbstractorAttention(abstractor)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        out: Tensor = self.crossattention(queries, patches)
        return out


class MPLUGOwl2Abstractor(nn.Module):
    """Patches [N, P, W] -> features [N, Q + 1, D], the last of which is learned and says that the picture ends."""

    def __init__(self, abstractor: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        width = abstractor["hidden_size"]
        self.query_embeds = nn.Parameter(torch.zeros(1, abstractor["num_learnable_queries"], width))
        layers: list[nn.Module] = [MPLUGOwl2AbstractorLayer(abstractor) for _ in range(abstractor["num_hidden_layers"])]
        self.encoder = MPLUGOwl2Encoder(layers)
        self.visual_fc = nn.Linear(width, hidden_size)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        queries = self.encoder(self.query_embeds.expand(len(patches), -1, -1), patches)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(len(patches), -1, -1)], 1)
