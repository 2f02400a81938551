"""Whether a type that no row knows is exported: a small model of it as graphs, run by ONNX Runtime against torch.

Nothing that a row would say is believed: prompts with a picture, with several of different sizes, with none, and in one
batch are put to both; features, logits of the prompt and of every step must agree within the tolerance of exports, and
the tokens that are chosen must be the same.

Shapes: B sequences, S tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.temporary import temporary_folder
from ..clean_room.compare_onnx import TOLERANCE
from ..clean_room.onnx_components import torch_features
from ..errors import InputError
from ..families import visual_token_ids
from ..probe.pictures import features_of
from ..probe.routed import NAMED, first_line
from .found import TEXT_INPUTS, facts_of, small_model
from .graphs.decoder import cache_shape, stated_heads
from .manifest import model_facts
from .rows import NotExported, Support, cache_of
from .runtime.model import OnnxModel
from .runtime.prepare import best_grid
from .support import refusal, support_of
from .tracing import write_plain_graphs

NEW = 4
GRIDS = ((4, 8), (6, 4), (2, 10))  # rows and columns of the pictures of grids, in merged patches
SIZES = ((3, 5), (4, 2), (2, 6))  # of pictures of any size, in the smallest that they come in multiples of


def check_exported(config: Any, layout: str | None = None) -> Support:
    """Return how a configuration is exported; of a type that no row knows, if a small model of it holds.

    Raises: InputError with the reason why it is not exported.
    """
    support = support_of(config, layout)
    if support.pictures is not None and (reason := why_not_exported(config)):
        raise refusal(config, reason)
    return support


def why_not_exported(config: Any) -> str | None:
    """Return why models of a loaded configuration are not exported: a clause; None if a small one of it holds."""
    data = {name: value for name, value in config.to_dict().items() if name not in ("router", "auto_map")}
    return tried(config.model_type, json.dumps(data, sort_keys=True, default=str))


@functools.lru_cache(maxsize=16)
def tried(model_type: str, data: str) -> str | None:
    """Try a small model of a configuration, given as JSON."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        model = small_model(CONFIG_MAPPING[model_type].from_dict(json.loads(data)))
        try_model(model, facts_of(model))
    except NotExported as reason:
        return str(reason)
    return None


def try_model(model: Any, support: Support) -> None:
    """Export a small model and compare it with torch. Raises: NotExported with what differs, or fails."""
    with temporary_folder("onnx", "a small model") as folder:
        runner = exported(model, support, folder)
        for what, inputs in prompts(model, support):
            compare(model, runner, what=what, inputs=inputs)


def exported(model: Any, support: Support, folder: Path) -> OnnxModel:
    """Write a small model's graphs and open them."""
    config = model.config
    cache = cache_of(support, "float32", "cpu")
    try:
        write_plain_graphs(model, support, folder, cache=cache, device="cpu", opset=20)
        layers, heads, head_size = cache_shape(model)
        if (heads, head_size) != stated_heads(config.get_text_config()):
            raise NotExported("its layers keep keys of another shape than its configuration says")
        facts = {"layers": layers, "heads": heads, "head_size": head_size, "cache": cache, "dtype": "float32"}
        return OnnxModel(folder, {**facts, **model_facts(config, support)}, "cpu")
    except NotExported:
        raise
    except InputError as error:
        raise NotExported(str(error).rstrip(".")) from error
    except Exception as error:  # whatever a tracer makes of a model's code
        reason = first_line(error).partition("! For more")[0]
        raise NotExported(f"its code can't be followed into graphs ({type(error).__name__}: {reason})") from error


