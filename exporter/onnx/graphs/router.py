"""A routed checkpoint as graphs: the router, and the decoder in two, cut where tokens leave.

Tokens leave in the graph (the router's scores are sorted, what stays is gathered); the budget is an input. A layer that
may be skipped is a branch of its graph, not taken if no sequence of the batch runs it (`joining.py`); layers that
always run are traced together.

Sequences are padded on the right, as for the shared cache: one that keeps fewer tokens is only shorter.

Shapes: B sequences, S tokens, K <= S that stay, L layers, N of them that may be skipped, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.router_entry import read_settings as settings_of
from ...errors import InputError
from ...modeling.modeling_routed import ROUTER_FILE
from ...modeling.routed_api import cache_name
from ...modeling.routed_route import RouterSettings
from ...modeling.routed_router import Router
from ..rows import SHARED, Support
from ..runtime.routed import FRONT
from .decoder import Embeddings, Samples, SharedDecoder, SharedStep, group_query_attention, last_tokens, named_cache
from .graph import trace
from .joining import GraphPiece, join


@dataclass(frozen=True)
class Part:
    """Consecutive layers that run or are skipped together."""

    layers: tuple[int, ...]
    candidate: int | None = None  # its place among those that may be skipped; None: always runs

    @property
    def name(self) -> str:
        return f"layers_{self.layers[0]}"

    @property
    def may_be_skipped(self) -> int | None:
        """Return the layer, if it may be skipped."""
        return None if self.candidate is None else self.layers[0]


def parts(settings: RouterSettings, num_layers: int) -> list[Part]:
    """Return all layers in order, cut where tokens leave and around every layer that may be skipped."""
    listed: list[Part] = []
    for layer in range(num_layers):
        if layer in settings.candidates:
            listed.append(Part((layer,), settings.candidates.index(layer)))
        elif listed and listed[-1].candidate is None and layer != settings.drop_at:
            listed[-1] = Part((*listed[-1].layers, layer))
        else:
            listed.append(Part((layer,)))
    return listed


def read_settings(config: Any, name: str, cache: str) -> RouterSettings:
    """Return the router's settings, or InputError if this route can't be written as graphs."""
    settings = settings_of(config, name)
    text = config.get_text_config()
    if cache != SHARED:
        raise InputError(
            "this routed model needs an attention mask, which routed graphs do not take: export the plain checkpoint."
        )
    if settings.read_at != settings.drop_at:
        raise InputError(
            f"this router reads at layer {settings.read_at} and tokens leave at layer {settings.drop_at}: in routed "
            "graphs the two must be one."
        )
    if "quality" in settings.presets.get(settings.default, {}):
        raise InputError(
            f"the default preset of {name}, '{settings.default}', keeps a share of the answers, for which routed "
            "graphs have no input: choose another one first (`exporter.set_default`)."
        )
    kinds = getattr(text, "layer_types", None) or []
    if getattr(text, "sliding_window", None) and (not kinds or "sliding_attention" in kinds):
        raise InputError(
            "this routed model has sliding windows, which count dropped tokens too, and routed "
            "graphs do not: export the plain checkpoint."
        )
    return settings


class RouterGraph(nn.Module):
    """Scores, ranks, and gathers what stays."""

    def __init__(self, router: Router, hidden_size: int, support: Support, image_floor: float = 0.0) -> None:
        super().__init__()
        self.router, self.hidden_size, self.support = router, hidden_size, support
        self.image_floor = image_floor

    def forward(
        self,
        states: Tensor,
        position_ids: Tensor,
        row_lengths: Tensor,
        is_visual: Tensor,
        places: Tensor,
        keep_counts: Tensor,
        skip_count: Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """Score visual tokens and layers, and choose what stays.

        Args:
            states: [B, S, D] what enters the layer where tokens leave.
            position_ids: [B, S], or [3, B, S].
            row_lengths: [B] tokens of each sequence; the rest is padding.
            is_visual: [B, S] True at visual tokens.
            places: [B, S, 3] image number, row and column of visual tokens.
            keep_counts: [B] how many visual tokens stay.
            skip_count: [B] how many layers are skipped.
            slots: [K] 0, 1 .. K - 1, K the most tokens that stay in a sequence.
        """
        place = torch.arange(states.shape[1])
        real = place[None] < row_lengths[:, None]
        visual = is_visual & real
        tokens, layers = self.router(states, visual, real, places)
        scores = tokens.masked_fill(~visual, torch.finfo(tokens.dtype).min)
        if self.image_floor:
            scores = floors_first(
                scores, visual, images=places[..., 0], counts=keep_counts, image_floor=self.image_floor
            )
        ranked = argsort_descending(scores)  # [B, S]
        best = (place[None] < keep_counts[:, None]).expand_as(visual)
        keep = (torch.zeros_like(visual).scatter(1, ranked, best) | ~visual) & real
        # Those that stay come first, in their order.
        length = states.shape[1]
        order = argsort_descending(torch.where(keep, 2 * length - place, length - place))  # [B, S]
        index = order[:, slots]  # [B, K]
        lowest = argsort_descending(-layers)  # [B, N]
        numbers = torch.arange(layers.shape[1])
        skipped = torch.zeros_like(layers, dtype=torch.bool).scatter(1, lowest, numbers[None] < skip_count[:, None])
        chosen = index if position_ids.ndim == 2 else index[None].expand(3, -1, -1)
        return {
            "kept_states": states.gather(1, index[..., None].expand(-1, -1, states.shape[2])),
            "kept_position_ids": position_ids.gather(-1, chosen),
            "kept_index": index,
            "runs": ~(skipped & visual.any(1)[:, None]),  # a sequence of text alone runs whole
        }

    def samples(self) -> Samples:
        visual = torch.zeros(2, 6, dtype=torch.bool)
        visual[:, 1:4] = True
        positions = torch.arange(6).expand(*((3,) if self.support.mrope else ()), 2, 6).contiguous()
        return {
            "states": torch.rand(2, 6, self.hidden_size),
            "position_ids": positions,
            "row_lengths": torch.tensor([6, 5]),
            "is_visual": visual,
            "places": torch.rand(2, 6, 3),
            "keep_counts": torch.tensor([2, 2]),
            "skip_count": torch.tensor([1, 1]),
            "slots": torch.arange(5),
        }

    def dynamic(self) -> Samples:
        batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
        axis = 1 if self.support.mrope else 0
        grid = {0: batch, 1: sequence}
        return {
            "states": grid,
            "position_ids": {axis: batch, axis + 1: sequence},
            "row_lengths": {0: batch},
            "is_visual": grid,
            "places": grid,
            "keep_counts": {0: batch},
            "skip_count": {0: batch},
            "slots": {0: torch.export.Dim("kept")},
        }


def floors_first(scores: Tensor, visual: Tensor, images: Tensor, counts: Tensor, image_floor: float) -> Tensor:
    """Return scores [B, S] that rank the best tokens of each image first, as the routed model's `floors_first` does.

    Whole numbers, by counting the tokens that are better, since no operator of ONNX ranks within groups.
    """
    number = torch.arange(scores.shape[1])
    mine, other = scores[:, :, None], scores[:, None, :]  # [B, S, 1], [B, 1, S]
    better = ((other > mine) | ((other == mine) & (number[None, :] < number[:, None]))) & visual[:, None, :]
    image = torch.where(visual, images.float(), torch.full_like(images.float(), -1))
    rank = (better & (image[:, :, None] == image[:, None, :])).long().sum(2)  # among the tokens of its image
    least = (counts.float() * image_floor / (image.amax(1) + 1).clamp(min=1)).floor().clamp(min=1)  # [B]
    floor = visual & (rank.float() < least[:, None])
    place = better.long().sum(2)  # among all visual tokens
    length = scores.shape[1]
    return torch.where(visual, length - place + floor.long() * length, -1)


def argsort_descending(scores: Tensor) -> Tensor:
    """Return indices from the highest score to the lowest. ONNX Runtime's TopK takes the first of equal ones first."""
    return scores.topk(scores.shape[1], dim=1).indices


