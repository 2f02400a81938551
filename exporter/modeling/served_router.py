"""The serving router: which of a picture's tokens enter the decoder, chosen between projector and decoder.

Serving engines count a prompt's placeholders before they encode the picture, so that how many tokens stay follows from
the picture's size and the budget alone (`tokens_kept`). Which ones stay is the router's choice, from the projected
features of that one picture and, where the caller gives it, the question. The decoder is a stock one, which sees a
shorter prompt.

This file and `served_places` need torch and the standard library only: they travel with a checkpoint, and plug-ins of
engines import them.
What both sides call, for one picture at a time:

    settings = ServingSettings.of(config)                     the entry "serving_router" of config.json
    budget = settings.budget(preset, keep_visual_tokens)      None: the plain model
    tokens_kept(number, budget)                               how many placeholders the picture has in the prompt
    picture_coordinates(config, number, grid=, size=)         where its rows lie in the picture
    select(router, features, budget, coordinates, question)   the rows for the placeholders, and whose place they take
    served_positions(visible, axes)                           positions of the shorter prompt, or, where
    positions_in_axes(length, pictures)                       `keeps_places` is set, of one that keeps places

A picture's rows are all that the stock model scatters into its placeholders: ends of lines and tiles included. Features
that layers of the decoder add later (Qwen3-VL's deepstack features) are chosen by those numbers.

Positions follow from sizes alone, too: an engine asks for them before it has encoded the picture. Most models number a
prompt without gaps, and so the shorter one; where its rows lie comes with them, in what the router adds to them. Models
with positions in three axes (`keeps_places`) give each row the line and the column of the middle of its cell, and text
the positions that it has behind the whole picture. In folders of before that setting they number as all others do.

The picture is cut into n cells of neighbouring rows, blocks as square as can be, in the order of lines, so that the
shorter prompt still goes over the whole picture: to a decoder that knows places by positions, n rows from anywhere say
far less. A row of the shorter prompt is the weighted mean of a cell, and the router adds to it a learnt correction that
has seen all other rows: what stands beside the cell, and where the cell lies, which positions no longer say. Before
training the correction is zero, and weights are equal, or nearly all is the first row's. Where all rows stay, they stay
as they are. The router computes in float32 whatever the decoder's dtype, so that one engine gives the rows that another
does.

Routers of older folders (`pooled` is not set) let the best row of each run of neighbours stay, with a correction.

Shapes: N rows of a picture, n of the shorter prompt, Q tokens of a question, D hidden size, R width of the router, H
heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .served_cells import best_rows, blocks, means_of_cells, runs, softmax_of_cells
from .served_places import entry_of, picture_coordinates, picture_places, positions_in_axes, served_positions

__all__ = [
    "ENTRY",
    "IN_AXES",
    "OFF",
    "PRESETS",
    "SERVING_FORMAT",
    "SERVING_ROUTER_FILE",
    "TYPES",
    "ServingRouter",
    "ServingSettings",
    "base_model",
    "best_rows",
    "check_budget",
    "compact",
    "load_serving_router",
    "load_serving_weights",
    "picture_coordinates",
    "picture_places",
    "positions_in_axes",
    "select",
    "served_positions",
    "tokens_kept",
    "why_untested",
]
ENTRY = "serving_router"  # of config.json
SERVING_FORMAT = 1  # of how the router computes: weights of another would run, and choose badly
SERVING_ROUTER_FILE = "serving_router/model.safetensors"
OFF = "off"  # the preset that is the plain model
IN_AXES = ("qwen2_5_vl", "qwen3_vl")  # model types whose positions have three axes
TYPES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")  # model types that are tested
PRESETS = {
    "serve-accurate": {"keep_visual_tokens": 0.75},
    "serve-balanced": {"keep_visual_tokens": 0.5},
    "serve-fast": {"keep_visual_tokens": 0.25},
}


# --- how many stay ----------------------------------------------------------------------------------------------------


def tokens_kept(number: int, budget: int | float) -> int:
    """Return how many of a picture's `number` rows stay: a count (64), or a share (0.5), half rows rounded up.

    At least one stays, and no more than there are. A float is a share, also 1.0; an int is a count, also 1.
    """
    check_budget(budget)
    if number < 1:
        raise ValueError(f"a picture of {number} rows has nothing to keep.")
    count = budget if isinstance(budget, int) else math.floor(number * budget + 0.5)
    return max(1, min(number, count))


def check_budget(budget: Any) -> None:
    """Raise ValueError with one sentence unless it is a count or a share."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"keep_visual_tokens={budget!r} is neither a count (144) nor a share (0.25).")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"keep_visual_tokens={budget} is no share: give a float in (0, 1], or a whole count.")
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"keep_visual_tokens={budget} keeps nothing of the picture: give 1 or more.")