def compare(model: Any, runner: OnnxModel, what: str, inputs: dict[str, Tensor]) -> None:
    """Compare features, logits and tokens of one batch. Raises: NotExported."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    try:
        expected = answered(model, inputs)
        prompt = runner.prompt(arrays)
        if "pixel_values" in inputs:
            features = runner.image_features(prompt)  # whose memory numpy shares
            refuse_gap(features.numpy(), torch_features(model, inputs), "features", what)
        logits, state = runner.prefill(prompt, NEW)
        for number, step in enumerate(expected.logits):
            refuse_gap(logits, step.float().numpy(), f"logits of token {number + 1}", what)
            token = expected.sequences[:, inputs["input_ids"].shape[1] + number].numpy()
            if not np.array_equal(logits[:, NAMED:].argmax(-1) + NAMED, token):
                raise NotExported(f"with {what}, another token {number + 1} is chosen")
            if number + 1 < NEW:
                logits = runner.step(state, token)
    except NotExported:
        raise
    except InputError as error:
        raise NotExported(f"with {what}: {str(error).rstrip('.')}") from error
    except Exception as error:
        raise NotExported(f"with {what}, it does not run ({type(error).__name__}: {first_line(error)})") from error


def refuse_gap(actual: Any, expected: Any, name: str, what: str) -> None:
    expected = np.asarray(expected)
    if actual.shape != expected.shape:
        raise NotExported(f"with {what}, its {name} are {actual.shape} instead of {expected.shape}")
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    gap = float(np.abs(actual - expected).max(initial=0))
    if not gap <= TOLERANCE["float32"] * scale:
        raise NotExported(f"with {what}, its {name} differ from torch by {gap:.1e}")


@torch.no_grad()
def answered(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Generate a few tokens greedily, with logits; none that the configuration names, which might need a picture."""
    return model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=list(range(NAMED)),
    )  # fmt: skip


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts(model: Any, support: Support) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield batches, with what there is in them."""
    images = [picture(model, support, number) for number in range(3)]
    yield "one picture", batch(model, support, [[images[0]]])
    yield "text alone", batch(model, support, [[]])
    yield "two pictures in one question", batch(model, support, [[images[1], images[2]]])
    yield "questions of different lengths in one batch", batch(model, support, [[images[2]], [images[0]]])


def picture(model: Any, support: Support, number: int) -> dict[str, Tensor]:
    """Return what the encoder takes of one picture, each of another size where there are several."""
    form, random = support.pictures, torch.Generator().manual_seed(number)
    assert form is not None
    if support.kind == "grids":
        rows, columns = (side * form.merge for side in GRIDS[number])
        lead = (1,) * (form.dims - 1 - len(form.tile))
        inputs = {"pixel_values": torch.randn(*lead, rows * columns, *form.tile, generator=random)}
        inputs[form.grid] = torch.tensor([[1, rows, columns]])
        return inputs | ({form.merges: torch.tensor([form.merge])} if form.merges else {})
    if support.kind == "sized":
        side = side_of(model.config)
        height, width = (count * side for count in SIZES[number])
        pixels = torch.randn(1, form.tile[0], height, width, generator=random)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    if support.kind == "anyres":
        return cut_picture(model.config, random, SIZES[number])
    inputs = {"pixel_values": torch.randn(*(1,) * (form.dims - 3), *form.tile, generator=random)}
    if form.mask_dims:
        shape = inputs["pixel_values"].shape
        whole = shape[: form.mask_dims] if form.mask_dims == 2 else (*shape[:-3], *shape[-2:])
        inputs["pixel_attention_mask"] = torch.ones(whole, dtype=torch.bool)
    return inputs


def side_of(config: Any) -> int:
    return int(config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1))


def cut_picture(config: Any, random: torch.Generator, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return a picture cut into the tiles that a configuration's grids say, behind one of the whole."""
    tile = config.vision_config.image_size
    size = [tile * shape[0] // 2, tile * shape[1] // 2]
    vision = {"pinpoints": config.image_grid_pinpoints, "tile": tile}
    rows, columns = best_grid(size, vision)
    pixels = torch.randn(1, 1 + rows * columns, 3, tile, tile, generator=random)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def batch(model: Any, support: Support, questions: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Return questions about pictures as one batch, padded on the left."""
    rows = [tokens_of(model, images, number) for number, images in enumerate(questions)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), 1), row]) for row in rows])
    real = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    takes = inspect.signature(model.forward).parameters
    kinds = (ids == visual_token_ids(model.config)[0]).long()
    inputs = {"input_ids": ids, "attention_mask": real}
    inputs |= {name: kinds for name in TEXT_INPUTS - set(inputs) if name in takes}
    return inputs | together(support, [image for question in questions for image in question])


def tokens_of(model: Any, images: list[dict[str, Tensor]], number: int) -> Tensor:
    """Return text with placeholders for each picture and text behind each: [S]."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    random = torch.Generator().manual_seed(number)

    def words(count: int) -> Tensor:
        return torch.randint(vocabulary // 2, vocabulary - 40, (count,), generator=random)

    start = getattr(model.config, "vision_start_token_id", None)  # which positions are counted from
    begin = torch.tensor([start] if isinstance(start, int) else [], dtype=torch.long)
    parts = [words(6)]
    for image in images:
        parts += [begin, torch.full((features_of(model, image),), visual_token_ids(model.config)[0]), words(5 + number)]
    return torch.cat(parts)


def together(support: Support, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the inputs of several pictures as one, pixels of different sizes filled up to the largest."""
    form = support.pictures
    assert form is not None
    joined: dict[str, Tensor] = {}
    for name in images[0] if images else ():
        parts, axis = [image[name] for image in images], 0
        if name == "pixel_values" and support.kind == "grids":
            axis = form.dims - 1 - len(form.tile)  # the dimension that counts patches
        elif name == "pixel_values":
            most = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
            parts = [_filled(part, most) for part in parts]
        joined[name] = torch.cat(parts, axis)
    return joined


def _filled(pixels: Tensor, shape: list[int]) -> Tensor:
    filled = pixels.new_zeros(1, *shape)
    filled[tuple(slice(0, size) for size in pixels.shape)] = pixels
    return filled
