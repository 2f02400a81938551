"""The models of the zoo: what differs between families (FAMILIES) and between models (ROWS), and how one is built.

Everything is written in the layout of the hub and read back by the exporter's own reader, so that the processors that
need torchvision for videos work without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pictures import KINDS, Sizes
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

Settings = dict[str, Any]
SIDE = 72  # pixels of the picture that the towers of one size see
FREE: Sizes = (
    (48, 48), (48, 72), (72, 48), (60, 60), (60, 84), (84, 60), (72, 72), (48, 96), (96, 48), (72, 84), (84, 72),
)  # fmt: skip
SQUARE: Sizes = ((SIDE, SIDE),)
NEARLY: Sizes = ((72, 72), (60, 72), (72, 60), (66, 66), (80, 80))

# --- chat formats: (opening, closing) of a turn by role --------------------------------------------------------------
CHATML = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system")}
VICUNA = {"user": ("USER: ", " "), "assistant": ("ASSISTANT:", "</s>"), "system": ("", " ")}
MISTRAL = {"user": ("[INST]", "[/INST]"), "assistant": ("", "</s>"), "system": ("", "")}
GEMMA = {f: (f"<start_of_turn>{t}\n", "<end_of_turn>\n") for f, t in (("user", "user"), ("assistant", "model"))}
IDEFICS = {"user": ("User: ", "<end_of_utterance>\n"), "assistant": ("Assistant:", "<end_of_utterance>\n")}
TEMPLATE = (
    "START{% set turns = TURNS %}{% for message in messages %}"
    "{% set turn = turns.get(message['role'], turns['user']) %}{{ turn[0] }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ turn[1] }}{% endfor %}{% if add_generation_prompt %}{{ turns['assistant'][0] }}{% endif %}"
)

# --- towers ----------------------------------------------------------------------------------------------------------
ENCODER: Settings = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
QWEN_VIT: Settings = {"depth": 4, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "patch_size": 6,
                      "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 48,
                      "fullatt_block_indexes": [0, 1, 2, 3]}  # fmt: skip
MEAN_STD: Settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class Family:
    """What all models of one family have in common."""

    text_type: str
    vision: Settings
    tokens: dict[str, str]  # the tokenizer's named special tokens
    turns: dict[str, tuple[str, str]]
    image: str  # of the chat template
    ids: dict[str, str]  # entries of config.json that hold a special token's id
    image_processor: tuple[str, Settings]
    processor: tuple[str, Settings]
    config: Settings = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # further special tokens
    named_extra: dict[str, str] = field(default_factory=dict)  # special tokens that the processor asks for by name
    start: str = ""  # what a conversation begins with
    video_processor: str | None = None  # class, where the hub has a file for it


LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
QWEN_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
FAMILIES: dict[str, Family] = {
    "llava": Family(
        "llama", {**ENCODER, "model_type": "clip_vision_model", "projection_dim": 96, "image_size": SIDE,
                  "patch_size": 12, "num_hidden_layers": 5},
        tokens=LLAMA_TOKENS, turns=VICUNA, image="<image>\n", start="<s>", ids={"image_token_index": "<image>"},
        image_processor=("CLIPImageProcessor", {"size": {"shortest_edge": SIDE},
                                                "crop_size": {"height": SIDE, "width": SIDE}}),
        processor=("LlavaProcessor", {"patch_size": 12, "vision_feature_select_strategy": "default",
                                      "num_additional_image_tokens": 1, "image_token": "<image>"}),
        config={"vision_feature_layer": -2, "image_seq_length": 36},
    ),
    "mistral3": Family(
        "mistral", {**ENCODER, "model_type": "pixtral", "image_size": 96, "patch_size": 6, "head_dim": 24},
        tokens=LLAMA_TOKENS, turns=MISTRAL, image="[IMG]", start="<s>", ids={"image_token_index": "[IMG]"},
        extra=("[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]"),
        image_processor=("PixtralImageProcessor", {"size": {"longest_edge": 96},
                                                   "patch_size": {"height": 6, "width": 6}}),
        processor=("PixtralProcessor", {"patch_size": 6, "spatial_merge_size": 2, "image_token": "[IMG]",
                                        "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}),
        config={"spatial_merge_size": 2, "vision_feature_layer": -1},
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl_text", QWEN_VIT, tokens=QWEN_TOKENS, turns=CHATML,
        image="<|vision_start|><|image_pad|><|vision_end|>", extra=("<|im_start|>",),
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
        image_processor=("Qwen2VLImageProcessor", {"patch_size": 6, "merge_size": 2, "temporal_patch_size": 2,
                                                   "min_pixels": 48 * 48, "max_pixels": 96 * 96}),
        processor=("Qwen2_5_VLProcessor", {}),
    ),
    "gemma3": Family(
        "gemma3_text", {**ENCODER, "model_type": "siglip_vision_model", "vision_use_head": False, "image_size": SIDE,
                        "patch_size": 6},
        tokens={"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"}, turns=GEMMA, start="<bos>",
        image="<start_of_image>", extra=("<start_of_turn>", "<eos>"),
        named_extra={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                     "image_token": "<image_soft_token>"},
        ids={"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
             "eoi_token_index": "<end_of_image>"},
        image_processor=("Gemma3ImageProcessor", {"size": {"height": SIDE, "width": SIDE}, "image_seq_length": 36}),
        processor=("Gemma3Processor", {"image_seq_length": 36}),
        config={"mm_tokens_per_image": 36},
    ),
    "internvl": Family(
        "qwen2", {**ENCODER, "image_size": [SIDE, SIDE], "patch_size": [6, 6], "attention_bias": True},
        tokens=QWEN_TOKENS, turns=CHATML, image="<IMG_CONTEXT>\n", extra=("<|im_start|>",),
        ids={"image_token_id": "<IMG_CONTEXT>"},
        named_extra={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                     "video_token": "<video>"},
        image_processor=("GotOcr2ImageProcessor", {"size": {"height": SIDE, "width": SIDE}, "crop_to_patches": False}),
        processor=("InternVLProcessor", {"image_seq_length": 36}),
        config={"image_seq_length": 36, "downsample_ratio": 0.5}, video_processor="InternVLVideoProcessor",
    ),
    "smolvlm": Family(
        "llama", {**ENCODER, "image_size": SIDE, "patch_size": 6},
        tokens={"eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}, turns=IDEFICS, image="<image>",
        start="<|im_start|>", ids={"image_token_id": "<image>"},
        extra=("<|im_start|>", "<fake_token_around_image>", "<global-img>"),
        image_processor=("SmolVLMImageProcessor", {"size": {"longest_edge": SIDE},
                                                   "max_image_size": {"longest_edge": SIDE},
                                                   "do_image_splitting": False}),
        processor=("SmolVLMProcessor", {"image_seq_len": 36}),
        config={"scale_factor": 2},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model of the zoo."""

    family: str
    pictures: str  # a kind of pictures.KINDS
    sizes: Sizes  # of its pictures, (height, width) in pixels
    layers: int
    seed: int
    text: Settings  # settings of its decoder that the family leaves open
    tied: bool = False
    vision_steps: int = 600  # of training tower and projector alone: drawn shapes need few, written digits many
    steps: int = 2600  # of training the whole model


