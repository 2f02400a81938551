"""The files beside the graphs, as onnxruntime-genai reads them: genai_config.json, settings for images, tokenizer.

The folder keeps the checkpoint's processor for transformers as well. The library's settings for images have a name of
their own there, since both call theirs processor_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.files import without_auto_map
from ...checkpoints.source import Source
from ...checkpoints.writer import carry_companions
from ...clean_room import PromptError, encode, load_processor
from ...errors import InputError
from ...modeling.served_router import ENTRY
from .client_files import GENERATION, merge_of, plain, side_of, write, write_generation
from .client_graphs import MARKED

# Types of transformers, and the library's name for what runs them: Qwen2-VL goes the way of Qwen2.5-VL.
TYPES = {
    "qwen2_vl": "qwen2_5_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "gemma3": "gemma3",
    "mistral3": "mistral3",
}
QWEN = ("qwen2_5_vl", "qwen3_vl")  # whose pictures are grids of patches
CONFIG, IMAGES = "genai_config.json", "genai_processor.json"
TOKENIZERS = ("BPE", "Unigram")  # kinds of vocabulary that the library reads
# Tokens that the library's processors write into prompts, by name.
WRITTEN = {
    **dict.fromkeys(QWEN, ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")),
    "gemma3": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
}
GEMMA_TOKENS = 256  # of a picture, that the library writes into a prompt for Gemma 3
RESAMPLING = ("NEAREST", "LANCZOS", "LINEAR", "CUBIC")  # by Pillow's numbers
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def carry_for_genai(source: Source, folder: Path) -> None:
    """Write configuration, processor and tokenizer, the chat template where the library looks for it."""
    config = without_auto_map(source.raw_config)
    write(folder / "config.json", {name: value for name, value in config.items() if name != ENTRY})
    carry_companions(source, folder)
    write_generation(source, folder)
    processor = load_processor(source.folder)
    tokenizer = processor.tokenizer
    if not (folder / "tokenizer.json").is_file():
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(template, str):
        settings["chat_template"] = GENERATION.sub("", template)
    write(path, {"tokenizer_class": "TokenizersBackend", **settings})


def write_settings(source: Source, folder: Path, manifest: dict[str, Any]) -> None:
    """Write genai_config.json, and what the library's own image processor goes by."""
    processor = load_processor(source.folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    write(folder / CONFIG, genai_config(source.config, processor, manifest=manifest, generation=generation))
    write(
        folder / IMAGES, {"processor": {"name": "image_processor", "transforms": transforms(source.config, processor)}}
    )


# --- genai_config.json ------------------------------------------------------------------------------------------------


def genai_config(config: Any, processor: Any, manifest: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    text = config.get_text_config()
    eos = generation.get("eos_token_id", text.eos_token_id)
    ids = {
        "bos_token_id": generation.get("bos_token_id", text.bos_token_id),
        "eos_token_id": eos if isinstance(eos, list) else [eos],
        "pad_token_id": padding_id(processor),
    }
    model = {
        "type": TYPES[config.model_type],
        **{name: value for name, value in ids.items() if value is not None},
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "decoder": decoder_part(config, manifest),
        "embedding": {
            "filename": "embeddings.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": vision_part(config, processor),
        **image_tokens(config),
    }
    search = {name: generation[name] for name in SEARCH if generation.get(name) is not None}
    search = {"do_sample": False, **search, "max_length": text.max_position_embeddings}
    return {"model": model, "search": {**search, "past_present_share_buffer": False}}


def decoder_part(config: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "filename": "decoder.onnx",
        # The width of what enters it: with a mark, where tokens of a picture see each other both ways, or with features
        # that later layers add.
        "hidden_size": manifest.get("feature_size", text.hidden_size) + (manifest["blocks"] == MARKED),
        "num_hidden_layers": manifest["layers"],
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": manifest["heads"],
        "head_size": manifest["head_size"],
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }


def vision_part(config: Any, processor: Any) -> dict[str, Any]:
    part: dict[str, Any] = {
        "filename": "vision.onnx",
        "config_filename": IMAGES,
        "inputs": {"pixel_values": "pixel_values"},
        "outputs": {"image_features": "image_features"},
    }
    if TYPES[config.model_type] in QWEN:
        part["inputs"]["image_grid_thw"] = "image_grid_thw"
        part |= {"patch_size": config.vision_config.patch_size}
        part |= {"spatial_merge_size": config.vision_config.spatial_merge_size}
    if config.model_type == "mistral3":
        part |= {"patch_size": config.vision_config.patch_size, "spatial_merge_size": config.spatial_merge_size}
    return part


def image_tokens(config: Any) -> dict[str, int]:
    """Return the ids from which the library counts positions."""
    if TYPES[config.model_type] not in QWEN:
        return {"image_token_id": config.image_token_id}
    return {name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}


def padding_id(processor: Any) -> int:
    """Return a token that no prompt holds: the library masks whatever is its padding, wherever it stands."""
    from PIL import Image

    tokenizer = processor.tokenizer
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    try:
        used = set(encode(processor, [turns], [[Image.new("RGB", (64, 64))]])["input_ids"][0].tolist())
    except PromptError as error:
        raise InputError(f"no question can be put to this model by onnxruntime-genai: {error}.") from error
    for token in (tokenizer.pad_token_id, *tokenizer.all_special_ids):
        if token is not None and token not in used:
            return int(token)
    raise InputError(
        "every special token of this model's tokenizer stands in its prompts, and onnxruntime-genai masks the one that "
        "it is told is padding: add a token for padding to the tokenizer."
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def transforms(config: Any, processor: Any) -> list[dict[str, Any]]:
    """Return the steps from a file to pixels, as the library's image processor takes them."""
    settings = plain(processor.image_processor.to_dict())
    steps = [operation("DecodeImage", color_space="RGB")]
    if settings.get("do_resize", True):
        steps.append(operation("Resize", **resizing(config, processor, settings)))
    if settings.get("do_rescale", True):
        steps.append(operation("Rescale", rescale_factor=settings["rescale_factor"]))
    if settings.get("do_normalize", True):
        steps.append(operation("Normalize", mean=settings["image_mean"], std=settings["image_std"]))
    if TYPES[config.model_type] in QWEN:
        sizes = {name: settings[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
        return [*steps, operation("PatchImage", **sizes)]
    steps.append(operation("Permute3D", dims=[2, 0, 1]))
    return [*steps, operation("PixtralImageSizes")] if config.model_type == "mistral3" else steps


def resizing(config: Any, processor: Any, settings: dict[str, Any]) -> dict[str, Any]:
    method = {"interpolation": RESAMPLING[settings["resample"]]}
    size = settings["size"]
    if TYPES[config.model_type] in QWEN:
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        sizes = {"patch_size": settings["patch_size"], "merge_size": settings["merge_size"]}
        return {**method, "smart_resize": 1, **limits, **sizes}
    if config.model_type == "mistral3":
        patch, merge = side_of(processor.patch_size), merge_of(processor)
        limits = {"min_pixels": (patch * merge) ** 2, "max_pixels": size["longest_edge"] ** 2}
        return {**method, "smart_resize": 1, **limits, "patch_size": patch, "merge_size": merge}
    return {**method, "keep_aspect_ratio": 0, "width": size["width"], "height": size["height"]}


def operation(name: str, **attributes: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name.lower(), "type": name}
    return {"operation": described | ({"attrs": attributes} if attributes else {})}


def own_processor_limits(source: Source) -> list[str]:
    """Return why the library's own processor can't put questions to this model, a clause each; empty: it can."""
    processor = load_processor(source.folder)
    tokenizer, kind = processor.tokenizer, TYPES[source.config.model_type]
    limits = []
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    if vocabulary not in TOKENIZERS:
        limits.append(f"its tokenizer is of the type {vocabulary}, and the library reads {' and '.join(TOKENIZERS)}")
    if missing := [token for token in WRITTEN[kind] if token not in tokenizer.get_vocab()]:
        limits.append(f"the library writes {missing[0]} into prompts, which its tokenizer has not")
    if kind == "gemma3" and source.config.mm_tokens_per_image != GEMMA_TOKENS:
        limits.append(
            f"a picture is {source.config.mm_tokens_per_image} tokens, and the library writes {GEMMA_TOKENS} for each"
        )
    return limits
