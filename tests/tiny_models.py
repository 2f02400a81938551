"""Tiny random checkpoints of every family, in the layout that the family has on the hub.

    build("llava", folder)              # config, weights, tokenizer, processor, chat template; the same for one seed
    processor = load_processor(folder)  # from exporter.clean_room: image and text, with or without torchvision
    batch = inputs(processor, batch=3)  # left-padded prompts with random images

What differs between families is FAMILIES_HERE, one row each. Legend: V vocabulary, D hidden size, F fan-in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

WORDS = (
    "what which where who why how many much is are was the a an this that these those there them it of in on at to and "
    "or not with without from by for you i can do does see show name count read describe say tell answer shortly "
    "please image picture photo text color shape size digit number object row column side corner top bottom left "
    "right center above below between next first second third last small large big tiny bright dark wide same "
    "different circle circles square triangle star line dot cross red green blue yellow black white gray brown orange "
    "pink purple one two three four five six seven eight nine ten zero yes no none all some any only word words "
    "user assistant human system inst model cat dog bird car tree house sky sun hand face book cup ball door"
).split()
SYMBOLS = [*"0123456789", *".,:;?!-+=*/()[]<>'\"_#%&|", "\n"]

# --- names in memory -> names on disk: the first prefix that fits is replaced ----------------------------------------
Renaming = tuple[tuple[str, str], ...]
LLAVA_NAMES: Renaming = (
    ("lm_head.", "language_model.lm_head."), ("model.language_model.", "language_model.model."), ("model.", ""),
)  # fmt: skip
# The hub's CLIP and SigLIP towers have one level more than the classes of transformers 5, which drop it on load.
CLIP_NAMES: Renaming = (("model.vision_tower.", "vision_tower.vision_model."), *LLAVA_NAMES)
QWEN2_NAMES: Renaming = (("model.language_model.", "model."), ("model.visual.", "visual."))

# --- chat formats: (opening, closing) of a turn by role; an unlisted role is put like the user's ---------------------
CHATML = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system")}
IDEFICS = {"user": ("User: ", "<end_of_utterance>\n"), "assistant": ("Assistant: ", "<end_of_utterance>\n")}
MISTRAL = {"user": ("[INST]", "[/INST]"), "assistant": ("", "</s>")}
VICUNA = {"user": ("USER: ", " "), "assistant": ("ASSISTANT: ", "</s>")}
GEMMA = {f: (f"<start_of_turn>{t}\n", "<end_of_turn>\n") for f, t in (("user", "user"), ("assistant", "model"))}
GLM = {"user": ("<|user|>\n", ""), "assistant": ("<|assistant|>\n", "")}
TEMPLATE = (
    "START{% set turns = TURNS %}{% for message in messages %}"
    "{% set turn = turns.get(message['role'], turns['user']) %}{{ turn[0] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}VIDEO{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ turn[1] }}{% endfor %}{% if add_generation_prompt %}{{ turns['assistant'][0] }}{% endif %}"
)

# --- pieces that several rows share ----------------------------------------------------------------------------------
Settings = dict[str, Any]
MEAN_STD: Settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
ENCODER: Settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP: Settings = {**ENCODER, "model_type": "siglip_vision_model", "vision_use_head": False}
CLIP: Settings = {**ENCODER, "model_type": "clip_vision_model", "projection_dim": 32}
LLAVA_PATCHES: Settings = {"patch_size": 8, "vision_feature_select_strategy": "default",
                           "num_additional_image_tokens": 1, "image_token": "<image>"}  # fmt: skip
QWEN2_TEXT: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
QWEN_VIT: Settings = {"depth": 2, "num_heads": 2, "patch_size": 5, "spatial_merge_size": 2, "temporal_patch_size": 2}
# 10 pixels a token and side: between 16 and 40 tokens an image, whatever its shape.
QWEN_PIXELS: Settings = {"patch_size": 5, "merge_size": 2, "temporal_patch_size": 2}
QWEN_LIMITS: Settings = {"min_pixels": 40 * 40, "max_pixels": 64 * 64}
QWEN_SIZE: Settings = {"size": {"shortest_edge": 40 * 40, "longest_edge": 64 * 64}}
GLM_SIZE: Settings = {"size": {"shortest_edge": 2 * 40 * 40, "longest_edge": 2 * 64 * 64}}  # counts a still twice
QWEN_TOKENS = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
QWEN_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
GEMMA_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
TILE_TAGS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS_EXTRA = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILE_TAGS)
IDEFICS_TILE: Settings = {"image_seq_len": 9}  # 24 / 4 patches a side, 2 x 2 of them to a token
IDEFICS_VISION: Settings = {**ENCODER, "image_size": 24, "patch_size": 4}
IDEFICS_IMAGES: Settings = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24},
                            "do_image_splitting": True}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """How a tiny checkpoint of one family differs from the others."""

    text: Settings
    vision: Settings
    tokens: dict[str, str]  # the tokenizer's named special tokens; one with a bos_token puts it before every text
    ids: dict[str, str]  # entries of config.json that hold a special token's id
    image_processor: tuple[str, Settings]  # class on the hub, settings
    processor: tuple[str, Settings]
    config: Settings = field(default_factory=dict)
    flat_config: bool = False  # the text configuration's entries stand at the top level of config.json
    names: Renaming = ()
    extra: tuple[str, ...] = ()  # further special tokens
    named_extra: dict[str, str] = field(default_factory=dict)  # special tokens that the processor asks for by name
    start: str = ""  # what a conversation begins with
    turns: dict[str, tuple[str, str]] | None = None  # None: no chat template, as on the hub
    image: str = "<image>"
    video: str = ""  # of the chat template; empty: it places none
    video_processor: str | None = None  # class, where the hub has a file for it
    template_file: str = "chat_template.jinja"  # older repositories have it in a JSON file


# One family of each kind: fixed visual tokens, tiles, windows of attention, three positions with DeepStack.
ONE_OF_EACH_KIND = ("llava", "llava_next", "gemma3", "qwen3_vl")

FAMILIES_HERE: dict[str, Tiny] = {
    "llava": Tiny(
        text={"model_type": "llama", "num_key_value_heads": 4}, vision={**CLIP, "image_size": 40, "patch_size": 8},
        config={"vision_feature_layer": -2, "image_seq_length": 25},
        names=CLIP_NAMES, tokens=LLAMA_TOKENS, ids={"image_token_index": "<image>"},
        image_processor=("CLIPImageProcessor", {"size": {"shortest_edge": 40},
                                                "crop_size": {"height": 40, "width": 40}}),
        processor=("LlavaProcessor", LLAVA_PATCHES),
        turns=VICUNA, image="<image>\n", template_file="chat_template.json",
    ),
    "llava_next": Tiny(
        text={"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        vision={**CLIP, "image_size": 24, "patch_size": 8},
        config={"vision_feature_layer": -2, "image_seq_length": 9, "image_grid_pinpoints": [[24, 48], [48, 24]]},
        names=CLIP_NAMES, tokens=LLAMA_TOKENS, extra=("[INST]", "[/INST]"), ids={"image_token_index": "<image>"},
        image_processor=("LlavaNextImageProcessor", {
            "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24},
            "image_grid_pinpoints": [[24, 48], [48, 24]], "aspect_ratio_setting": "anyres"}),
        processor=("LlavaNextProcessor", LLAVA_PATCHES),
        turns=MISTRAL, image="<image>\n", template_file="chat_template.json",
    ),
    "llava_onevision": Tiny(
        text={"model_type": "qwen2"}, vision={**SIGLIP, "image_size": 24, "patch_size": 8},
        config={"image_grid_pinpoints": [[24, 24], [24, 48], [48, 24]]},
        names=CLIP_NAMES, tokens=QWEN_TOKENS, extra=("<|im_start|>",),
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        image_processor=("LlavaOnevisionImageProcessor", {
            "size": {"height": 24, "width": 24}, "image_grid_pinpoints": [[24, 24], [24, 48], [48, 24]]}),
        processor=("LlavaOnevisionProcessor", {"num_image_tokens": 9, "vision_feature_select_strategy": "full",
                                               "image_token": "<image>", "video_token": "<video>"}),
        turns=CHATML, image="<image>\n", video="<video>\n", video_processor="LlavaOnevisionVideoProcessor",
    ),
    "qwen2_vl": Tiny(
        text=QWEN2_TEXT, vision={**QWEN_VIT, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, flat_config=True,
        names=QWEN2_NAMES, tokens=QWEN_TOKENS, extra=("<|im_start|>",), ids=QWEN_IDS,
        image_processor=("Qwen2VLImageProcessor", {**QWEN_PIXELS, **QWEN_LIMITS}),
        processor=("Qwen2VLProcessor", {}), turns=CHATML, image=QWEN_IMAGE, video=QWEN_VIDEO,
        template_file="chat_template.json",
    ),
    "qwen2_5_vl": Tiny(  # windows of 2 x 2 visual tokens in the first vision block
        text=QWEN2_TEXT,
        vision={**QWEN_VIT, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 20,
                "fullatt_block_indexes": [1]},
        config={"tie_word_embeddings": True}, flat_config=True,
        names=QWEN2_NAMES, tokens=QWEN_TOKENS, extra=("<|im_start|>",), ids=QWEN_IDS,
        image_processor=("Qwen2VLImageProcessor", {**QWEN_PIXELS, **QWEN_LIMITS}),
        processor=("Qwen2_5_VLProcessor", {}), turns=CHATML, image=QWEN_IMAGE, video=QWEN_VIDEO,
        template_file="chat_template.json",
    ),
    "qwen3_vl": Tiny(
        text={"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                                                  "mrope_section": [4, 2, 2]}},
        vision={**QWEN_VIT, "depth": 4, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
                "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]},
        config={"tie_word_embeddings": True},
        tokens=QWEN_TOKENS, extra=("<|im_start|>",), ids=QWEN_IDS,
        image_processor=("Qwen2VLImageProcessorFast", {**QWEN_PIXELS, **QWEN_SIZE}),
        processor=("Qwen3VLProcessor", {}), turns=CHATML, image=QWEN_IMAGE, video=QWEN_VIDEO,
        video_processor="Qwen3VLVideoProcessor",
    ),
    "internvl": Tiny(
        text={"model_type": "qwen2"},
        vision={**ENCODER, "image_size": [32, 32], "patch_size": [4, 4], "attention_bias": True},
        config={"image_seq_length": 16, "downsample_ratio": 0.5},
        names=LLAVA_NAMES, tokens=QWEN_TOKENS, extra=("<|im_start|>",), ids={"image_token_id": "<IMG_CONTEXT>"},
        named_extra={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                     "video_token": "<video>"},
        image_processor=("GotOcr2ImageProcessorFast", {"size": {"height": 32, "width": 32}, "crop_to_patches": True,
                                                       "min_patches": 1, "max_patches": 2}),
        processor=("InternVLProcessor", {"image_seq_length": 16}),
        turns=CHATML, image="<IMG_CONTEXT>\n", video="<video>\n", video_processor="InternVLVideoProcessor",
    ),
    "idefics3": Tiny(
        text={"model_type": "llama"}, vision=IDEFICS_VISION, config={"scale_factor": 2},
        tokens={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"},
        extra=IDEFICS_EXTRA, ids={"image_token_id": "<image>"},
        image_processor=("Idefics3ImageProcessor", IDEFICS_IMAGES), processor=("Idefics3Processor", IDEFICS_TILE),
        start="<|begin_of_text|>", turns=IDEFICS, template_file="chat_template.json",
    ),
    "smolvlm": Tiny(
        text={"model_type": "llama", "num_key_value_heads": 4}, vision=IDEFICS_VISION, config={"scale_factor": 2},
        tokens={"eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"},
        extra=("<|im_start|>", *IDEFICS_EXTRA), ids={"image_token_id": "<image>"},
        image_processor=("SmolVLMImageProcessor", IDEFICS_IMAGES), processor=("SmolVLMProcessor", IDEFICS_TILE),
        start="<|im_start|>", turns=IDEFICS,
    ),
    "paligemma": Tiny(
        text={"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1},
        vision={**SIGLIP, "image_size": 40, "patch_size": 8, "projection_dim": 64},
        config={"projection_dim": 64, "hidden_size": 64, "tie_word_embeddings": True},
        names=CLIP_NAMES, tokens=GEMMA_TOKENS, ids={"image_token_index": "<image>"},
        named_extra={"image_token": "<image>"},
        image_processor=("SiglipImageProcessor", {"size": {"height": 40, "width": 40}, "image_seq_length": 25}),
        processor=("PaliGemmaProcessor", {}),
    ),
    "gemma3": Tiny(
        text={"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        vision={**SIGLIP, "image_size": 64, "patch_size": 8},
        config={"mm_tokens_per_image": 16, "tie_word_embeddings": True},
        names=CLIP_NAMES, tokens=GEMMA_TOKENS, extra=("<start_of_turn>", "<end_of_turn>"),
        named_extra={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                     "image_token": "<image_soft_token>"},
        ids={"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
             "eoi_token_index": "<end_of_image>"},
        image_processor=("Gemma3ImageProcessor", {"size": {"height": 64, "width": 64}, "image_seq_length": 16}),
        processor=("Gemma3Processor", {"image_seq_length": 16}),
        start="<bos>", turns=GEMMA, image="<start_of_image>",
    ),
    "mistral3": Tiny(  # a token is 2 x 2 patches; [IMG_BREAK] ends a row of them
        text={"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        vision={**ENCODER, "model_type": "pixtral", "image_size": 60, "patch_size": 5, "head_dim": 16},
        config={"spatial_merge_size": 2, "vision_feature_layer": -1},
        names=LLAVA_NAMES, tokens=LLAMA_TOKENS, extra=("[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]"),
        ids={"image_token_index": "[IMG]"},
        image_processor=("PixtralImageProcessorFast", {"size": {"longest_edge": 60},
                                                       "patch_size": {"height": 5, "width": 5}}),
        processor=("PixtralProcessor", {"patch_size": 5, "spatial_merge_size": 2, "image_token": "[IMG]",
                                        "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}),
        start="<s>", turns=MISTRAL, image="[IMG]", template_file="chat_template.json",
    ),
    "glm4v": Tiny(
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                                  "mrope_section": [1, 1, 2]}},
        vision={**QWEN_VIT, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "image_size": 30},
        tokens={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        extra=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        ids={"image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
             "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
             "video_end_token_id": "<|end_of_video|>"},
        image_processor=("Glm4vImageProcessor", {**QWEN_PIXELS, **GLM_SIZE}), processor=("Glm4vProcessor", {}),
        start="[gMASK]<sop>", turns=GLM, image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
        video_processor="Glm4vVideoProcessor",
    ),
}  # fmt: skip


# Types that no table of the package has a row for: a probe opens them.
QWEN3_VISION: Settings = {**QWEN_VIT, "depth": 4, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
                          "num_position_embeddings": 36}  # fmt: skip
QWEN3_PROCESSOR: Settings = {
    "tokens": QWEN_TOKENS, "extra": ("<|im_start|>",), "ids": QWEN_IDS, "turns": CHATML, "image": QWEN_IMAGE,
    "video": QWEN_VIDEO,
    "image_processor": ("Qwen2VLImageProcessorFast", {**QWEN_PIXELS, **QWEN_SIZE}),
    "processor": ("Qwen3VLProcessor", {}), "video_processor": "Qwen3VLVideoProcessor",
}  # fmt: skip
PROBED_HERE: dict[str, Tiny] = {
    "qwen3_vl_moe": Tiny(  # experts, and visual features that enter after the first layers
        text={"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
              "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                                  "mrope_section": [4, 2, 2]}},
        vision={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}, **QWEN3_PROCESSOR,
    ),
    "qwen3_5": Tiny(  # three layers of linear attention, then one of full attention
        text={"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
              "linear_num_value_heads": 4,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5,
                                  "mrope_interleaved": True, "mrope_section": [4, 2, 2]}},
        vision=QWEN3_VISION, **QWEN3_PROCESSOR,
    ),
    "vipllava": Tiny(  # LLaVA with features of several layers of its tower
        text={"model_type": "llama", "num_key_value_heads": 4}, vision={**CLIP, "image_size": 40, "patch_size": 8},
        config={"vision_feature_layers": [-2, -1], "image_seq_length": 25},
        tokens=LLAMA_TOKENS, ids={"image_token_index": "<image>"},
        image_processor=("CLIPImageProcessor", {"size": {"shortest_edge": 40},
                                                "crop_size": {"height": 40, "width": 40}}),
        processor=("LlavaProcessor", LLAVA_PATCHES), turns=VICUNA, image="<image>\n",
    ),
}  # fmt: skip


# --- writing ---------------------------------------------------------------------------------------------------------


def build(
    family: str,
    folder: Path,
    *,
    layers: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a complete checkpoint folder; the same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny = (FAMILIES_HERE | PROBED_HERE)[family]
    tokenizer = make_tokenizer(tiny)
    tokenizer.save_pretrained(folder)
    config = make_config(family, layers, tokenizer)
    never_said = tokenizer.convert_tokens_to_ids(["<unk>", *tiny.tokens.values(), *tiny.ids.values()])
    model = make_model(config, seed, never_said).to(dtype)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    if tiny.flat_config:
        flatten_config(folder / "config.json")
    GenerationConfig(do_sample=False, **special_ids(tokenizer)).save_pretrained(folder)
    write_weights(model, tiny.names, folder, max_shard_size)
    write_processor(tiny, folder)
    return folder


def make_tokenizer(tiny: Tiny) -> Any:
    """One word, one digit, one symbol or one special token is one token. Everything is read in lower case."""
    special = dict.fromkeys((*tiny.tokens.values(), *tiny.extra, *tiny.ids.values(), *tiny.named_extra.values()))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*special, "<unk>", *SYMBOLS, *WORDS)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    pieces = Regex(r"\n|\d|[^\W\d_]+|_|[^\w\s]")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    if bos := tiny.tokens.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", padding_side="left", clean_up_tokenization_spaces=False,
        additional_special_tokens=list(special), model_max_length=1024, **tiny.tokens, **tiny.named_extra,
    )  # fmt: skip


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def make_config(family: str, layers: int, tokenizer: Any) -> Any:
    tiny = (FAMILIES_HERE | PROBED_HERE)[family]
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        **special_ids(tokenizer), **tiny.text,
    }  # fmt: skip
    if family == "gemma3":  # every third layer sees everything, the others 16 tokens; 5 of 6 on the hub
        text["layer_types"] = ["sliding_attention" if (i + 1) % 3 else "full_attention" for i in range(layers)]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tiny.ids.items()}
    # Tying is said aloud: the default is True in some families and the text configuration has one too.
    tied = tiny.config.get("tie_word_embeddings", False)
    text["tie_word_embeddings"] = tied
    settings = {**ids, "tie_word_embeddings": tied, **tiny.config}
    config = AutoConfig.for_model(family, text_config=text, vision_config=dict(tiny.vision), **settings)
    if hasattr(config.text_config, "max_window_layers"):  # Qwen2: all of them, that is no sliding window
        config.text_config.max_window_layers = layers
    return config


def flatten_config(path: Path) -> None:
    """As Qwen2-VL and Qwen2.5-VL have it on the hub: no text_config, no layer_types, the older names for RoPE."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "dtype"):
        text.pop(name, None)
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    write_json(path, {**text, "rope_theta": rope["rope_theta"], "rope_scaling": scaling, **config})


