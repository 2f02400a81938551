"""Qwen-VL and Qwen-VL-Chat: tensors and configuration stay the hub's, code, tokenizer and processor become ours.

The processor is transformers' LLaVA one, which writes a placeholder for each square of a grid: the 256 features of a
picture are a grid of 16 x 16.
"""

from __future__ import annotations

import math
from typing import Any

from ..checkpoints.json_file import parse_json
from ..checkpoints.own_types import OWN_TYPES
from ..errors import InputError
from .parts import Converted, Original
from .tiktoken import make_tokenizer, read_ranks
from .towers import CLIP_MEAN, CLIP_STD, square_images

VOCABULARY = "qwen.tiktoken"
NOTICE = (
    "Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
    "Reserved.\n"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))
VISION = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
PLACEHOLDER = "<imgpad>"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
TOWER = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim", "image_start_id")
PICTURE = "<img><imgpad></img>"
CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
CHAT = (  # pictures are numbered through the conversation, as the original tokenizer's from_list_format does
    "{% set seen = namespace(pictures=0) %}{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + CONTENT.replace(
        "IMAGE", "{% set seen.pictures = seen.pictures + 1 %}Picture {{ seen.pictures }}: " + PICTURE + "\n"
    )
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (  # of the model that was not trained to chat
    "{% for message in messages %}" + CONTENT.replace("IMAGE", PICTURE) + "{% if message['role'] == 'user' %} Answer:"
    "{% else %}<|endoftext|>{% endif %}{% endfor %}"
)


def convert_qwen_vl(original: Original) -> Converted:
    """Return a Qwen-VL with our modeling file. Raises InputError for what is none, or not whole."""
    check_qwen_vl(original)
    our_type, raw = OWN_TYPES["qwen"], original.raw
    settings = original.folder / "generation_config.json"
    chat = (parse_json(settings) if settings.exists() else {}).get("chat_format") == "chatml"
    ranks = read_ranks(original.folder / VOCABULARY)
    end = "<|im_end|>" if chat else "<|endoftext|>"
    tokenizer = make_tokenizer(ranks, (*CONTROL, *VISION), pad_token="<|endoftext|>", eos_token=end)
    if (token_id := tokenizer.convert_tokens_to_ids("<img>")) != raw["visual"]["image_start_id"]:
        raise InputError(
            f"{original.name}: <img> is token {token_id} by {VOCABULARY}, config.json says "
            f"image_start_id={raw['visual']['image_start_id']}: the vocabulary is of another checkpoint."
        )
    ends = ("<|im_end|>", "<|im_start|>", "<|endoftext|>") if chat else ("<|endoftext|>",)
    config = {key: value for key, value in raw.items() if key != "auto_map"}
    generation = {
        "do_sample": False,
        "eos_token_id": [tokenizer.convert_tokens_to_ids(token) for token in ends],
        "pad_token_id": tokenizer.pad_token_id,
    }
    has_licence = any(original.folder.glob("LICENSE*"))
    notice = {} if (original.folder / "NOTICE").exists() else {"NOTICE": NOTICE}
    return Converted(
        title="Qwen-VL's own format",
        config={**config, "auto_map": our_type.auto_map},
        shards=tuple(
            tuple(piece for piece in pieces if not piece.name.endswith("rotary_emb.inv_freq"))
            for pieces in original.stored.files
        ),
        json_files={**_processor_files(raw["visual"]), "generation_config.json": generation},
        texts={"chat_template.jinja": (CHAT if chat else PLAIN) + "\n", **notice},
        tokenizer=tokenizer,
        copied=(original.folder / VOCABULARY,),
        notes=() if has_licence else (
            "The source folder has no LICENSE: put the Tongyi Qianwen agreement beside the weights before you publish.",
        ),
        our_type=our_type,
    )  # fmt: skip


def check_qwen_vl(original: Original) -> None:
    """Raise InputError for what is no whole Qwen-VL, by what config.json and the tensors say."""
    name, raw, stored = original.name, original.raw, original.stored
    visual = raw.get("visual")
    if not isinstance(visual, dict):
        raise InputError(f"{name} is a Qwen without a vision tower (config.json has no 'visual'): not converted.")
    if raw.get("quantization_config"):
        raise InputError(f"{name} is quantized, which Qwen-VL's converter does not read: take Qwen/Qwen-VL-Chat.")
    if missing := [key for key in SIZES if type(raw.get(key)) is not int]:
        raise InputError(f"{name}: config.json has no whole number under {missing[0]}: it is incomplete.")
    if missing := [key for key in TOWER if not isinstance(visual.get(key), int | float)]:
        raise InputError(f"{name}: config.json's visual has no number under {missing[0]}: it is incomplete.")
    if raw.get("rotary_pct", 1.0) != 1.0 or not raw.get("no_bias", True):
        raise InputError(f"{name}: config.json asks for rotary_pct or biases that no Qwen-VL has: not converted.")
    other = [tensor for tensor in stored.pieces if not tensor.startswith(("transformer.", "lm_head."))]
    if other:
        raise InputError(f"{name} holds the tensor {other[0]}, which is none of Qwen-VL's.")


def _processor_files(visual: dict[str, Any]) -> dict[str, dict[str, Any]]:
    size = visual["image_size"]
    side = math.isqrt(visual.get("n_queries", 256))
    images = square_images(size, CLIP_MEAN, CLIP_STD)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": PLACEHOLDER,
        "patch_size": size // side,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    return {"preprocessor_config.json": images, "processor_config.json": processor}