def windows(layers: int) -> list[str]:
    """Return Gemma 3's layer types: two with a sliding window, then one that sees everything (on the hub five, one).

    The window is a little wider than a picture, whose tokens see each other.
    """
    return ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]


ROWS: dict[str, Row] = {
    "qwen-shapes": Row(
        "qwen2_5_vl", "shapes", FREE, layers=12, seed=11, tied=True,
        text={"num_key_value_heads": 2,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
    ),
    "gemma-digits": Row(
        "gemma3", "digits", NEARLY, layers=12, seed=12, tied=True, vision_steps=3000, steps=3200,
        text={"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40,
              "layer_types": windows(12)},
    ),
    "llava-shapes": Row("llava", "shapes", SQUARE, layers=8, seed=13, text={"num_key_value_heads": 4}),
    "internvl-shapes": Row(
        "internvl", "shapes", SQUARE, layers=16, seed=14,
        text={"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "mistral-digits": Row(
        "mistral3", "digits", FREE, layers=12, seed=15, vision_steps=3000, steps=3200,
        text={"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None},
    ),
    "smolvlm-digits": Row(
        "smolvlm", "digits", SQUARE, layers=10, seed=16, vision_steps=3000, steps=3200,
        text={"num_key_value_heads": 2},
    ),
}  # fmt: skip


# --- building --------------------------------------------------------------------------------------------------------


def make_tokenizer(row: Row) -> Any:
    """Return a tokenizer of whole words: one word, symbol or special token is one token, case is ignored."""
    family, kind = FAMILIES[row.family], KINDS[row.pictures]
    special = (*family.tokens.values(), *family.extra, *family.ids.values(), *family.named_extra.values())
    roles = ("user", "assistant", "system", "model", ".", ",", "?", "!", ":", "\n")
    words = dict.fromkeys((*special, "<unk>", *roles, *kind.words, *kind.colors, *kind.names, *map(str, range(10))))
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\d|[^\W\d_]+|_|[^\w\s]"), behavior="removed", invert=True)
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with single spaces
    if bos := family.tokens.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", padding_side="left", clean_up_tokenization_spaces=False,
        additional_special_tokens=list(dict.fromkeys(special)), model_max_length=1024,
        **family.tokens, **family.named_extra,
    )  # fmt: skip


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Return the ids that a text configuration and a generation configuration name."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def make_config(row: Row, tokenizer: Any, layers: int | None = None) -> Any:
    """Return the model's configuration; layers: fewer than the row's, for tests."""
    family, layers = FAMILIES[row.family], layers or row.layers
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 4, "max_position_embeddings": 1024, "initializer_range": 0.06,
        **special_ids(tokenizer), **row.text, "tie_word_embeddings": row.tied,
    }  # fmt: skip
    if family.text_type not in ("qwen2_5_vl_text", "gemma3_text"):
        text["model_type"] = family.text_type
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    vision = dict(family.vision)
    if "depth" in vision:
        vision["out_hidden_size"] = text["hidden_size"]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in family.ids.items()}
    settings = {**ids, **family.config, "tie_word_embeddings": row.tied, **special_ids(tokenizer)}
    config = AutoConfig.for_model(row.family, text_config=text, vision_config=vision, **settings)
    if hasattr(config.text_config, "max_window_layers"):  # Qwen2: all of them, that is no sliding window
        config.text_config.max_window_layers = layers
    return config


