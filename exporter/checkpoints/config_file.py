"""config.json: what is wrong with it, in one sentence that names the field, before and after transformers reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..families import FAMILIES
from .config_names import check_names, check_texts
from .json_file import read_json
from .own_types import own_type, register

__all__ = [
    "ATTENTION_KEYS",
    "check_feature_layers",
    "check_generation_config",
    "check_names",
    "check_raw_config",
    "first_lines",
    "load_config",
    "places",
    "read_json",
]

GENERATION = "generation_config.json"
NESTED = ("text_config", "vision_config")
LAYERS = ("num_hidden_layers", "num_layers", "depth")  # each is built, so that a wrong number is hours of building
MOST_LAYERS = 1000
SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "image_size",
    "patch_size",
    "spatial_merge_size",
    "embed_dim",
    "num_heads",
)
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
ORIGINAL_LLAVA = re.compile(r"^Llava(?:Llama|Qwen|Mistral|Gemma|MPT|Mpt)\w*ForCausalLM$")
OWN_CODE = {  # model types of models that exist in their authors' code only
    "qwen": "Qwen-VL runs with code of its own that transformers 5 can't run. `lvlm-exporter convert {folder} "
    "--out DIR` writes it with code that can",
    "mplug_owl2": "mPLUG-Owl2 runs with a package of its own for transformers 4.31. `lvlm-exporter convert {folder} "
    "--out DIR` writes it with code that runs here",
}


def places(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts of config.json that hold settings of a model: itself, its language model, its vision tower."""
    return {"config.json": raw} | {
        f"config.json's {name}": raw[name] for name in NESTED if isinstance(raw.get(name), dict)
    }


def check_raw_config(name: str, raw: dict[str, Any]) -> None:
    """Refuse what transformers would take for something else, or build for hours."""
    for key in NESTED:
        if not isinstance(raw.get(key, {}), dict):
            raise InputError(f"{name}: config.json's {key} is {_shown(raw[key])}, not an object.")
    _refuse_original_llava(name, raw)
    check_texts(name, raw)
    for place, settings in places(raw).items():
        for key in (*LAYERS, *SIZES):
            value = settings.get(key)
            if key in LAYERS and type(value) is int and not 1 <= value <= MOST_LAYERS:
                raise InputError(f"{name}: {place} says {key}={value}; 1 to {MOST_LAYERS} layers are read.")
            if key == "head_dim" and value == 0 and raw.get("model_type") not in FAMILIES:
                continue  # latent attention has none: GLM 5's configurations say 0
            if key in settings and not _is_size(value, may_be_pair=key in ("image_size", "patch_size")):
                raise InputError(f"{name}: {place} says {key}={_shown(value)}; a positive whole number is needed.")
    for first, second in (PLACEHOLDERS[:2], PLACEHOLDERS[2:]):
        ids = {key: raw[key] for key in (first, second) if raw.get(key) is not None}
        for key, value in ids.items():
            if type(value) is not int or value < 0:
                raise InputError(f"{name}: config.json says {key}={_shown(value)}; the id of a token is needed.")
        if len(set(ids.values())) > 1:
            raise InputError(
                f"{name}: config.json names two placeholders, {first}={ids[first]} and {second}={ids[second]}: take "
                f"one of them out."
            )


def _is_size(value: Any, may_be_pair: bool) -> bool:
    if isinstance(value, list):
        return may_be_pair and 1 <= len(value) <= 3 and all(_is_size(item, False) for item in value)
    return value is None or (type(value) is int and 0 < value < 1 << 31)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_original_llava(name: str, raw: dict[str, Any]) -> None:
    written = raw.get("architectures")
    classes = [entry for entry in written if isinstance(entry, str)] if isinstance(written, list) else []
    original = next((entry for entry in classes if ORIGINAL_LLAVA.match(entry)), None)
    if original is None and "mm_vision_tower" not in raw:
        return
    raise InputError(
        f"{name} is in the original LLaVA format ({original or 'mm_vision_tower in config.json'}), which transformers "
        f"reads as another model: `lvlm-exporter convert {name} --out DIR` converts it, or name the same weights in "
        "transformers' format, llava-hf/llava-1.5-7b-hf or llava-hf/llava-1.5-13b-hf for LLaVA 1.5."
    )


def load_config(folder: Path, raw_config: dict[str, Any]) -> Any:
    """Load transformers' configuration, from native code only."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = raw_config.get("model_type")
    if (our_type := own_type(raw_config)) is not None:
        register(our_type)
    elif not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        raise InputError(_unknown_type(folder, model_type, "auto_map" in raw_config))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a class makes of its settings: KeyError, ZeroDivisionError, strict validation
        raise InputError(f"{folder}/config.json is not accepted by transformers: {first_lines(error)}") from error


def check_feature_layers(name: str, config: Any) -> None:
    """Refuse layers of the vision tower that there are not: the first question would end in an IndexError."""
    value = getattr(config, "vision_feature_layer", None)
    total = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    several = value if isinstance(value, list) else [] if value is None else [value]
    for layer in several:
        if type(layer) is not int or (isinstance(total, int) and not -total - 1 <= layer <= total):
            raise InputError(
                f"{name}: config.json says vision_feature_layer={_shown(value)}; the number of a layer is needed, from "
                f"{-(total or 0) - 1} to {total}, or a list of them."
            )


def _unknown_type(folder: Path, model_type: Any, has_code: bool) -> str:
    from transformers import __version__

    if model_type is None:
        return f"{folder}/config.json has no model_type: it is no configuration of transformers."
    if isinstance(model_type, str) and model_type in OWN_CODE:
        return f"{folder} has the model_type '{model_type}': {OWN_CODE[model_type].format(folder=folder)}."
    hint = " It needs remote code; look for a version that transformers loads natively ('...-hf')." if has_code else ""
    return f"transformers {__version__} has no model_type {_shown(model_type)} ({folder}/config.json).{hint}"


def check_generation_config(name: str, folder: Path) -> None:
    """Raise InputError for a generation_config.json that transformers refuses: no model of the folder would load.

    What it says of sampling does not matter here: everything is asked greedily (`clean_room.greedy`).
    """
    if not (folder / GENERATION).exists():
        return
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise what they like
        raise InputError(
            f"{name}: transformers refuses {GENERATION} ({first_lines(error)}) and loads no model that has it. Correct "
            "the entry, or take the file out."
        ) from error
    for key in ("bos_token_id", "eos_token_id"):
        value = getattr(settings, key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in ids):
            raise InputError(f"{name}: {GENERATION} has {key}={value!r}, which is no token id: correct it.")


def first_lines(error: BaseException) -> str:
    """Return the first two lines of an error as one, since validation names the field in the first."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    plain = isinstance(error, KeyError | AttributeError | ZeroDivisionError | IndexError | AssertionError)
    return f"{type(error).__name__} {text}" if plain else text[:400]
