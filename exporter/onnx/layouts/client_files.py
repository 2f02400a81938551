"""The files beside the graphs, as transformers.js reads them: settings, tokenizer, processor.

The folder's processor also loads in Python, and prepares what the checkpoint's own does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...checkpoints.source import Source
from ...checkpoints.writer import carry_companions
from ...clean_room import load_processor
from ...errors import InputError
from ...modeling.served_router import ENTRY
from ..manifest import CHECKPOINT_TYPE
from ..runtime.client import LAYOUT
from ..support import SQUARE, support_of
from .precisions import external_files

TOKENIZERS = ("BPE", "Unigram", "WordPiece")  # kinds of vocabulary that the client reads
# Settings of a text model that the client counts layers and heads by.
COUNTED = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
# Processors that hand no options on to their tokenizer, so that it can't be told that a prompt has its beginning.
NO_OPTIONS = ("Idefics3Processor", "SmolVLMProcessor", "Qwen2VLProcessor", "Qwen2_5_VLProcessor")
PICTURE_FIRST = ("LlavaProcessor", "PaliGemmaProcessor", "PixtralProcessor")  # the client's others take the text first
NAMED_TOKENS = ("boi_token", "eoi_token", "image_token")  # that the client's processors ask the tokenizer for
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # marks answers for training; its Jinja can't parse it
PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaProcessor",
    "llava_onevision": "LlavaProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "paligemma": "PaliGemmaProcessor",
    "gemma3": "Gemma3Processor",
    "mistral3": "PixtralProcessor",
}

COUNTED_BY = "LlavaProcessor"  # the client's processor whose count of image tokens is in its settings, whole

# Types that the client knows by another name only, whose graphs it feeds the same, with its class.
CALLED = {"llava_next": ("llava", "LlavaForConditionalGeneration")}
# Settings of an image processor that are the same where no tiles are cut.
PLAIN_SETTINGS = (
    "do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample"
)  # fmt: skip


def carry_for_client(source: Source, folder: Path, tokens: int | None = None) -> None:
    """Write everything beside the graphs; files that the client does not read are the checkpoint's own.

    Args:
        tokens: of a picture, where a serving router has left some out; None: what the model makes of it.
    """
    carry_companions(source, folder)
    processor, kind = load_processor(source.folder), processor_class(source.config)
    write_generation(source, folder)
    write_tokenizer(processor, kind, folder)
    if support_of(source.config, LAYOUT).kind == SQUARE:
        write(folder / "preprocessor_config.json", square_image_settings(processor, source.config))
        settings = square_processor_settings(processor, source.config)
    else:
        write(folder / "preprocessor_config.json", image_settings(processor, kind))
        settings = processor_settings(processor, kind)
    if tokens is not None:
        settings |= fixed_count(source.config.vision_config.image_size, tokens)
    write(folder / "processor_config.json", settings)


def processor_class(config: Any) -> str:
    if config.model_type == "llava" and config.vision_config.model_type == "pixtral":
        return "PixtralProcessor"
    return PROCESSORS[config.model_type]


def takes_picture_first(model_type: str) -> bool:
    """Return whether the client's processor for a type takes the picture before the text."""
    return PROCESSORS.get(model_type) in PICTURE_FIRST


def write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


# --- config.json and generation_config.json ---------------------------------------------------------------------------


def write_config(source: Source, folder: Path, precisions: list[str]) -> None:
    """Write every setting, defaults too: the client has none of its own. It comes last, when the files are counted."""
    config = source.config
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in ("auto_map", ENTRY):  # a serving router is in the vision graph, or left behind
        data.pop(name, None)
    text = config.get_text_config()
    counted = {name: value for name in COUNTED if (value := getattr(text, name, None)) is not None}
    data["text_config"] = {**data["text_config"], **counted}
    if config.model_type == "qwen2_vl":  # which it reads as it was published first, without a text_config
        data |= {name: value for name, value in counted.items() if name != "model_type"}
    if config.model_type in CALLED:
        model_type, architecture = CALLED[config.model_type]
        data |= {"model_type": model_type, "architectures": [architecture], CHECKPOINT_TYPE: config.model_type}
    client: dict[str, Any] = {"use_external_data_format": external_files(folder)}
    if "q8" not in precisions:  # what it would ask for in a browser
        client["dtype"] = "fp32"
    write(folder / "config.json", {**data, "transformers.js_config": client})


