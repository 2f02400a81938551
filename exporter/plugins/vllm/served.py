"""What a serving router changes in vLLM's own classes: fewer rows of each picture, counted before it was encoded.

Legend: N rows of a picture, n of them that stay, Q tokens of a question, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from exporter.modeling.served_router import (
    ServingRouter,
    ServingSettings,
    picture_coordinates,
    picture_places,
    positions_in_axes,
    select,
    served_positions,
)

from .folder import load_into, serving_settings
from .processor import QUESTION, ROWS


class ServedPictures:
    """Mixed into a stock class: loads the router, and shortens what the stock class makes of each picture."""

    config: Any
    serving: ServingSettings | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.serving = serving_settings(vllm_config.model_config)
        self.served_from = vllm_config.model_config
        if self.serving is not None:
            self.serving_router = ServingRouter(self.hidden_size, self.serving).float().eval()

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the stock weights and the router's, which lie in a file of their own."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        if self.serving is None:
            return loaded
        load_into(self.serving_router, self.served_from)
        return loaded | {f"serving_router.{name}" for name, _ in self.serving_router.named_parameters()}

    def embed_multimodal(self, **inputs: Any) -> Any:
        """Return each picture's rows: those that stay, where a request has a budget."""
        counts, questions = inputs.pop(ROWS, None), inputs.pop(QUESTION, None)
        rows = super().embed_multimodal(**inputs)  # type: ignore[misc]
        if counts is None:
            return rows
        grids, sizes = inputs.get("image_grid_thw"), inputs.get("image_sizes")
        return tuple(
            self.shortened(
                picture,
                count=tuple(counts[i].tolist()),
                question=questions[i],
                grid=None if grids is None else grids[i].tolist(),
                size=None if sizes is None else sizes[i].tolist(),
            )
            for i, picture in enumerate(rows)
        )

    def shortened(self, picture: Tensor, *, count: tuple[int, int], question: Tensor, grid: Any, size: Any) -> Tensor:
        """Return the rows that stay, [n, D ...], of all that the stock class has made, [N, D ...].

        Columns after the first D are features that layers of the decoder add later: those of the same rows.
        """
        number, stays = count
        if len(picture) != number:
            raise RuntimeError(f"a picture has {len(picture)} rows, and {number} were counted for its prompt.")
        coordinates = picture_coordinates(self.config, number, grid=grid, size=size).to(picture.device)
        words = self.words_of(question.to(picture.device)) if len(question) else None
        kept, numbers = select(self.serving_router, picture[:, : self.hidden_size], stays, coordinates, words)
        rows = torch.cat([kept, picture[numbers, self.hidden_size :]], -1)
        if len(rows) != stays:
            raise RuntimeError(f"{len(rows)} rows of a picture stay, and its prompt has {stays} places for them.")
        return rows

    def words_of(self, ids: Tensor) -> Tensor:
        """Return the rows of the embedding table for a question's token ids, [Q, D]."""
        words: Tensor = self.get_language_model().embed_input_ids(ids)  # type: ignore[attr-defined]
        return words


class ServedAxes(ServedPictures):
    """Of models with positions in three axes: of a prompt with a budget, by the router's settings."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if all(feature.data is None or ROWS not in feature.data for feature in mm_features):
            plain: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
            return plain
        if self.serving is None or not self.serving.keeps_places:
            return served_positions(torch.ones(len(input_tokens)), axes=3), 0
        pictures = [
            (feature.mm_position.offset, self.places_of(feature))
            for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        ]
        positions = positions_in_axes(len(input_tokens), pictures)
        return positions, int(positions.max()) + 1 - len(input_tokens)

    def places_of(self, feature: Any) -> tuple[Tensor, int]:
        """Return what `picture_places` says of a request's picture."""
        grid, (_, stays) = (feature.data[name].data.tolist() for name in ("image_grid_thw", ROWS))
        return picture_places(self.config, grid, stays)

    def get_encoder_cudagraph_config(self) -> Any:
        """Keep a served folder's pictures out of graphs of the encoder, which go past `embed_multimodal`."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return config if self.serving is None else dataclasses.replace(config, modalities=[])
