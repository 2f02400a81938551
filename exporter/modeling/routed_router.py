"""The router: scores of visual tokens and layers, and what a budget makes of them.

Shapes: B sequences, S tokens, L layers, N of them that may be skipped, D hidden size, R width of the router, H heads.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from safetensors.torch import save_file  # transformers cannot do without it either
from torch import Tensor, nn
from torch.nn import functional as F

from .routed_api import cached_file
from .routed_route import Budget, RouterSettings

ROUTER_FILE = "router/model.safetensors"


class Router(nn.Module):
    """Scores visual tokens and layers: one bidirectional block over [tokens; layers], narrower than the LVLM.

    Visual tokens see the question and each other, layers see both. The order of the words is known by rotary
    embeddings (which padding does not shift), the place of a visual token by its row and column in the image. A layer
    begins as its embedding and what is asked, so that it need not find the question among the visual tokens first.
    """

    OCTAVES = 6  # of the sines that tell rows and columns apart: down to 1/64 of an image's side

    def __init__(self, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__()
        width = settings.bottleneck
        if width % (2 * settings.num_heads):
            raise ValueError(f"router: bottleneck={width} is no multiple of twice num_heads={settings.num_heads}.")
        self.num_heads = settings.num_heads
        self.num_candidates = len(settings.candidates)
        self.input_norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, width)
        self.kind = nn.Embedding(2, width)  # text, visual
        self.place = nn.Linear(4 * self.OCTAVES, width, bias=False)
        self.layer = nn.Embedding(max(1, self.num_candidates), width)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.token_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.layer_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(
        self, states: Tensor, visual: Tensor, visible: Tensor, coordinates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits, higher is more needed, without meaning at text tokens. Differentiable in the weights.

        Args:
            states: [B, S, D] what enters layer `read_at`.
            visual: [B, S] True at visual tokens.
            visible: [B, S] False at padding, and at answer tokens, which no question comes with.
            coordinates: [B, S, 3] image number, row and column of each visual token, as `coordinates_of` has them.

        Returns:
            Token logits [B, S] and layer logits [B, N], float32.
        """
        states, visual, visible = self._here(states), self._here(visual), self._here(visible)
        x = self.down(self.input_norm(states)) + self.kind(visual.long())  # [B, S, R]
        if coordinates is not None:
            coordinates = self._here(coordinates)
            x = x + self.place(sinusoidal_features(coordinates[..., 1:], self.OCTAVES).to(x.dtype)) * visual[..., None]
        numbers = torch.arange(self.num_candidates, device=x.device)
        layers = self.layer(numbers).to(x.dtype) + question_features(x, visible, visual)[:, None]  # [B, N, R]
        x = torch.cat([x, layers], 1)  # [B, S + N, R]
        x = x + self._attend(self.attention_norm(x), visible)
        x = x + self.mlp(self.mlp_norm(x))
        tokens, layers = x.split([states.shape[1], self.num_candidates], 1)
        return self.token_head(tokens)[..., 0].float(), self.layer_head(layers)[..., 0].float()

    def _here(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the router's device and dtype. Weights on meta are offloaded: a hook moves inputs."""
        weight = next(self.parameters())
        tensor = tensor if weight.is_meta else tensor.to(weight.device)
        return tensor.to(weight.dtype) if tensor.is_floating_point() else tensor

    def _attend(self, x: Tensor, visible: Tensor) -> Tensor:
        """Attend from everything to every visible token and every layer: [B, S + N, R] -> [B, S + N, R]."""
        order = visible.long().cumsum(1)  # counts what is visible, so that padding shifts nothing
        order = F.pad(order, (0, self.num_candidates))  # layers have no place in the text: 0
        seen = F.pad(visible, (0, self.num_candidates), value=True)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, S + N, R / H]
        q, k = rotated(q, order), rotated(k, order)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
        mixed: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return mixed


def load_weights(router: Router, weights: dict[str, Tensor], file: str) -> None:
    """Give a router the weights of a file. Raises ValueError where they are those of another one."""
    expected = {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != stored:
        name = next(n for n in [*expected, *stored] if expected.get(n) != stored.get(n))
        raise ValueError(
            f"{file} is not the router that config.json describes: {name} has the shape {stored.get(name)}, not "
            f"{expected.get(name)}."
        )
    router.load_state_dict(weights)


def router_file(name: Any, options: dict[str, Any]) -> str:
    """Return the path of a checkpoint's router, fetched from the hub if it lies there.

    Args:
        options: those of `from_pretrained`.
    """
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, options.get("subfolder") or "", ROUTER_FILE)):
        raise OSError(
            f"{name} has no {ROUTER_FILE}: fetch the router's folder too, or load the plain model, without "
            "trust_remote_code."
        )
    hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
    path: str = cached_file(name, ROUTER_FILE, **{key: options[key] for key in hub if key in options})
    return path


