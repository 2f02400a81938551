"""Prompts with a picture for a small model of any type: pixels of the form that its vision tower takes.

A processor knows this form, and a type alone has none. The few forms that there are are tried one after the other until
the model puts features of one in place of placeholders.

Shapes: B sequences, S tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..families import visual_token_ids

TEXT = (6, 5)  # tokens before the picture and after it
PLACEHOLDERS = 8  # where no picture can be made
FEWEST, MOST = 4, 3000  # placeholders of a picture of which some can be dropped, and that is still small
SIDES = (28, 32, 56, 64)  # of pictures, in pixels, where the configuration names none


class NoPicture(ValueError):  # noqa: N818 - what was found, and no fault
    """No prompt with a picture can be made; the message is a clause that says why."""


def picture_prompts(model: Any, sequences: int = 2) -> tuple[list[dict[str, Tensor]], bool]:
    """Return prompts of one length with a picture each, [1, S]; and whether they have pixels.

    Without pixels the placeholders are there, and what stands at them is their own embedding.
    """
    if not (ids := visual_token_ids(model.config)):
        raise NoPicture("its configuration names no token that stands for a picture's features")
    for first in picture_inputs(model):
        count = features_of(model, first)
        if not FEWEST <= count <= MOST:
            continue
        prompts = [_prompt(model, ids[0], count, number) | _like(first, number) for number in range(sequences)]
        if _sees_picture(model, prompts[0]):
            return prompts, True
    prompts = [_prompt(model, ids[0], PLACEHOLDERS, number) for number in range(sequences)]
    try:
        with torch.no_grad():
            model(**prompts[0], use_cache=False)
    except Exception as error:
        raise NoPicture("no picture could be put before its small model, which does not run without one") from error
    return prompts, False


def _prompt(model: Any, visual_id: int, count: int, number: int) -> dict[str, Tensor]:
    """Return text, placeholders and text, with whatever tells them apart in this type."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 300)
    random = torch.Generator().manual_seed(number)
    words = torch.randint(vocabulary // 2, vocabulary - 40, (sum(TEXT),), generator=random)
    tokens = torch.cat([words[: TEXT[0]], torch.full((count,), visual_id), words[TEXT[0] :]])[None]
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    takes = inspect.signature(model.forward).parameters
    kinds = (tokens == visual_id).long()
    return prompt | {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in takes}


def _like(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return pixels of the same form with another picture in them."""
    random = torch.Generator().manual_seed(100 + number)
    return {
        name: torch.randn(value.shape, generator=random) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _sees_picture(model: Any, prompt: dict[str, Tensor]) -> bool:
    """Tell whether the model runs on a prompt, and would say something else of another picture."""
    try:
        with torch.no_grad():
            logits = model(**prompt, use_cache=False).logits
            other = model(**prompt | _like(_pixels_of(prompt), 50), use_cache=False).logits
    except Exception:  # another form, then
        return False
    return bool(logits.isfinite().all()) and not torch.equal(logits[:, -1], other[:, -1])


def _pixels_of(prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in prompt.items() if value.is_floating_point()}


def picture_inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield forms of one picture that the model's `get_image_features` might take."""
    if (features := encoder_of(model)) is None:
        return
    vision = getattr(model.config, "vision_config", None) or model.config
    takes = inspect.signature(features).parameters
    channels = next((n for n in (getattr(vision, k, None) for k in ("in_channels", "in_chans")) if n), 3)
    if any(name in takes for name in ("image_grid_thw", "grid_thw", "grid_thws")):
        yield from _grids(vision, takes, channels)
    stated = getattr(vision, "image_size", None) or getattr(model.config, "image_size", None)
    sides = [stated] if isinstance(stated, int) else list(stated or ())[:1]
    for side in dict.fromkeys([*sides, *SIDES]):
        for before in ((1,), (1, 1), (1, 2), (1, 3)):
            pixels = _square(model, takes, before=before, channels=channels, side=side)
            if "pixel_attention_mask" in takes:  # of pixels, or of tiles
                yield {**pixels, "pixel_attention_mask": torch.ones(*before, side, side, dtype=torch.bool)}
                yield {**pixels, "pixel_attention_mask": torch.ones(before, dtype=torch.bool)}
            yield pixels


def encoder_of(model: Any) -> Any:
    """Return the method that makes features of pictures; None if there is none of its name."""
    holders = (model, model.base_model)
    return next((holder.get_image_features for holder in holders if hasattr(holder, "get_image_features")), None)


def _square(model: Any, takes: Any, before: tuple[int, ...], channels: int, side: int) -> dict[str, Tensor]:
    """Return square pixels behind some dimensions of pictures and tiles, with what else the encoder asks for."""
    pixels = {"pixel_values": _noise(*before, channels, side, side)}
    if "image_sizes" in takes:
        pixels["image_sizes"] = torch.tensor([[side, side]])
    if "high_res_pixel_values" in takes:
        high = getattr(getattr(model.config, "high_res_vision_config", None), "image_size", side)
        pixels["high_res_pixel_values"] = _noise(*before, channels, high, high)
    return pixels


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _grids(vision: Any, takes: Any, channels: int) -> Iterator[dict[str, Tensor]]:
    """Yield a grid of patches, each laid flat or as a square."""
    patch = getattr(vision, "patch_size", 14)
    height, width = 4, 8
    name = next(name for name in ("image_grid_thw", "grid_thw", "grid_thws") if name in takes)
    grid = {name: torch.tensor([[1, height, width]])}
    if "image_merge_sizes" in takes:
        grid["image_merge_sizes"] = torch.tensor([2])
    for frames in dict.fromkeys([getattr(vision, "temporal_patch_size", 1), 1, 2]):
        yield {"pixel_values": _noise(height * width, channels * frames * patch**2), **grid}
    yield {"pixel_values": _noise(height * width, channels, patch, patch), **grid}
    yield {"pixel_values": _noise(1, height * width, channels, patch, patch), **grid}


def features_of(model: Any, inputs: dict[str, Tensor]) -> int:
    """Return how many features the vision tower and the projector make of a picture; 0 if they refuse its form."""
    try:
        with torch.no_grad():
            features = encoder_of(model)(**inputs)
    except Exception:
        return 0
    features = getattr(features, "pooler_output", features)
    parts = list(features) if isinstance(features, (tuple, list)) else [features]
    parts = [part for part in parts if isinstance(part, Tensor)]
    return sum(part.numel() // part.shape[-1] for part in parts)