def make_model(row: Row, tokenizer: Any, layers: int | None = None) -> Any:
    """Return the untrained model, the same for the same row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(row.seed)
        model = AutoModelForImageTextToText.from_config(make_config(row, tokenizer, layers), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():  # Gemma 3's projector begins at zero and would learn late
                torch.nn.init.normal_(parameter, std=parameter.shape[0] ** -0.5)
    model.generation_config = GenerationConfig(max_new_tokens=40, do_sample=False, **special_ids(tokenizer))
    return model


def write_processor(row: Row, folder: Path) -> Any:
    """Write tokenizer, processor and chat template as on the hub; return the processor that a reader gets."""
    from exporter.clean_room import load_processor

    family = FAMILIES[row.family]
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(row).save_pretrained(folder)
    (image_class, images), (processor_class, settings) = family.image_processor, family.processor
    names = {"image_processor_type": image_class, "processor_class": processor_class}
    write_json(folder / "preprocessor_config.json", {**names, **MEAN_STD, **images})
    write_json(folder / "processor_config.json", {"processor_class": processor_class, **settings})
    if family.video_processor:
        videos = {"video_processor_type": family.video_processor, "processor_class": processor_class, **MEAN_STD}
        write_json(folder / "video_preprocessor_config.json", {**videos, "size": images["size"]})
    template = TEMPLATE.replace("START", family.start).replace("TURNS", json.dumps(family.turns))
    (folder / "chat_template.jinja").write_text(template.replace("IMAGE", "{{ " + json.dumps(family.image) + " }}"))
    if not (folder / "config.json").exists():  # AutoProcessor reads the family there
        make_config(row, make_tokenizer(row)).save_pretrained(folder)
    return load_processor(folder)


def write_json(path: Path, content: Settings) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_model(model: Any, folder: Path) -> None:
    """Write configuration and weights, with the names that checkpoints of the family have on the hub."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    # transformers 5 leaves out the level that hub checkpoints, and serving engines, have in CLIP's and SigLIP's names
    if model.config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        tensors = load_file(path)
        named = {
            k if "vision_tower.vision_model." in k else k.replace("vision_tower.", "vision_tower.vision_model."): v
            for k, v in tensors.items()
        }
        save_file(named, path, metadata={"format": "pt"})