@dataclass(frozen=True)
class ServingSettings:
    """The entry "serving_router" of config.json."""

    bottleneck: int  # R
    num_heads: int
    depth: int = 2  # blocks before the scores; one more reads what leaves
    question_aware: bool = False  # it was trained with questions too; without one it chooses by the picture alone
    keeps_places: bool = False  # positions in three axes are those of the whole prompt; else they run without gaps
    pooled: bool = False  # rows are means of blocks; False, as in older folders: the best rows of runs
    presets: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: dict(p) for name, p in PRESETS.items()})
    default: str = OFF  # the preset of a call that names no budget
    trained_for: dict[str, Any] = field(default_factory=dict)  # what the base model must be
    format: int = SERVING_FORMAT

    @classmethod
    def of(cls, config: Any) -> ServingSettings:
        """Read and check them, from a configuration of transformers or from the JSON of config.json."""
        entry = entry_of(config, ENTRY)
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"config.json has no entry {ENTRY!r}: this folder has no serving router; train one with `lvlm-exporter "
                "route --serve`."
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"config.json: {ENTRY} has no setting {unknown[0]!r}; it has: {', '.join(sorted(known))}.")
        if missing := [name for name in ("bottleneck", "num_heads") if name not in entry]:
            raise ValueError(f"config.json: {ENTRY} says no {missing[0]!r}.")
        settings = cls(**entry)
        settings.check(config)
        return settings

    def check(self, config: Any) -> None:
        """Raise ValueError with one sentence where they do not fit each other or the model."""
        if self.format != SERVING_FORMAT:
            raise ValueError(
                f"this serving router is of format {self.format}, this code runs format {SERVING_FORMAT}: run it with "
                "the release that trained it, or train it again."
            )
        here = base_model(config)
        for name, value in self.trained_for.items():
            if here.get(name) != value:
                raise ValueError(
                    f"this serving router was trained for another base model: {name} {value}, here it is "
                    f"{here.get(name)}."
                )
        for name in ("bottleneck", "num_heads", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{ENTRY}: {name}={value!r} is no count of 1 or more.")
        if self.bottleneck % (2 * self.num_heads):
            raise ValueError(
                f"{ENTRY}: bottleneck={self.bottleneck} is no multiple of twice num_heads={self.num_heads}."
            )
        for preset in self.presets:
            check_budget(self._of_preset(preset))
        if self.keeps_places and entry_of(config, "model_type") not in IN_AXES:
            raise ValueError(
                f"{ENTRY}: keeps_places is for models with positions in three axes ({', '.join(IN_AXES)}), and this is "
                f"a {entry_of(config, 'model_type')} model."
            )
        if self.default not in {OFF, *self.presets}:
            raise ValueError(f"{ENTRY}: the default preset {self.default!r} is not among {self.preset_names()}.")

    def preset_names(self) -> str:
        return ", ".join([OFF, *self.presets])

    def budget(self, preset: str | None = None, keep_visual_tokens: int | float | None = None) -> int | float | None:
        """Return the budget of a request, checked; that of the default where it names none. None: the plain model."""
        if preset is not None and keep_visual_tokens is not None:
            raise ValueError(f"give either preset={preset!r} or keep_visual_tokens={keep_visual_tokens!r}, not both.")
        if keep_visual_tokens is not None:
            check_budget(keep_visual_tokens)
            return keep_visual_tokens
        preset = self.default if preset is None else preset
        if preset == OFF:
            return None
        if preset not in self.presets:
            raise ValueError(f"preset {preset!r} is not known: this serving router has {self.preset_names()}.")
        budget: int | float = self._of_preset(preset)
        return budget

    def _of_preset(self, name: str) -> Any:
        preset = self.presets[name]
        if not isinstance(preset, Mapping) or set(preset) != {"keep_visual_tokens"}:
            raise ValueError(f"{ENTRY}: preset {name!r} is {preset!r}, not one entry 'keep_visual_tokens'.")
        return preset["keep_visual_tokens"]


def why_untested(config: Any) -> str:
    """Return what a model is that no serving router was tested in, "a gemma3 model"; "" for one of `TYPES`."""
    model_type = entry_of(config, "model_type")
    if model_type not in TYPES:
        return f"a {model_type} model"
    tower = entry_of(entry_of(config, "vision_config") or {}, "model_type")
    return f"a {model_type} model with Pixtral's vision tower" if tower == "pixtral" else ""


def base_model(config: Any) -> dict[str, Any]:
    """Return what a serving router must know again: the model's type, its hidden size and its layers."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else entry_of(config, "text_config") or config
    sizes = {name: entry_of(text, name) for name in ("hidden_size", "num_hidden_layers")}
    return {"model_type": entry_of(config, "model_type"), **sizes}


# --- which stay -------------------------------------------------------------------------------------------------------


class ServingRouter(nn.Module):
    """Scores the rows of one picture, and adds to those of the shorter prompt what they should carry of all."""

    OCTAVES = 6  # of the sines that tell places apart: down to 1/64 of a picture's side

    def __init__(self, hidden_size: int, settings: ServingSettings) -> None:
        super().__init__()
        width, heads, self.pooled = settings.bottleneck, settings.num_heads, settings.pooled
        self.input_norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, width)
        self.kind = nn.Embedding(2, width)  # of the question, of the picture
        self.place = nn.Linear(4 * self.OCTAVES, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(settings.depth))
        score = nn.Linear(width, 1)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), score)
        self.fate = nn.Embedding(2, width)  # leaves, stays; of the picture, of the shorter prompt
        self.carry = Block(width, heads)
        self.carry_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden_size)
        if self.pooled:
            self.turn = nn.Linear(4 * self.OCTAVES, width, bias=False)  # of a row in the shorter prompt
            self.first = nn.Parameter(torch.zeros(()))  # added to the score of each cell's first row
        for begins_at_nothing in (score, self.up):  # means, or rows at equal distances
            nn.init.zeros_(begins_at_nothing.weight)
            nn.init.zeros_(begins_at_nothing.bias)

    def forward(
        self,
        features: Tensor,
        coordinates: Tensor | None = None,
        question: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits [N], higher is more needed, and the rows with what they carry [N, D].

        Args:
            features: [N, D] what the projector gives for one picture.
            coordinates: [N, 2] of `picture_coordinates`.
            question: [Q, D] rows of the embedding table for the question's tokens; None: it is not known.
            kept: [N] 1 where a row stays and 0 where it leaves, differentiable; None: all stay.
        """
        x = self.read(features, coordinates, question)  # [N, R]
        return self.head(x)[:, 0].float(), self.carried(x, features, kept)

    def read(self, features: Tensor, coordinates: Tensor | None, question: Tensor | None) -> Tensor:
        """Return what the router knows of each row once all have seen each other and the question, [N, R]."""
        number = len(features)
        x = self.down(self.input_norm(self._here(features))) + self.kind.weight[1]
        if coordinates is not None:
            x = x + self.place(sinusoidal_features(self._here(coordinates), self.OCTAVES))
        if question is not None and len(question):
            words = self.down(self.input_norm(self._here(question))) + self.kind.weight[0]
            x = torch.cat([x, words + order_features(len(question), x.shape[1]).to(x)])
        for block in self.blocks:
            x = block(x)
        known: Tensor = x[:number]
        return known

    def carried(self, x: Tensor, features: Tensor, kept: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Return the rows with the correction for a choice, [N, D], in the features' dtype; or [n, D], some of them.

        It is in units of the features' size, so that it learns as fast whatever that is.
        """
        stays = x.new_ones(len(x)) if kept is None else self._here(kept)
        x = x + stays[:, None] * self.fate.weight[1] + (1 - stays)[:, None] * self.fate.weight[0]
        correction = self.up(self.carry_norm(self.carry(x, rows)))
        here = self._here(features)
        size = here.pow(2).mean().sqrt().detach()
        changed: Tensor = (here if rows is None else here[rows]) + size * correction
        return changed.to(features.device, features.dtype)

    def weights(self, logits: Tensor, cells: Tensor) -> Tensor:
        """Return what each row counts in the mean of its cell, [N], from the rows' scores [N]."""
        firsts = best_rows(torch.zeros_like(logits), cells)
        return softmax_of_cells(logits + self.first * torch.zeros_like(logits).index_fill(0, firsts, 1.0), cells)

    def pool(self, x: Tensor, features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted means of cells with their correction, [n, D], in the features' dtype.

        Args:
            x: [N, R] of `read`; cells: [N]; weights: [N] that add up to 1 in each cell.
        """
        here = self._here(features)
        means = means_of_cells(torch.cat([here, x], 1), cells, weights)
        rows, known = torch.split(means, [here.shape[1], x.shape[1]], 1)
        turns = (torch.arange(len(rows), device=x.device) + 0.5) / len(rows)
        share = turns.new_full(turns.shape, len(rows) / len(x))
        known = known + self.turn(sinusoidal_features(torch.stack([turns, share], 1), self.OCTAVES))
        everything = torch.cat([known + self.fate.weight[1], x + self.fate.weight[0]])
        known = self.carry(everything, torch.arange(len(rows), device=x.device))  # what leaves ends here
        size = here.pow(2).mean().sqrt().detach()
        changed: Tensor = rows + size * self.up(self.carry_norm(known))
        return changed.to(features.device, features.dtype)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move with the model, and stay in float32 where the model is cast: another engine chooses the same rows."""

        def moved(tensor: Tensor) -> Tensor:
            there: Tensor = fn(tensor)
            casts = there.is_floating_point() and there.dtype != torch.float32
            return tensor.to(there.device, torch.float32) if casts else there

        return super()._apply(moved, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _here(self, tensor: Tensor) -> Tensor:
        weight = self.down.weight
        here: Tensor = tensor.to(weight.device, weight.dtype)
        return here


class Block(nn.Module):
    """One bidirectional transformer block, [S, R] -> [S, R]; or [n, R], of some rows, which see all."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)
        if rows is not None:
            x, q = x[rows], q[:, rows]
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]  # [H, S, R / H]
        x = x + self.out(attended.transpose(0, 1).flatten(1))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


def sinusoidal_features(coordinates: Tensor, octaves: int) -> Tensor:
    """Compute sines and cosines of rising frequency: [N, 2] in 0 to 1 -> [N, 4 * octaves]."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves, device=coordinates.device, dtype=coordinates.dtype)
    angle = coordinates[..., None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def order_features(number: int, width: int) -> Tensor:
    """Compute sines and cosines that tell the order of words, [Q, R]."""
    frequencies = 1_000.0 ** (-torch.arange(width // 2) / (width // 2))
    angle = torch.arange(number)[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1)


def select(
    router: ServingRouter,
    features: Tensor,
    budget: int | float,
    coordinates: Tensor | None = None,
    question: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rows of the shorter prompt, [n, D], and of which of the picture's rows each takes the place, [n].

    The rows are differentiable in the router's weights.
    """
    number = len(features)
    stays = tokens_kept(number, budget)
    if stays == number:
        return features, torch.arange(number, device=features.device)
    x = router.read(features, coordinates, question)
    logits = router.head(x)[:, 0].float()
    if router.pooled:
        cells = (runs(number, stays) if coordinates is None else blocks(coordinates, stays)).to(x.device)
        weights = router.weights(logits, cells)
        kept = router.pool(x, features, cells, weights)
        return kept, best_rows(weights.detach(), cells).to(features.device)
    rows = best_rows(logits, runs(number, stays, x.device))
    stay = torch.zeros(number, device=x.device, dtype=x.dtype).scatter(0, rows, 1.0)
    return router.carried(x, features, stay, rows), rows.to(features.device)  # what leaves is not computed to the end


def compact(
    router: ServingRouter,
    features: Tensor,
    budget: int | float,
    coordinates: Tensor | None = None,
    question: Tensor | None = None,
) -> Tensor:
    """Return the rows that stay, in their order: [N, D] -> [n, D] with n = tokens_kept(N, budget)."""
    return select(router, features, budget, coordinates=coordinates, question=question)[0]


# --- the router's file ------------------------------------------------------------------------------------------------


def load_serving_router(folder: Any, hidden_size: int, settings: ServingSettings) -> ServingRouter:
    """Load a folder's serving router, in float32. Raises OSError or ValueError with one sentence.

    Args:
        folder: a checkpoint on disk.
        hidden_size: D, of the text model.
    """
    path = os.path.join(folder, SERVING_ROUTER_FILE)
    if not os.path.isfile(path):
        raise OSError(f"{folder} has no {SERVING_ROUTER_FILE}: fetch the serving router's folder too.")
    from safetensors.torch import load_file  # comes with transformers and with every engine

    router = ServingRouter(hidden_size, settings)
    load_serving_weights(router, load_file(path), path)
    return router.float().eval().requires_grad_(False)


def load_serving_weights(router: ServingRouter, weights: Mapping[str, Tensor], file: str) -> None:
    """Give a router the weights of a file. Raises ValueError where they are those of another one."""
    expected = {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != stored:
        name = next(n for n in [*expected, *stored] if expected.get(n) != stored.get(n))
        raise ValueError(
            f"{file} is not the serving router that config.json describes: {name} has the shape {stored.get(name)}, "
            f"not {expected.get(name)}."
        )
    router.load_state_dict(dict(weights))
