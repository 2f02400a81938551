"""How a type that no row knows would be exported: facts read from a small model of the very configuration.

What a row of `support.SUPPORTED` says is seen in the model: in which form its encoder takes pictures, what it asks of a
grid of patches, where tokens are, which see each other both ways, after which layers features are added. Whether graphs
made from these facts say what torch says is another question, which `trial.py` answers by running them.

Shapes: B sequences, S tokens, D hidden size.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..families import visual_token_ids
from ..probe.pictures import NoPicture, encoder_of, features_of, picture_prompts
from ..probe.routed import NAMED, first_line, with_short_windows
from ..probe.stack import NoStack, build, check_stack
from ..probe.stock_layers import Unroutable, close, passed
from ..probe.tiny_config import tiny_config
from ..probe.writes import calls_of
from .rows import NotExported, Pictures, Support
from .runtime.prepare import KNOWN, sequence_positions

LAYERS = 2  # of the small model, or as many as show every kind of layer
TEXT_INPUTS = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
GRIDS = ("image_grid_thw", "grid_thw", "grid_thws")


def small_model(config: Any) -> Any:
    """Return a small random model of a configuration. Raises: NotExported where none is built, or it has no stack."""
    try:
        model = build(with_short_windows(tiny_config(config, layers_that_show_all(config))))
        check_stack(model)
    except NoStack as error:
        raise NotExported(str(error)) from error
    except Exception as error:  # whatever a class makes of sizes that it does not foresee
        raise NotExported(f"no small model could be made to look ({first_line(error)})") from error
    return model


def layers_that_show_all(config: Any) -> int:
    """Return how many layers a small model needs to have one of every kind, at least `LAYERS`."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or ())
    added = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return max(LAYERS, len(added) + 1, *(kinds.index(kind) + 1 for kind in kinds))


def found_support(config: Any) -> Support:
    """Return the facts of a loaded configuration. Raises: NotExported with a clause that says what is in the way."""
    data = {name: value for name, value in config.to_dict().items() if name not in ("router", "auto_map")}
    facts = _found(config.model_type, json.dumps(data, sort_keys=True, default=str))
    if isinstance(facts, NotExported):
        raise facts
    return facts


@functools.lru_cache(maxsize=16)
def _found(model_type: str, data: str) -> Support | NotExported:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return NotExported("transformers has no such type")
    try:
        return facts_of(small_model(CONFIG_MAPPING[model_type].from_dict(json.loads(data))))
    except NotExported as reason:
        return reason


def facts_of(model: Any) -> Support:
    """Return the facts of a small model. Raises: NotExported."""
    if not visual_token_ids(model.config):
        raise NotExported("its configuration names no token that stands for a picture's features")
    check_processor(model)
    try:
        prompts, with_pixels = picture_prompts(model, 1)
    except NoPicture as error:
        raise NotExported(str(error)) from error
    if not with_pixels:
        raise NotExported("no picture could be made that its small model takes")
    prompt = with_start(model, prompts[0])
    check_other_tokens(model, prompt)
    kind, pictures = pictures_of(model, prompt)
    call = decoder_call(model, prompt)
    mrope, first = positions_of(model, prompt, call=call, merge=pictures.merge)
    return Support(
        kind, blocks=blocks_of(model, prompt, call), first_position=first, mrope=mrope, pictures=pictures,
        adds_after=additions_of(model, prompt),
    )  # fmt: skip


