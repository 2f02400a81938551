"""The graphs of the layout for transformers.js: what the client feeds, mapped onto the modules of our own graphs.

The client embeds the prompt, writes image features over the placeholders, and hands embeddings, attention mask and
positions to a decoder whose cache grows. It computes no index inputs, so that these graphs do.

A family whose image tokens see each other both ways (Gemma 3) needs to know which they are, and the client's decoder is
given embeddings only: features carry one channel more than the model is wide, which is 1 for them and 0 for text.

Shapes: B sequences, S tokens of this pass, P entries of the cache before it, T = P + S, K heads of keys, E head size,
D hidden size, F image features, N tiles of a question, C channels, H x W pixels; a Qwen image has P patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..graphs.decoder import Embeddings, GrowingDecoder, GrowingStep, Samples
from ..graphs.encoded import OwnGrids
from ..graphs.serving import ServedVision
from ..graphs.vision import Dynamic, Patches, RealTiles, Sized, Tiles, check_line_ends, named
from ..serving import Serving
from ..support import SQUARE, Support

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"  # the client makes caches by these
MARKED = "images"  # value of `Support.blocks` for which features carry a channel more


class EmbedTokens(nn.Module):
    """Token ids to embeddings. What stands at placeholders does not matter: the client writes features over it."""

    def __init__(self, model: Any, support: Support) -> None:
        super().__init__()
        self.inner, self.marked = Embeddings(model), support.blocks == MARKED

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Embed token ids [B, S]: [B, S, D], or [B, S, D + 1]."""
        visual = input_ids == self.inner.image_token_id
        states = self.inner.embed(input_ids.masked_fill(visual, 0))  # its id may lie beyond the vocabulary
        return {"inputs_embeds": F.pad(states, (0, 1)) if self.marked else states}

    def samples(self) -> Samples:
        return {"input_ids": torch.full((2, 5), 1)}

    def dynamic(self) -> Samples:
        return {"input_ids": {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SEQUENCE)}}