def make_model(config: Any, seed: int, never_said: list[int]) -> Any:
    """Random weights, large enough that every layer and every bias changes the logits.

    The tokens `never_said` have logit 0, below the best of V others: a random model would end its answer anywhere, or
    say <image>, after which the number of placeholders no longer fits that of the features.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:  # norms start at 1 (Gemma's at 0), biases at 0
                    parameter += 0.2 * noise
                else:
                    fan_in = parameter.numel() // parameter.shape[0]  # [V, D] or [out, F...]
                    parameter.copy_(1.5 * fan_in**-0.5 * noise)
            # Small, or a token's own embedding decides what follows it (Gemma multiplies it by the root of D).
            model.get_input_embeddings().weight *= 0.2
            if config.tie_word_embeddings:  # the logits get back what the embeddings lost
                model.get_decoder().norm.weight += 4
            model.get_output_embeddings().weight[never_said] = 0
    return model.eval()


def write_weights(model: Any, names: Renaming, folder: Path, max_shard_size: int | str | None) -> None:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    on_disk = {}
    for name, tensor in state.items():
        renamed = (new + name.removeprefix(old) for old, new in names if name.startswith(old))
        on_disk[next(renamed, name)] = tensor.contiguous()
    save_torch_state_dict(on_disk, folder, max_shard_size=max_shard_size or "5GB", metadata={"format": "pt"})


def write_processor(tiny: Tiny, folder: Path) -> None:
    """The files of the hub: preprocessor_config.json always, the others where the family has something to say."""
    image_class, image_settings = tiny.image_processor
    processor_class, settings = tiny.processor
    images = {"image_processor_type": image_class, "processor_class": processor_class, **MEAN_STD, **image_settings}
    write_json(folder / "preprocessor_config.json", images)
    if settings:
        write_json(folder / "processor_config.json", {"processor_class": processor_class, **settings})
    if tiny.video_processor:
        frames = {key: image_settings[key] for key in ("size", *QWEN_PIXELS) if key in image_settings}
        videos = {"video_processor_type": tiny.video_processor, "processor_class": processor_class, **MEAN_STD}
        write_json(folder / "video_preprocessor_config.json", {**videos, **frames})
    if tiny.turns and tiny.template_file.endswith(".json"):
        write_json(folder / tiny.template_file, {"chat_template": chat_template(tiny)})
    elif tiny.turns:
        (folder / tiny.template_file).write_text(chat_template(tiny))


def write_json(path: Path, content: Settings) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def chat_template(tiny: Tiny) -> str:
    template = TEMPLATE.replace("START", tiny.start).replace("TURNS", json.dumps(tiny.turns))
    template = template.replace("VIDEO", "{{ " + json.dumps(tiny.video) + " }}" if tiny.video else "")
    return template.replace("IMAGE", "{{ " + json.dumps(tiny.image) + " }}")


# --- inputs ----------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "What color is the digit?",
    "Describe the image.",
    "How many red circles are there in the top left corner of this picture, and which number is next to them?",
    "Where is the cat?",
)
SIZES = ((48, 48), (64, 32), (44, 64), (28, 28), (32, 56))  # width, height


def inputs(
    processor: Any,
    *,
    batch: int = 1,
    images: int | Sequence[int] = 1,
    sizes: Sequence[tuple[int, int]] = SIZES,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Prompts of different lengths with random images of different sizes, padded on the left.

    Args:
        images: how many images every sample has, or one number for each; 0 is a prompt of text only.
        sizes: width and height of the images, taken in turn.
    """
    counts = [images] * batch if isinstance(images, int) else list(images)
    random = np.random.default_rng(seed)
    rows = [[random_image(random, sizes[(i + j) % len(sizes)]) for j in range(n)] for i, n in enumerate(counts)]
    questions = [QUESTIONS[(seed + i) % len(QUESTIONS)] for i in range(len(counts))]
    if processor.chat_template is None:
        text = ["<image>" * n + question for n, question in zip(counts, questions, strict=True)]
        return dict(processor(images=rows if any(rows) else None, text=text, padding=True, return_tensors="pt"))
    chats = [conversation(row, question) for row, question in zip(rows, questions, strict=True)]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True}))


def conversation(images: Sequence[Image.Image], question: str) -> list[Settings]:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def random_image(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Coarse blocks of color, so that resizing leaves something to see."""
    blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