class PartGraph(SharedDecoder):
    """Some of the layers: states in, states out."""

    def __init__(self, model: Any, support: Support, part: Part) -> None:
        super().__init__(model, support)
        self.part, self.first_layer = part, part.layers[0]
        self.cache_name = cache_name(self.language_model.layers[0].forward)

    def forward(
        self,
        states: Tensor,
        position_ids: Tensor,
        row_lengths: Tensor,
        total_length: Tensor,
        past_key_values: list[Tensor],
        runs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run as SharedDecoder does; states [B, S, D]; runs [B] False: a sequence skips the layer, its states stay."""
        step = SharedStep(past_key_values, (row_lengths - 1).to(torch.int32), total_length, self.first_layer)
        before, positions = states, self.language_model.rotary_emb(states, position_ids)
        with step:
            for layer_idx in self.part.layers:
                states = self.language_model.layers[layer_idx](
                    states,
                    attention_mask=None,
                    position_embeddings=positions,
                    use_cache=True,
                    **{self.cache_name: step},
                )
        if runs is not None:
            states = torch.where(runs[:, None, None], states, before)
        return {"next_states": states, **named_cache(step.present)}

    def samples(self) -> Samples:
        samples = super().samples()
        count = 2 * len(self.part.layers)
        return {
            "states": samples["inputs_embeds"],
            "position_ids": samples["position_ids"],
            "row_lengths": samples["row_lengths"],
            "total_length": samples["total_length"],
            "past_key_values": samples["past_key_values"][:count],
            **({} if self.part.candidate is None else {"runs": torch.tensor([True, False])}),
        }

    def dynamic(self) -> Samples:
        dynamic = super().dynamic()
        count = 2 * len(self.part.layers)
        return {
            "states": dynamic["inputs_embeds"],
            "position_ids": dynamic["position_ids"],
            "row_lengths": dynamic["row_lengths"],
            "total_length": {},
            "past_key_values": dynamic["past_key_values"][:count],
            **({} if self.part.candidate is None else {"runs": dynamic["row_lengths"]}),
        }


class FrontGraph(PartGraph):
    """The embeddings and the layers before the router. In one graph a token takes no more calls than a plain one."""

    def __init__(self, model: Any, support: Support, part: Part) -> None:
        super().__init__(model, support, part)
        self.embeddings = Embeddings(model)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        image_features: Tensor,
        position_ids: Tensor,
        row_lengths: Tensor,
        total_length: Tensor,
        past_key_values: list[Tensor],
    ) -> dict[str, Tensor]:
        """Run as PartGraph and Embeddings do. What enters the first layer is an output too, for those who compare."""
        entered = self.embeddings(input_ids, image_features)
        outputs: dict[str, Tensor] = super().forward(
            entered["inputs_embeds"],
            position_ids,
            row_lengths=row_lengths,
            total_length=total_length,
            past_key_values=past_key_values,
        )
        named_outputs: dict[str, Tensor] = entered | outputs
        return named_outputs

    def samples(self) -> Samples:
        layers = super().samples()
        del layers["states"]
        return self.embeddings.samples() | layers

    def dynamic(self) -> Samples:
        layers = super().dynamic()
        batch = layers.pop("states")
        return {"input_ids": batch, "image_features": {0: torch.export.Dim("features")}} | layers


class HeadGraph(SharedDecoder):
    """The last norm and the head, on each sequence's last token."""

    def forward(self, states: Tensor, row_lengths: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": self.logits(self.language_model.norm(last_tokens(states, row_lengths)))}

    def samples(self) -> Samples:
        samples = super().samples()
        return {"states": samples["inputs_embeds"], "row_lengths": samples["row_lengths"]}

    def dynamic(self) -> Samples:
        dynamic = super().dynamic()
        return {"states": dynamic["inputs_embeds"], "row_lengths": dynamic["row_lengths"]}


# --- the folder -------------------------------------------------------------------------------------------------------


def load_router(folder: Path, config: Any, settings: RouterSettings, dtype: torch.dtype) -> Router:
    from safetensors.torch import load_file

    path = folder / ROUTER_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} names a router in config.json, but has no {ROUTER_FILE}: download the folder 'router' too."
        )
    router = Router(config.get_text_config().hidden_size, settings)
    router.load_state_dict(load_file(path))
    return router.to(dtype).eval().requires_grad_(False)


