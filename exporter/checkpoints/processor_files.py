"""Processor and tokenizer files of a source: whether they load and fit config.json, and what config.json can mend.

Older LLaVA folders lack what today's processors count image tokens by, fine-tuned ones a padding token. Where
config.json leaves one answer it is filled in; else the file to copy from the base model is named.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..clean_room import REFERENCE_QUESTION, PromptError, load_processor, reference_inputs
from ..errors import InputError
from ..families import FAMILIES, IMAGE_TOKENS
from .config_file import first_lines
from .image_settings import IMAGE_PART, check_image_names, check_image_settings, check_processor_names
from .json_file import parse_json
from .quantization import base_in_card
from .tokenizer_files import check_templates, check_vocabulary

PROCESSOR, IMAGES, TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"
JSON_FILES = (PROCESSOR, IMAGES, "video_preprocessor_config.json", TOKENIZER, "special_tokens_map.json",
              "added_tokens.json", "chat_template.json", "generation_config.json")  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
OLD_CLASS, CLASS = "FeatureExtractor", "ImageProcessor"
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens of the tower that are of no patch
# Types whose placeholder may lie beyond the embeddings, which are not asked for it.
MASKED_PLACEHOLDERS = ("paligemma", "gemma3", "mplug_owl2")
ADDED = re.compile(r"<(?:loc\d{4}|seg\d{3})>$")  # PaliGemma's processor adds them itself where a tokenizer lacks them
Repairs = dict[str, dict[str, Any]]  # file -> entries that are to be set in it


@dataclass(frozen=True)
class Agreement:
    """A setting of the processor that follows from config.json."""

    attribute: str  # of the processor; 'image_processor.patch_size' of a part of it
    stated: str  # where config.json says it, for messages
    expected: Callable[[Any], Any]  # from the configuration; None: it says nothing
    tells: Callable[[Any], bool] = lambda config: True  # of which configurations this is true


def _grid(config: Any) -> int | None:
    """Return the grid of one image's patches, side by side."""
    vision = config.vision_config
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else None


def _tiles(config: Any) -> int | None:
    patches, factor = _grid(config), getattr(config, "scale_factor", None)
    return patches // factor**2 if patches and factor else None


def _of_vision(name: str) -> Callable[[Any], Any]:
    return lambda config: getattr(config.vision_config, name, None)


def _is(*model_types: str) -> Callable[[Any], bool]:
    return lambda config: config.model_type in model_types


def _clip(config: Any) -> bool:
    return config.vision_config.model_type == "clip_vision_model" and config.model_type in ("llava", "llava_next")