def write_generation(source: Source, folder: Path) -> None:
    if not (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(source.config).save_pretrained(folder)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def write_tokenizer(processor: Any, kind: str, folder: Path) -> None:
    """Write tokenizer.json with a vocabulary that the client reads, and the chat template in tokenizer_config.json."""
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer = processor.tokenizer
    if not path.is_file():
        tokenizer.backend_tokenizer.save(str(path))
    data = json.loads(path.read_text())
    data["model"] = readable_vocabulary(data["model"])
    if kind == "PaliGemmaProcessor" or (kind in NO_OPTIONS and begins_prompts(processor)):
        data["post_processor"] = None  # which adds the beginning of the text, that is there already
    write(path, data)
    settings = json.loads(settings_path.read_text()) if settings_path.is_file() else {}
    if settings.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["processor_class"] = kind
    settings |= {name: str(token) for name in NAMED_TOKENS if (token := getattr(tokenizer, name, None)) is not None}
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(template, str):
        settings["chat_template"] = GENERATION.sub("", template)
        if kind == "Gemma3Processor":
            (folder / "chat_template.jinja").write_text(settings["chat_template"])
    write(settings_path, settings)


def begins_prompts(processor: Any) -> bool:
    """Return whether the chat template writes the token that texts begin with."""
    if processor.chat_template is None or not (begin := processor.tokenizer.bos_token):
        return False
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    text: str = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return text.startswith(begin)


def readable_vocabulary(model: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's model as one that the client has.

    A list of whole words (WordLevel) is a list of word pieces none of which continues a word: a word that is not in it
    is one unknown token in both.
    """
    if model["type"] in TOKENIZERS:
        return model
    prefix = "##"
    if model["type"] != "WordLevel" or any(token.startswith(prefix) for token in model["vocab"]):
        raise InputError(
            f"this model's tokenizer is of the type {model['type']}, which transformers.js does not read: "
            f"{', '.join(TOKENIZERS)} and plain lists of words are what it does."
        )
    longest = max(map(len, model["vocab"]))
    return {
        "type": "WordPiece",
        "unk_token": model["unk_token"],
        "continuing_subword_prefix": prefix,
        "max_input_chars_per_word": longest,
        "vocab": model["vocab"],
    }


# --- processor --------------------------------------------------------------------------------------------------------


def image_settings(processor: Any, kind: str) -> dict[str, Any]:
    """Return the image processor's settings in one flat file, every default spelled out."""
    images = processor.image_processor
    settings = {name: value for name, value in plain(images.to_dict()).items() if value is not None}
    name = re.sub(r"(Fast|Pil)$", "", settings.get("image_processor_type") or type(images).__name__)
    settings |= {"image_processor_type": name, "processor_class": kind}
    if kind == "PixtralProcessor":
        settings |= {"patch_size": side_of(images.patch_size), "spatial_merge_size": merge_of(processor)}
    if kind == "PaliGemmaProcessor":
        settings["image_seq_length"] = processor.image_seq_length
    return settings


def square_image_settings(processor: Any, config: Any) -> dict[str, Any]:
    """Return settings of a plain image processor, for which a picture is one square of a tile's size."""
    settings = plain(processor.image_processor.to_dict())
    side = config.vision_config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": processor_class(config),
        **{name: settings[name] for name in PLAIN_SETTINGS if settings.get(name) is not None},
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "crop_size": {"height": side, "width": side},
    }


def square_processor_settings(processor: Any, config: Any) -> dict[str, Any]:
    """Return what the image tokens of a square picture are counted by: the overview's, and lines with their ends."""
    vision = config.vision_config
    lines = vision.image_size // vision.patch_size
    return {
        "processor_class": processor_class(config),
        "image_token": processor.image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": lines * (lines + 1),
        "vision_feature_select_strategy": "full",
    }


def fixed_count(side: int, tokens: int) -> dict[str, Any]:
    """Return settings by which a picture of `side` x `side` pixels has so many image tokens: one patch, and others."""
    return {
        "patch_size": side,
        "num_additional_image_tokens": tokens - 1,
        "vision_feature_select_strategy": "full",
    }


def processor_settings(processor: Any, kind: str) -> dict[str, Any]:
    """Return what the client's processor counts image tokens by."""
    settings = {name: value for name, value in plain(processor.to_dict()).items() if not isinstance(value, dict)}
    settings |= {"processor_class": kind}
    if kind == "LlavaProcessor" and processor.vision_feature_select_strategy == "default":
        # The client does not take the class token off again.
        count = processor.num_additional_image_tokens - 1
        settings |= {"num_additional_image_tokens": count, "vision_feature_select_strategy": "full"}
    if kind == "PixtralProcessor":
        settings |= {"patch_size": side_of(processor.patch_size), "spatial_merge_size": merge_of(processor)}
    settings.pop("chat_template", None)
    return settings


def side_of(size: Any) -> int:
    return int(size if isinstance(size, int) else size["height"])


def merge_of(processor: Any) -> int:
    return int(getattr(processor, "spatial_merge_size", 1))


def plain(value: Any) -> Any:
    """Return a processor's settings as JSON has them: sizes are dicts, enumerations numbers."""
    return json.loads(json.dumps(value, default=lambda other: dict(other) if hasattr(other, "keys") else int(other)))