def save_weights(weights: dict[str, Tensor], folder: Any) -> None:
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("the router's weights are offloaded: move it to a device to save it.")
    path = os.path.join(folder, ROUTER_FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in weights.items()}, path, metadata={"format": "pt"})


def question_features(x: Tensor, visible: Tensor, visual: Tensor) -> Tensor:
    """Sum a question's last token, which has seen all others, and the mean of its text: [B, R]."""
    order = visible.long().cumsum(1)
    last = visible & (order == order[:, -1:])
    text = (visible & ~visual).to(x.dtype)
    mean = text / text.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bs,bsr->br", last.to(x.dtype) + mean, x)


def rotated(x: Tensor, order: Tensor) -> Tensor:
    """Apply rotary position embedding: x [B, H, S, C], order [B, S]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = order[:, None, :, None] * frequency  # [B, 1, S, C / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def sinusoidal_features(coordinates: Tensor, octaves: int) -> Tensor:
    """Compute sines and cosines of rising frequency: [..., 2] in 0 to 1 -> [..., 4 * octaves]."""
    angle = coordinates[..., None] * math.pi * 2.0 ** torch.arange(octaves, device=coordinates.device)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


# --- what stays -------------------------------------------------------------------------------------------------------


def best_tokens(
    logits: Tensor, visual: Tensor, budget: Budget | Tensor, patches: Tensor | None = None, image_floor: float = 0.0
) -> Tensor:
    """Keep each sequence's highest visual tokens, as many as the budget says, and all text: [B, S] bool.

    By logits, not by their sigmoids, which saturate to ties.

    Args:
        budget: of a count or a share; or how many each sequence keeps, [B].
        patches: [B, S, 3] image number, row and column of the visual tokens; needed for a floor only.
        image_floor: `RouterSettings.image_floor`.
    """
    ranked = logits.masked_fill(~visual, -math.inf).argsort(dim=1, descending=True, stable=True)
    count = budget if isinstance(budget, Tensor) else budget.tokens_of(visual.sum(1))  # [B]
    if image_floor and patches is not None:
        ranked = floors_first(
            ranked, visual, images=patches[..., 0].to(visual.device), count=count, image_floor=image_floor
        )
    first = torch.arange(logits.shape[1], device=logits.device) < count[:, None]
    return torch.zeros_like(visual).scatter(1, ranked, first) | ~visual


def floors_first(ranked: Tensor, visual: Tensor, images: Tensor, count: Tensor, image_floor: float) -> Tensor:
    """Put the best tokens of each image before all others, so that no image of a sequence is starved.

    Of `count` tokens, each of M images has a floor of `image_floor * count / M` tokens, rounded down, at least one.
    Where there are more images than tokens, those with the highest best token get one.

    Args:
        ranked: [B, S] indices of the tokens, the best first, text last.
        images: [B, S] number of each visual token's image, from 0.
    """
    images = torch.where(visual, images.long(), images.new_full((), -1, dtype=torch.long))
    number = images.amax(1) + 1  # [B]
    least = (count * image_floor / number.clamp(min=1)).floor().long().clamp(min=1)
    place = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    image = images.gather(1, ranked)
    grouped = image.argsort(dim=1, stable=True)  # image by image, the best of each first
    image = image.gather(1, grouped)
    starts = F.pad(image[:, 1:] != image[:, :-1], (1, 0), value=True)
    rank = place - torch.where(starts, place, 0).cummax(1).values  # within the image
    floor = torch.zeros_like(visual).scatter(1, grouped, (rank < least[:, None]) & (image >= 0))  # in ranked order
    return ranked.gather(1, (~floor).byte().argsort(dim=1, stable=True))


def best_layers(logits: Tensor, settings: RouterSettings, keep_layers: int | Tensor | None, num_layers: int) -> Tensor:
    """Skip each sequence's lowest candidates until `keep_layers` are left: [B, N] -> [B, L] bool.

    Args:
        keep_layers: of all sequences, or of each, [B].
    """
    layers = torch.ones(len(logits), num_layers, dtype=torch.bool, device=logits.device)
    if keep_layers is None or not settings.candidates:
        return layers
    skipped = torch.as_tensor(num_layers - keep_layers, device=logits.device).expand(len(logits))
    rank = logits.argsort(dim=1, stable=True).argsort(dim=1)  # the lowest is 0
    candidates = torch.tensor(settings.candidates, device=logits.device).expand(len(logits), -1)
    return layers.scatter_(1, candidates, rank >= skipped[:, None])