def with_start(model: Any, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a prompt with the token that begins a picture before its placeholders, where there is one."""
    start = getattr(model.config, "vision_start_token_id", None)
    if not isinstance(start, int):
        return prompt
    at = int((prompt["input_ids"][0] == visual_token_ids(model.config)[0]).nonzero()[0])
    fills = {"input_ids": start, "attention_mask": 1}
    return prompt | {
        name: torch.cat([value[:, :at], value.new_full((1, 1), fills.get(name, 0)), value[:, at:]], 1)
        for name, value in prompt.items()
        if name in TEXT_INPUTS
    }


def check_other_tokens(model: Any, prompt: dict[str, Tensor]) -> None:
    """Refuse a type that puts something of a picture in place of further tokens than the placeholder.

    Each token that a small configuration names is tried; one that the model can't take alone stands for something else.
    """
    for token in sorted(set(range(NAMED)) - set(visual_token_ids(model.config))):
        ids = prompt["input_ids"].clone()
        ids[0, -2] = token
        try:
            entered = decoder_call(model, prompt | {"input_ids": ids})["inputs_embeds"][0, -2]
        except Exception:  # it asks for a video, or a sound
            continue
        if not close(entered, model.get_input_embeddings()(ids)[0, -2]):
            raise NotExported("what is made of a picture takes the place of further tokens, beside the placeholders")


# --- pictures ---------------------------------------------------------------------------------------------------------


def check_processor(model: Any) -> None:
    """Refuse a type whose processor gives the model something that no graph has an input for."""
    takes = set(inspect.signature(model.forward).parameters)
    if unknown := sorted((given_by_processor(model.config.model_type) & takes) - KNOWN):
        raise NotExported(f"its processor gives '{unknown[0]}', which these graphs have no input for")


def given_by_processor(model_type: str) -> set[str]:
    """Return what a type's image processor may give, read in its code: importing it may need torchvision.

    That is what its class says, and every word of its file that is written as the name of an input of pixels.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or ()
    names = set(entry.values() if isinstance(entry, dict) else [entry] if isinstance(entry, str) else entry)
    outputs: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/image_processing_*.py"):
        text = path.read_text(encoding="utf-8")
        if not any(name and f"class {name}(" in text for name in names):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name in names:
                outputs |= {name for line in node.body for name in _stated_inputs(line)}
                outputs |= set(_written_names(node))
    return outputs


def _written_names(node: ast.ClassDef) -> Iterator[str]:
    """Yield the keys of dictionaries in a class, and the words by which it writes into one."""
    for part in ast.walk(node):
        keys: list[Any] = part.keys if isinstance(part, ast.Dict) else []
        if isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store):
            keys = [part.slice]
        yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _stated_inputs(line: ast.stmt) -> list[str]:
    """Return the list that a class assigns to `model_input_names`, of one line of its body."""
    targets = line.targets if isinstance(line, ast.Assign) else []
    if not any(isinstance(target, ast.Name) and target.id == "model_input_names" for target in targets):
        return []
    return [str(name) for name in ast.literal_eval(line.value)]  # type: ignore[attr-defined]


def pictures_of(model: Any, prompt: dict[str, Tensor]) -> tuple[str, Pictures]:
    """Return the kind of a small model's pictures, and their form, from a prompt with one that it takes."""
    encoder_inputs = {name: value for name, value in prompt.items() if name not in TEXT_INPUTS}
    pixels, names = encoder_inputs["pixel_values"], set(encoder_inputs) - {"pixel_values"}
    count = features_of(model, encoder_inputs)
    grid = next((name for name in GRIDS if name in names), "")
    if grid:
        return "grids", grid_of(model, encoder_inputs, grid=grid, count=count)
    if names == {"image_sizes"}:
        if pixels.ndim == 5 and getattr(model.config, "image_grid_pinpoints", None):
            return "anyres", Pictures(tile=tuple(pixels.shape[-3:]), dims=5)
        if pixels.ndim == 4:
            return "sized", Pictures(tile=tuple(pixels.shape[-3:]))
    if not names:
        return "tiles", Pictures(tile=tuple(pixels.shape[-3:]), dims=pixels.ndim)
    if names == {"pixel_attention_mask"}:
        mask = encoder_inputs["pixel_attention_mask"]
        return "real_tiles", Pictures(tile=tuple(pixels.shape[-3:]), dims=pixels.ndim, mask_dims=mask.ndim)
    raise NotExported(f"its encoder takes '{sorted(names)[0]}' beside pixels, in a way that is not known")


