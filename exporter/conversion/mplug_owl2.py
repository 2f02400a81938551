"""mPLUG-Owl2: tensors and configuration stay the hub's, code and processor become ours, `<|image|>` becomes a token.

The token has no embedding: the model puts features in its places before it looks any up. The processor is
transformers' LLaVA one, told to write as many placeholders as a picture has features.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ..checkpoints.json_file import parse_json
from ..checkpoints.own_types import OWN_TYPES, register
from ..errors import InputError
from .parts import Converted, Original
from .towers import CLIP_MEAN, CLIP_STD, square_images
from .words import TURNS, add_image_token, behind_image, load_tokenizer, start_of_prompt

IMAGE = "<|image|>"
NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
)
UNLICENSED = (
    "The source folder has no LICENSE. mPLUG-Owl2's language model began as Llama 2: put its Community License beside "
    "the weights before you publish."
)
DIFFERS = "The tokens around a picture are not quite those that the original code makes."
EPSILON = "layer_norm_eps"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
         EPSILON)  # fmt: skip
ABSTRACTOR = ("hidden_size", "encoder_hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_learnable_queries", "grid_size", EPSILON)  # fmt: skip
FIXED = (  # settings that the modeling file has no choice of: where, name, the value
    ("", "hidden_act", "silu"),
    ("", "attention_bias", False),
    ("", "mlp_bias", False),
    ("", "rope_scaling", None),
    ("", "tie_word_embeddings", False),
    ("visual_model", "hidden_act", "quick_gelu"),
    ("visual_model", "use_cls_token", True),
    ("visual_model", "use_post_layernorm", True),
)
TEMPLATE = (  # the conversation 'mplug_owl2'; the original has no system text, and one that is given stands in front
    "START{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{{ (system if system is string else system[0]['text']) + ' ' }}{% endif %}" + TURNS
)


def convert_mplug_owl2(original: Original) -> Converted:
    """Return an mPLUG-Owl2 with our modeling file. Raises InputError for what is none, or not whole."""
    check_mplug_owl2(original)
    our_type, raw = OWN_TYPES["mplug_owl2"], original.raw
    register(our_type)  # for a tokenizer of an unknown type transformers reads config.json as of no type at all
    tokenizer = load_tokenizer(original)
    image_id = add_image_token(tokenizer, IMAGE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    question = "What is in this image? ASSISTANT:"
    space, same = behind_image(tokenizer, IMAGE, begin="USER: ", question=question, ways=("", " "))
    config = {key: value for key, value in raw.items() if key != "auto_map"}
    has_licence = any(original.folder.glob("LICENSE*"))
    notice = {} if (original.folder / "NOTICE").exists() else {"NOTICE": NOTICE}
    return Converted(
        title="mPLUG-Owl2's own format",
        config={**config, "image_token_index": image_id, "auto_map": our_type.auto_map},
        shards=tuple(
            tuple(piece for piece in pieces if not piece.name.endswith("rotary_emb.inv_freq"))
            for pieces in original.stored.files
        ),
        json_files={
            **_processor_files(original),
            "generation_config.json": _generation(tokenizer),
        },
        texts={"chat_template.jinja": chat_template(space, start_of_prompt(tokenizer)), **notice},
        tokenizer=tokenizer,
        notes=(() if has_licence else (UNLICENSED,)) + (() if same else (DIFFERS,)),
        our_type=our_type,
    )


def check_mplug_owl2(original: Original) -> None:
    """Raise InputError for what is no whole mPLUG-Owl2, by what config.json and the tensors say."""
    name, raw = original.name, original.raw
    visual = raw.get("visual_config")
    parts: dict[str, Any] = {"": raw}
    for part in ("visual_model", "visual_abstractor"):
        parts[part] = visual.get(part) if isinstance(visual, dict) else None
        if not isinstance(parts[part], dict):
            raise InputError(f"{name}: config.json's visual_config has no '{part}': it is no whole mPLUG-Owl2.")
    if raw.get("quantization_config"):
        raise InputError(
            f"{name} is quantized, which mPLUG-Owl2's converter does not read: take MAGAer13/mplug-owl2-llama2-7b."
        )
    for part, keys in (("", SIZES), ("visual_model", TOWER), ("visual_abstractor", ABSTRACTOR)):
        for key in keys:
            if type(parts[part].get(key)) is not (float if key == EPSILON else int):
                raise InputError(f"{name}: {_place(part)} has no number under {key}: it is incomplete.")
    for part, key, value in FIXED:
        if parts[part].get(key, value) != value:
            raise InputError(
                f"{name}: {_place(part)} says {key}={parts[part][key]!r:.60}, and mPLUG-Owl2 has {value!r}: not "
                "converted."
            )
    _check_tensors(name, original, parts["visual_model"], parts["visual_abstractor"])


def _place(part: str) -> str:
    return f"config.json's {part}" if part else "config.json"


def _check_tensors(name: str, original: Original, tower: dict[str, Any], abstractor: dict[str, Any]) -> None:
    """Raise InputError for parts that do not go with each other, and tensors that are none of mPLUG-Owl2's."""
    widths = {tower["hidden_size"], abstractor["hidden_size"], abstractor["encoder_hidden_size"]}
    side = tower["image_size"] // tower["patch_size"]
    if len(widths) > 1 or side != abstractor["grid_size"]:
        raise InputError(
            f"{name}: config.json's visual_model and visual_abstractor do not go with each other: one width and a grid "
            f"of {side} x {side} are needed."
        )
    other = [tensor for tensor in original.stored.pieces if not tensor.startswith(("model.", "lm_head."))]
    if other:
        raise InputError(f"{name} holds the tensor {other[0]}, which is none of mPLUG-Owl2's.")
    if "model.layers.0.self_attn.k_proj.multiway.1.weight" not in original.stored.pieces:
        raise InputError(
            f"{name} holds no keys of its own for pictures (self_attn.k_proj.multiway.1), which mPLUG-Owl2 has."
        )


def chat_template(behind: str, start: str) -> str:
    """Return the template of mPLUG-Owl2's conversations; `behind` follows a picture, `start` begins a prompt."""
    texts = {"START": start, "IMAGE": json.dumps(IMAGE + behind)}
    return functools.reduce(lambda text, name: text.replace(name, texts[name], 1), texts, TEMPLATE) + "\n"


def _processor_files(original: Original) -> dict[str, dict[str, Any]]:
    """Return settings of a processor that scales each picture to a square, and writes a placeholder a feature."""
    visual = original.raw["visual_config"]
    size = visual["visual_model"]["image_size"]
    path = original.folder / "preprocessor_config.json"
    stated = parse_json(path) if path.exists() else {}
    images = square_images(size, stated.get("image_mean", CLIP_MEAN), stated.get("image_std", CLIP_STD))
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": size,  # one, and the others are additional: a picture's features are no grid
        "num_additional_image_tokens": visual["visual_abstractor"]["num_learnable_queries"],
        "vision_feature_select_strategy": "full",
    }
    return {"preprocessor_config.json": images, "processor_config.json": processor}


def _generation(tokenizer: Any) -> dict[str, Any]:
    """Return the ids that end and fill an answer."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    stated = {key: getattr(tokenizer, key) for key in ids}
    return {"do_sample": False, **{key: value for key, value in stated.items() if value is not None}}
