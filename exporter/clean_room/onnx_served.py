"""A model with its serving router, asked as the graphs are: by prompts whose placeholders are those that stay.

In torch a prompt has a placeholder for every row of a picture, in an export with a budget only for those that are given
out. Each picture has as many rows as every other.

Shapes: B sequences, S tokens, N rows of a picture, n of them that stay, F features, D hidden size.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any


class ServedReference:
    """The served form in torch under one budget, with the methods that a comparison asks of a plain model."""

    def __init__(self, model: Any, rows: int, stays: int) -> None:
        self.__dict__["model"] = model  # what is set on a plain model (`generation_config`) is set on it
        self.__dict__["counts"] = (stays, rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    @property
    def base_model(self) -> Any:
        return self

    def whole(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs with the placeholders of all rows."""
        return with_placeholders(inputs, self.model.config.image_token_id, *self.counts)

    def shorter(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs of the checkpoint's own processor with the placeholders of the rows that stay."""
        return with_placeholders(inputs, self.model.config.image_token_id, *reversed(self.counts))

    def get_image_features(self, pixel_values: Any, image_sizes: Any = None) -> Any:
        """Return the rows of all pictures that stay, [F, D], each picture by itself."""
        import torch

        served = importlib.import_module("modeling.served_router")
        picture_inputs = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        pictures = self.model.picture_outputs(picture_inputs).pooler_output
        rows = [picture.reshape(-1, picture.shape[-1]) for picture in pictures]
        kept = [
            served.select(
                self.model.serving_router,
                picture,
                self.model.budget,
                coordinates=self.model.coordinates_of(number, picture, picture_inputs),
            )[0]
            for number, picture in enumerate(rows)
        ]
        return SimpleNamespace(pooler_output=torch.cat(kept))

    def generate(self, **inputs: Any) -> Any:
        """Generate as the served class does, and put the prompt that was given in front of the new tokens."""
        import torch

        sizes = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        prompt = {name: inputs.pop(name) for name in sizes if name in inputs}
        whole = self.whole(prompt)
        output = self.model.generate(**whole, **inputs)
        new = output.sequences[:, whole["input_ids"].shape[1] :]
        output.sequences = torch.cat([prompt["input_ids"], new], 1)
        return output


def with_placeholders(inputs: dict[str, Any], token: int, before: int, after: int) -> dict[str, Any]:
    """Return inputs in which every `before` placeholders are `after` of them, padded on the left.

    Raises: ValueError where a sequence has no whole number of pictures.
    """
    import torch

    sequences = []
    for ids, real in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].bool().tolist(), strict=True):
        sequence: list[int] = []
        seen = 0
        for i in (i for i, is_real in zip(ids, real, strict=True) if is_real):
            seen += i == token
            if i != token:
                sequence.append(i)
            elif seen % before == 0:
                sequence += [token] * after
        if seen % before:
            raise ValueError(f"{seen} placeholders are no whole number of pictures with {before} each")
        sequences.append(sequence)
    longest = max(map(len, sequences))
    ids = [[0] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return {**inputs, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