QWEN = _is("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
AGREEMENTS = (
    Agreement("patch_size", "vision_config.patch_size", _of_vision("patch_size")),
    Agreement("vision_feature_select_strategy", "vision_feature_select_strategy",
              lambda config: getattr(config, "vision_feature_select_strategy", None)),
    Agreement("num_additional_image_tokens", "vision_config.model_type",
              lambda config: CLASS_TOKENS.get(config.vision_config.model_type)),
    Agreement("num_image_tokens", "vision_config.image_size", _grid, _is("llava_onevision")),
    Agreement("spatial_merge_size", "spatial_merge_size", lambda config: config.spatial_merge_size, _is("mistral3")),
    Agreement("image_seq_length", "image_seq_length", lambda config: config.image_seq_length, _is("internvl")),
    Agreement("image_seq_length", "mm_tokens_per_image", lambda config: config.mm_tokens_per_image, _is("gemma3")),
    Agreement("image_seq_len", "scale_factor and vision_config", _tiles, _is("idefics3", "smolvlm")),
    Agreement("image_processor.image_seq_length", "vision_config", _grid, _is("paligemma")),
    Agreement("image_processor.patch_size", "vision_config.patch_size", _of_vision("patch_size"), QWEN),
    Agreement("image_processor.merge_size", "vision_config.spatial_merge_size", _of_vision("spatial_merge_size"), QWEN),
    Agreement("image_processor.temporal_patch_size", "vision_config.temporal_patch_size",
              _of_vision("temporal_patch_size"), QWEN),
    Agreement("image_processor.crop_size.height", "vision_config.image_size", _of_vision("image_size"), _clip),
    Agreement("image_processor.max_image_size.longest_edge", "vision_config.image_size", _of_vision("image_size"),
              _is("idefics3", "smolvlm")),
)  # fmt: skip


# --- loading ----------------------------------------------------------------------------------------------------------


def load_for(name: str, folder: Path, config: Any) -> Any:
    """Return the folder's processor. Raises InputError that names the file where it does not load."""
    read = {file: parse_json(folder / file) for file in JSON_FILES if (folder / file).exists()}
    for file in read:
        check_image_settings(f"{name}: {file}", read[file], config)
    check_templates(name, folder)
    try:
        processor = load_processor(folder)
        if processor.image_processor is None:
            raise AttributeError("it has no image processor")
    except Exception as error:  # whatever its classes make of the files
        raise InputError(f"{name}: {_why(folder, error)}. {_copy(folder, config)}") from error
    check_vocabulary(name, folder)
    _check_names(name, read, processor)
    return processor


def _check_names(name: str, read: dict[str, dict[str, Any]], processor: Any) -> None:
    """Refuse or say entries of the processor's files whose names are slips."""
    processor_settings = read.get(PROCESSOR, {})
    for file, settings in ((IMAGES, read.get(IMAGES)), (PROCESSOR, processor_settings.get(IMAGE_PART))):
        if isinstance(settings, dict):
            check_image_names(f"{name}: {file}", settings, processor.image_processor)
    parameters = inspect.signature(type(processor)).parameters
    check_processor_names(f"{name}: {PROCESSOR}", processor_settings, processor, parameters)


def _why(folder: Path, error: Exception) -> str:
    """Say why a processor does not load: a damaged file, a missing one, an unknown class, or the error itself."""
    if (folder / "tokenizer.json").exists():
        parse_json(folder / "tokenizer.json")
    processing = parse_json(folder / PROCESSOR) if (folder / PROCESSOR).exists() else {}
    if not (folder / IMAGES).exists() and "image_processor" not in processing:
        return f"it has no {IMAGES}"
    if not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
        return "it has no tokenizer (tokenizer.json or tokenizer.model)"
    if unknown := _unknown_class(folder):
        return f"its files name the processor class '{unknown}', which transformers does not have"
    return f"its processor does not load ({first_lines(error)})"


def _unknown_class(folder: Path) -> str | None:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for file in (PROCESSOR, IMAGES, TOKENIZER):
        if (folder / file).exists() and (cls := parse_json(folder / file).get("processor_class")):
            return None if cls in PROCESSOR_MAPPING_NAMES.values() else str(cls)
    return None


def _copy(folder: Path, config: Any) -> str:
    row = FAMILIES.get(config.model_type)
    base = base_in_card(folder) or ("its base model" + (f", such as {row.example}" if row else ""))
    return f"Copy its processor and tokenizer files from {base}."


# --- mending ----------------------------------------------------------------------------------------------------------


def class_repairs(folder: Path) -> Repairs:
    """Return names of image processors from before they were called so: CLIPFeatureExtractor is CLIPImageProcessor."""
    if not (folder / IMAGES).is_file():
        return {}
    settings = parse_json(folder / IMAGES)
    image_class = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if not isinstance(image_class, str) or not image_class.endswith(OLD_CLASS):
        return {}
    renamed = image_class.removesuffix(OLD_CLASS) + CLASS
    return {IMAGES: {"image_processor_type": renamed, "feature_extractor_type": None}}


def setting_repairs(name: str, folder: Path, processor: Any, config: Any) -> Repairs:
    """Return what the processor lacks and config.json says. Raises InputError where both say something and disagree."""
    existing = parse_json(folder / PROCESSOR) if (folder / PROCESSOR).exists() else {}
    repairs: Repairs = {}
    for agreement in AGREEMENTS:
        if getattr(config, "vision_config", None) is None or not agreement.tells(config):
            continue
        has, value = _attribute(processor, agreement.attribute)
        expected = agreement.expected(config)
        if not has or expected is None or _same(value, expected):
            continue
        part, _, entry = agreement.attribute.rpartition(".")
        if part or existing.get(entry) is not None:
            raise InputError(
                f"{name}: the processor says {agreement.attribute}={value!r}, config.json's {agreement.stated} asks "
                f"for {expected!r}: the prompt would have more or fewer image tokens than the picture has features. "
                f"Correct {'the image processor' if part else PROCESSOR}, or config.json."
            )
        repairs.setdefault(PROCESSOR, {})[entry] = expected
    if repairs:
        repairs[PROCESSOR]["processor_class"] = type(processor).__name__.removeprefix("ImageOnly")
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        repairs[TOKENIZER] = {"pad_token": _padding(name, tokenizer, config)}
    return repairs


def _padding(name: str, tokenizer: Any, config: Any) -> str:
    """Return a token to pad with; attention masks it, so that which one it is changes no answer."""
    stated = getattr(config.get_text_config(), "pad_token_id", None)
    token = (
        tokenizer.convert_ids_to_tokens(stated) if isinstance(stated, int) and 0 <= stated < len(tokenizer) else None
    )
    token = token or tokenizer.eos_token
    if token is None:
        raise InputError(
            f"{name}: its tokenizer has neither a padding token nor one for the end: set pad_token in {TOKENIZER}."
        )
    return str(token)


def _attribute(processor: Any, path: str) -> tuple[bool, Any]:
    value = processor
    for part in path.split("."):
        has = part in value if isinstance(value, dict) else hasattr(value, part)
        if not has:
            return False, None
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return True, value


def _same(value: Any, expected: Any) -> bool:
    """Tell whether two sizes are equal, where a side of a square may stand for the square."""
    pair = expected if isinstance(expected, list | tuple) else None
    return bool(value == expected or (pair is not None and set(pair) == {value}))


# --- placeholders and vocabulary --------------------------------------------------------------------------------------


def check_tokens(name: str, processor: Any, config: Any, raw: dict[str, Any], embeddings: int) -> None:
    """Compare what the processor writes for a picture with what config.json counts, and both with the embeddings.

    Args:
        embeddings: rows of the input embeddings.
    Raises: InputError.
    """
    tokenizer = processor.tokenizer
    placeholder = _placeholder(name, processor)
    stated = next((i for name in IMAGE_TOKENS if (i := getattr(config, name, None)) is not None), None)
    if stated != placeholder:
        key = "image_token_index" if "image_token_index" in raw or "image_token_id" not in raw else "image_token_id"
        says = f"config.json says {key}={stated}" if key in raw else f"config.json has no {key}, by default {stated}"
        raise InputError(
            f"{name}: {says} ({_named(tokenizer, stated)}), the processor puts {_named(tokenizer, placeholder)}, "
            f"{placeholder}, where pictures go. Set {key} to {placeholder} in config.json."
        )
    if (video := getattr(config, "video_token_id", None)) is not None and video == stated:
        raise InputError(
            f"{name}: config.json has the same placeholder, {stated}, for images and for videos: give each its own."
        )
    spared = {stated, video} if config.model_type in MASKED_PLACEHOLDERS else set()
    too_large = {
        index for token, index in tokenizer.get_vocab().items() if index >= embeddings and not ADDED.match(token)
    }
    if beyond := sorted(too_large - spared):
        raise InputError(
            f"{name}: its tokenizer has {len(beyond)} tokens beyond the {embeddings} embeddings of the weights, "
            f"{_named(tokenizer, beyond[0])} ({beyond[0]}) among them: the tokenizer is of another checkpoint, or "
            "tokens were added without resizing the embeddings."
        )


def _placeholder(name: str, processor: Any) -> int | None:
    """Return the token that stands most often in a prompt with a picture, and not in its question."""
    prompt = _probe(name, lambda: reference_inputs(processor))["input_ids"][0].tolist()
    question = processor.tokenizer(REFERENCE_QUESTION)["input_ids"]
    added = Counter(prompt) - Counter(question)
    return added.most_common(1)[0][0] if added else None


def _probe(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except InputError:
        raise
    except PromptError as error:
        raise InputError(f"{name}: {error}.") from error
    except (
        BaseException
    ) as error:  # `tokenizers` panics, which is no Exception, where a file of its own contradicts itself
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{name}: its processor fails at a short question about a picture: {first_lines(error)}"
        ) from error


def _named(tokenizer: Any, index: Any) -> str:
    token = tokenizer.convert_ids_to_tokens(index) if isinstance(index, int) and 0 <= index < len(tokenizer) else None
    return f"'{token}'" if token is not None else "no token of the tokenizer"