def write_routed(
    model: Any, router: Router, settings: RouterSettings, support: Support, folder: Path, target: str, opset: int
) -> None:
    """Write the router's graph, that of the embeddings and layers before it, and that of all behind it."""
    hidden = model.config.get_text_config().hidden_size
    trace(RouterGraph(router, hidden, support, settings.image_floor).eval(), folder / "router.onnx", target, opset)
    if not settings.drop_at:
        trace(Embeddings(model).eval(), folder / "embeddings.onnx", target, opset)
    pieces = []
    for part in parts(settings, model.config.get_text_config().num_hidden_layers):
        before = part.layers[0] < settings.drop_at
        path = folder / f"{FRONT if before else part.name}.onnx"
        module = (FrontGraph if before else PartGraph)(model, support, part).eval()
        with group_query_attention(module):
            trace(module, path, target, opset)
        if not before:
            pieces.append(GraphPiece(path, part.may_be_skipped))
    head = folder / "head.onnx"
    trace(HeadGraph(model, support).eval(), head, target, opset)
    join(pieces, head, folder / "decoder.onnx")


def describe_router(config: Any, settings: RouterSettings) -> dict[str, Any]:
    """Return the manifest's entry "router"."""
    vision = config.vision_config
    size = getattr(vision, "image_size", None)
    side = size // vision.patch_size if isinstance(size, int) and isinstance(vision.patch_size, int) else 0
    return {
        "drop_at": settings.drop_at,
        "candidates": list(settings.candidates),
        "presets": {name: budget for name, budget in settings.presets.items() if "quality" not in budget},
        "default": settings.default,
        **({} if not settings.budgets else {"budgets": _budgets(settings)}),
        "tile_lengths": [getattr(config, "image_seq_length", 0) or 0, side * side],
    }


def _budgets(settings: RouterSettings) -> dict[str, Any]:
    """Return what the runner computes shares of FLOPs from."""
    cost = settings.budgets["cost"] | {"router_width": settings.bottleneck}
    return {"cost": cost, "front": settings.budgets["front"]}