class MergedDecoder(GrowingDecoder):
    """The decoder for prompts and steps, with the inputs that the client has."""

    def forward(  # type: ignore[override]
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> dict[str, Tensor]:
        """Run a prompt or a step on a cache that grows.

        Args:
            inputs_embeds: [B, S, D], or [B, S, D + 1] with the mark of image features; padded on the left.
            attention_mask: [B, T] 1 where there is a token, 0 at padding.
            position_ids: [B, S], or [3, B, S].
            past_key_values: key and value of each layer, [B, K, P, E].
        Returns: the logits of the last token, [B, 1, V], keys and values.
        """
        embeds, block_ids = self.blocks(inputs_embeds)
        step = GrowingStep(past_key_values)
        masks = self.masks(attention_mask.bool(), embeds.shape[1], block_ids)
        states = self.run(embeds, position_ids, step, masks)
        outputs = self.outputs(states[:, -1:], step.present)
        return outputs | {"logits": outputs["logits"][:, None]}

    def blocks(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings [B, S, D] and the blocks [B, S] of tokens that see each other both ways."""
        if self.support.blocks == "prompt":  # a step is one token, for which it is the same
            return embeds, torch.zeros_like(embeds[..., 0], dtype=torch.long)
        if self.support.blocks != MARKED:
            return embeds, None
        visual = embeds[..., -1] > 0.5
        begins = visual & ~F.pad(visual, (1, 0))[:, :-1]
        return embeds[..., :-1], torch.where(visual, begins.long().cumsum(1) - 1, -1)

    def samples(self) -> Samples:
        samples = super().samples()
        embeds = samples["inputs_embeds"]
        if self.support.blocks == MARKED:
            samples["inputs_embeds"] = F.pad(embeds, (0, 1))
        order = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
        return {name: samples[name] for name in order}

    def dynamic(self) -> Samples:
        batch, sequence = torch.export.Dim(BATCH), torch.export.Dim(SEQUENCE)
        axis = 1 if self.support.mrope else 0
        return {
            "inputs_embeds": {0: batch, 1: sequence},
            "attention_mask": {0: batch, 1: torch.export.Dim.AUTO},  # T is P + S, which sizes say
            "position_ids": {axis: batch, axis + 1: sequence},
            "past_key_values": [{0: batch, 2: torch.export.Dim(PAST)}] * (2 * self.shape[0]),
        }


# --- images -----------------------------------------------------------------------------------------------------------


class Marked(Tiles):
    """Gemma 3's features, with the channel that says what they are."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [T, C, H, W] -> [F, D + 1]."""
        return named(F.pad(super().forward(pixel_values)["image_features"], (0, 1), value=1.0))


class SplitTiles(RealTiles):
    """Idefics3 and SmolVLM: the tiles of each question, of which the client fills none up."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [B, N, C, H, W] -> [F, D]."""
        return super().forward(pixel_values.flatten(0, 1))

    def samples(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.rand(2, 3, *self.tile_shape())}

    def dynamic(self) -> Dynamic:
        return {"pixel_values": {0: torch.export.Dim(BATCH), 1: torch.export.Dim("tiles")}}


class Square(Tiles):
    """LLaVA-NeXT and OneVision on a square picture: the overview, and the same again as the one tile, line by line.

    A tile that shows the whole picture has the pixels of the overview, so that its features are made once.
    """

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute [T, C, H, W] -> [F, D]."""
        features = self.features(pixel_values)  # [T, N, D]
        side = int(features.shape[1] ** 0.5)
        lines = torch.unflatten(features, 1, (side, side))  # [T, side, side, D]
        ends = self.model.image_newline.expand(*lines[:, :, :1].shape)
        tile = torch.cat([lines, ends], 2).flatten(1, 2)
        return named(torch.cat([features, tile], 1).flatten(0, 1))


class GridPatches(Patches):
    """Qwen2-VL and Qwen2.5-VL: one image as a list of patches; where they are follows from its rows and columns."""

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute [P, C * pixels of a patch], [1, 3] one frame, rows and columns of patches -> [F, D]."""
        merge, columns = self.config.vision_config.spatial_merge_size, image_grid_thw[0, 2]
        row, column = grid_places(pixel_values.shape[0], columns, merge)
        window = merge * self.window(merge)
        number = row // window * columns + column // window if window else torch.zeros_like(row)
        return super().forward(pixel_values, torch.stack([row, column], -1), number)

    def window(self, merge: int) -> int:
        """Return how many merged patches a window is wide and high; 0: every patch sees every other."""
        vision = self.config.vision_config
        return int(getattr(vision, "window_size", 0) // merge // vision.patch_size)

    def samples(self) -> dict[str, Tensor]:
        merge = self.config.vision_config.spatial_merge_size
        return {
            "pixel_values": super().samples()["pixel_values"],
            "image_grid_thw": torch.tensor([[1, 2 * merge, 3 * merge]]),
        }

    def dynamic(self) -> Dynamic:
        return {"pixel_values": super().dynamic()["pixel_values"], "image_grid_thw": {}}


class GridPictures(OwnGrids):
    """A tower that asks where patches lie and how position embeddings are resampled: answered from rows and columns."""

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute [P, pixels of a patch], [1, 3] one frame, rows and columns of patches -> [F, D]."""
        count = pixel_values.shape[0]
        host_inputs = grid_answers(self.form.host_inputs(), count, image_grid_thw[0, 1], image_grid_thw[0, 2])
        return self.encoded(pixel_values, (count, 1), host_inputs)  # of the sizes, their product is asked for

    def samples(self) -> dict[str, Tensor]:
        rows, columns = 3 * self.form.merge, 5 * self.form.merge
        return {
            "pixel_values": torch.rand(rows * columns, *self.form.tile),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }

    def dynamic(self) -> Dynamic:
        return {"pixel_values": {0: self.form.merge**2 * torch.export.Dim("features", min=2)}, "image_grid_thw": {}}


def grid_answers(functions: dict[str, dict[str, Any]], count: Any, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Return what functions of `runtime/grids.py` say of P patches, in rows and columns [] that a graph is given."""
    answers: dict[str, Tensor] = {}
    for name, settings in functions.items():
        row, column = grid_places(count, columns, settings["merge"])
        if name == "position_ids":
            time = [torch.zeros_like(row)] if settings["with_time"] else []
            answers["position_ids"] = torch.stack([*time, row, column], -1)
        else:
            row_taps, row_weights = taps(row, rows, settings)
            column_taps, column_weights = taps(column, columns, settings)
            indices = row_taps[:, :, None] * settings["side"] + column_taps[:, None]
            answers["interp_indices"] = indices.flatten(1)
            answers["interp_weights"] = (row_weights[:, :, None] * column_weights[:, None]).flatten(1)
    return answers


def grid_places(count: Any, columns: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """Return row and column of each of P patches, those of a square of `merge` a side together: [P] each."""
    patch = torch.arange(count)
    block, inner = patch // merge**2, patch % merge**2
    row = block // (columns // merge) * merge + inner // merge
    return row, block % (columns // merge) * merge + inner % merge


def taps(index: Tensor, size: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return which entries of a table's axis positions [P] on one of `size` are made of, and their weights: [P, 2]."""
    side = settings["side"]
    if settings["align_corners"]:
        source = index.float() * (side - 1) / (size - 1).clamp(min=1)
    else:
        source = (index + 0.5) * side / size - 0.5
    floor, offsets = source.floor(), torch.arange(2)
    raw = floor.long()[:, None] + offsets
    weights = 1 - ((source - floor)[:, None] - offsets).abs()
    if settings["padding"] == "zeros":
        weights = weights * ((raw >= 0) & (raw < side))
    return raw.clamp(0, side - 1), weights


def rename_inputs(program: Any, model_type: str) -> None:
    """Call a graph's inputs as the client does. (transformers' exporter makes more inputs of one named grid_thw.)"""
    if model_type == "qwen2_vl":
        for value in program.graph.inputs:
            value.name = value.name.removeprefix("image_")


def client_vision(model: Any, support: Support) -> Any:
    """Return the module that turns what the client's processor gives into features."""
    if support.kind == SQUARE:
        check_line_ends(model)
    if support.kind == "patches":
        return GridPatches(model).eval()
    if support.pictures is not None:
        return GridPictures(model, support.pictures).eval()
    if support.kind == "tiles" and support.blocks == MARKED:
        return Marked(model).eval()
    return {"tiles": Tiles, "real_tiles": SplitTiles, "sized": Sized, SQUARE: Square}[support.kind](model).eval()


def served_vision(vision: Any, support: Support, serving: Serving) -> Any:
    """Return the vision module with a serving router under its budget behind it."""
    assert serving.router is not None and serving.budget is not None
    side = vision.tile_shape()[-1]
    size = (side, side) if support.kind == SQUARE else None
    return ServedVision(vision, serving.router, serving.budget, size).eval()