def grid_of(model: Any, encoder_inputs: dict[str, Tensor], grid: str, count: int) -> Pictures:
    """Return the form of a grid of patches, and what the tower asks of it."""
    rows, columns = encoder_inputs[grid][0, 1:].tolist()
    merge = math.isqrt(rows * columns // max(count, 1))
    if merge < 1 or merge**2 * count != rows * columns:
        raise NotExported(f"of {rows} x {columns} patches it makes {count} features, which are no merged squares")
    with asked_of_grids(model) as calls:
        features_of(model, encoder_inputs)
    pixels = encoder_inputs["pixel_values"]
    number = pixels.shape.index(rows * columns)  # of the dimension that counts patches
    merges = next((name for name in encoder_inputs if name not in ("pixel_values", grid)), "")
    return Pictures(
        tile=tuple(pixels.shape[number + 1 :]), dims=pixels.ndim, grid=grid, merges=merges, merge=merge,
        functions=tuple(asked_functions(calls)),
    )  # fmt: skip


@contextmanager
def asked_of_grids(model: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """Note with which settings the model's code calls each function of `transformers.vision_utils`."""
    calls: dict[str, dict[str, Any]] = {}
    undo = []

    def noting(name: str, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            calls[name] = {key: value for key, value in bound.arguments.items() if key != "kwargs"}
            return function(*args, **kwargs)

        return called

    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        for name, function in list(vars(module).items()):
            if name.startswith("get_vision_") and inspect.isfunction(function):
                undo.append((module, name, function))
                setattr(module, name, noting(name, function))
    try:
        yield calls
    finally:
        for module, name, function in undo:
            setattr(module, name, function)


def asked_functions(calls: dict[str, dict[str, Any]]) -> Iterator[tuple[str, tuple[tuple[str, Any], ...]]]:
    """Yield the functions of `runtime/grids.py` that a vision graph needs, with their settings."""
    for name, call in calls.items():
        settings: dict[str, Any]
        if name == "get_vision_position_ids":
            merge = call["spatial_merge_size"]
            merge = int(merge[0]) if isinstance(merge, Tensor) else merge
            settings = {"merge": merge, "with_time": bool(call["include_temporal"])}
            yield "position_ids", tuple(settings.items())
        elif name == "get_vision_interpolation_indices_and_weights":
            settings = {"side": call["num_grid_per_side"], "merge": call["spatial_merge_size"], "mode": call["mode"],
                        "align_corners": call["align_corners"], "padding": call["padding"]}  # fmt: skip
            yield "resampling", tuple(settings.items())
        elif name == "get_vision_window_index":
            settings = {"merge": call["spatial_merge_size"], "window": call["window_size"], "patch": call["patch_size"]}
            yield "windows", tuple(settings.items())
        elif name not in ("get_vision_attention_seqlens", "get_vision_cu_seqlens"):
            raise NotExported(f"its vision tower asks {name} of a picture's grid, which the runner does not compute")


# --- the decoder ------------------------------------------------------------------------------------------------------


def decoder_call(model: Any, prompt: dict[str, Tensor]) -> dict[str, Any]:
    """Return what a small model's decoder is given for a prompt, by name."""
    with torch.no_grad(), calls_of(check_stack(model)) as calls:
        model(**prompt, use_cache=False)
    if not calls or not isinstance(calls[0].get("inputs_embeds"), Tensor):
        raise NotExported("its decoder is not given embeddings that pictures are part of")
    return calls[0]


def positions_of(model: Any, prompt: dict[str, Tensor], call: dict[str, Any], merge: int) -> tuple[bool, int]:
    """Return whether a position is three numbers, and the first one. Raises: NotExported for any other positions."""
    positions = call.get("position_ids")
    length = prompt["input_ids"].shape[1]
    if positions is None:
        return False, 0
    if positions.ndim < 3:
        first = int(positions.reshape(-1)[0])
        if torch.equal(positions.reshape(-1)[:length], torch.arange(length) + first):
            return False, first
    elif positions.shape[0] in (3, 4):
        manifest = {"mrope": True, "vision": {"merge": merge}, "image_token_id": visual_token_ids(model.config)[0]}
        grid = next((prompt[name].numpy() for name in GRIDS if name in prompt), None)
        if grid is None and bool((positions == positions[:1]).all()):
            raise NotExported("its positions are three numbers, without a grid of patches that they could come from")
        expected = sequence_positions(manifest, [prompt["input_ids"][0].numpy()], grid)
        if np.array_equal(positions[-3:, 0].numpy(), expected[0]):
            return True, 0
    raise NotExported("its positions are computed in a way that the runner does not know")


def blocks_of(model: Any, prompt: dict[str, Tensor], call: dict[str, Any]) -> str | None:
    """Return which tokens see each other both ways, by changing later ones and looking at earlier ones."""
    decoder = check_stack(model)
    visual = (prompt["input_ids"][0] == visual_token_ids(model.config)[0]).nonzero()[:, 0]
    plain = call | {"use_cache": False}

    def states(changed: int | None = None) -> Tensor:
        embeds = call["inputs_embeds"].clone()
        if changed is not None:
            embeds[:, changed] = embeds[:, changed].flip(-1) * 3 + 1
        with torch.no_grad():
            output: Tensor = decoder(**plain | {"inputs_embeds": embeds}).last_hidden_state
        return output[0]

    whole = states()
    if not close(states(-1)[0], whole[0]):
        return "prompt"
    first, last = int(visual[0]), int(visual[-1])
    return None if close(states(last)[first], whole[first]) else "images"


def additions_of(model: Any, prompt: dict[str, Tensor]) -> tuple[int, ...]:
    """Return the layers after which features of the picture are added."""
    try:
        with torch.no_grad():
            _, added = passed(model, prompt)
            features = encoder_of(model)(**{k: v for k, v in prompt.items() if k not in TEXT_INPUTS})
    except Unroutable as error:
        raise NotExported(str(error)) from error
    extra = getattr(features, "deepstack_features", None) or ()
    if len(extra) != len(added):
        raise NotExported(
            f"something is added after {len(added)} of its layers, and its encoder makes {len(extra)} sets of features "
            "beside the first"
        )
    return tuple(sorted(added))
