"""Turn images and questions into model inputs with a folder's own processor and chat template, as every part does."""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .video import (
    Clip,
    check_takes_both,
    check_takes_video,
    check_told_apart,
    number_words,
    video_options,
    video_processor,
)

WITHOUT_TEMPLATE = ("PaliGemmaProcessor",)  # families whose processors put one question as it stands
ANSWER_TOKEN_TYPE = {"paligemma": 1}  # its prompt sees itself both ways, answers are causal; 0 is text elsewhere

TEMPLATE_S = 5  # seconds that a chat template may take: loops in each other would go on for hours


def load_processor(folder: Path | str) -> Any:
    """Return the folder's processor, padding on the left.

    Where torchvision is missing, which has no build for every torch, its image and video processors do without. A
    processor made this way is for running, not for saving: it would write its own class name.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:
        processor = image_only(processor_class(Path(folder))).from_pretrained(folder, trust_remote_code=False)
        if getattr(processor, "video_token", None) is not None:
            processor.video_processor = video_processor(Path(folder))
    processor.tokenizer.padding_side = "left"
    return processor


def processor_class(folder: Path) -> Any:
    """Return the class that the folder names, from its module: the top level has a dummy where a package is missing."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")]
    entries = [json.loads(file.read_text()).get("processor_class") for file in files if file.exists()]
    name = next((entry for entry in entries if entry), "(none)")
    for model_type in (key for key, value in PROCESSOR_MAPPING_NAMES.items() if value == name):
        package = f"transformers.models.{model_type}"
        if importlib.util.find_spec(f"{package}.processing_{model_type}"):
            with pil_instead_of_torchvision(f"{package}.image_processing_{model_type}"):
                return getattr(importlib.import_module(f"{package}.processing_{model_type}"), name)
    raise ImportError(f"{folder} names the processor class {name}, which transformers does not have.")


@contextmanager
def pil_instead_of_torchvision(module_name: str) -> Iterator[None]:
    """Let PixtralProcessor's module use the PIL image processor's function in place of torchvision's, its equal."""
    pil = module_name.replace("image_processing_", "image_processing_pil_")
    stand_in = module_name not in sys.modules and importlib.util.find_spec(pil) is not None
    if stand_in:
        sys.modules[module_name] = importlib.import_module(pil)
    try:
        yield
    finally:
        if stand_in:
            del sys.modules[module_name]


def image_only(cls: Any) -> Any:
    """Return the processor class without its video part, which torchvision's absence would keep from loading."""
    from transformers import ProcessorMixin

    module: Any = sys.modules[cls.__module__]
    if getattr(module, "num2words", "unused") is None:  # SmolVLM spells out the number of frames of a video with it
        module.num2words = number_words

    class ImageOnly(cls):  # type: ignore[misc]
        # SmolVLM's own version reads defaults of the video processor.
        apply_chat_template = ProcessorMixin.apply_chat_template

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        @classmethod
        def get_processor_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            settings, unused = super().get_processor_dict(*args, **kwargs)
            return {**settings, "video_processor": None}, unused

    ImageOnly.__name__ = ImageOnly.__qualname__ = f"ImageOnly{cls.__name__}"
    return ImageOnly


def encode(
    processor: Any,
    chats: list[list[dict[str, Any]]],
    images: list[list[Any]],
    videos: list[list[Clip]] | None = None,
) -> dict[str, Any]:
    """Encode chats as tensors, padded on the left, with the generation prompt.

    Args:
        images: of each chat, in the order of its places; `videos` likewise.
    Raises: PromptError for a chat that can't be put, VideoError for videos that the processor does not take.
    """
    texts = [render(processor, chat) for chat in chats]
    options = video_options(processor, videos or [])
    bos = processor.tokenizer.bos_token
    if bos and texts[0].startswith(bos):
        options["add_special_tokens"] = False  # the template has written it already
    shown = images if any(images) else None
    if shown and "videos" in options:
        check_takes_both(processor)
    inputs = dict(processor(text=texts, images=shown, padding=True, return_tensors="pt", **options))
    check_told_apart(processor, inputs)
    inputs.pop("labels", None)  # PaliGemma's processor adds some that ask for nothing
    return inputs


class PromptError(ValueError):
    """A checkpoint's chat template is missing, fails, or does not place the images."""


def render(processor: Any, chat: list[dict[str, Any]]) -> str:
    """Put a chat as the chat template writes it; for processors without one (PaliGemma) image tokens and the text.

    Raises: PromptError where a template is missing, as after fine-tuning: the bare text would be another prompt than
    the one that the model was trained with; where it fails; and where it does not place every image once.
    """
    if has_video := any(part["type"] == "video" for turn in chat for part in turn["content"]):
        check_takes_video(processor)
    own_template = getattr(processor, "chat_template", None)
    if template := own_template or getattr(
        processor.tokenizer, "chat_template", None
    ):  # the tokenizer's is not looked for
        chosen = {} if own_template else {"chat_template": template}
        if has_video and (for_videos := video_template(processor)) is not None:
            chosen = {"chat_template": for_videos}
        try:
            with time_limit(TEMPLATE_S):
                text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **chosen)
        except Exception as error:  # jinja2's own, and whatever an expression of the template raises
            raise PromptError(f"the chat template fails ({type(error).__name__}: {_one_line(error)})") from error
        _check_places(processor, text, chat)
        return text
    name = type(processor).__name__.removeprefix("ImageOnly")
    if name not in WITHOUT_TEMPLATE:
        raise PromptError(
            "the checkpoint has no chat template, without which questions would be put to it without roles: copy "
            "chat_template.jinja (in older checkpoints chat_template.json, or the entry 'chat_template' of "
            "tokenizer_config.json) from the model that it was made from"
        )
    if len(chat) > 1:
        raise PromptError(f"{name} takes one question: it has no chat template that would tell {len(chat)} turns apart")
    parts = [part for turn in chat for part in turn["content"]]
    return "".join(processor.image_token if part["type"] == "image" else part["text"] for part in parts)


def video_template(processor: Any) -> str | None:
    """Return the chat template that a processor takes for chats with videos; None: its own (SmolVLM's has none)."""
    modules = (sys.modules[cls.__module__] for cls in type(processor).__mro__)
    return next((module.DEFAULT_CHAT_TEMPLATE for module in modules if hasattr(module, "DEFAULT_CHAT_TEMPLATE")), None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; in the main thread alone, which signals reach."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"it takes over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _check_places(processor: Any, text: str, chat: list[dict[str, Any]]) -> None:
    """Raise PromptError unless the image token stands once for each image of the chat, and the video token likewise."""
    shown = [part["type"] for turn in chat for part in turn["content"]]
    marks = {  # Gemma 3 writes boi_token
        "image": {getattr(processor, name, None) for name in ("image_token", "boi_token")},
        "video": {getattr(processor, "video_token", None)},
    }
    for kind, tokens in marks.items():
        number = shown.count(kind)
        placed = max((text.count(mark) for mark in tokens if isinstance(mark, str) and mark), default=number)
        if placed != number:
            raise PromptError(
                f"the prompt has {placed} places for {number} {kind}s: the chat template does not place them, or the "
                f"text holds the {kind} token itself"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def extend(inputs: dict[str, Any], answers: Any, real: Any, model_type: str) -> dict[str, Any]:
    """Return model inputs with tokens appended: answers [B, A], real [B, A] (False: padding)."""
    import torch

    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], answers], 1)
    grown["attention_mask"] = torch.cat([inputs["attention_mask"], real.to(inputs["attention_mask"].dtype)], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            kind = ANSWER_TOKEN_TYPE.get(model_type, 0)
            grown[name] = torch.cat([inputs[name], torch.full_like(answers, kind, dtype=inputs[name].dtype)], 1)
    return grown
