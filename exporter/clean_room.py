"""Verification in a clean process, and the few steps that it shares with the process that writes.

Run as a script by verify.py: `python -I clean_room.py FOLDER`. It must show that a checkpoint needs nothing of ours,
so this file imports the standard library, torch, transformers and PIL only, and blocks any import of `exporter`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REFERENCE_QUESTION = "Describe this image."
REFERENCE_TOKENS = 12
WITHOUT_TEMPLATE = ("PaliGemmaProcessor",)  # families whose processors put one question as it stands
GENERATION_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # all that greedy answers take from a folder
ANSWER_TOKEN_TYPE = {"paligemma": 1}  # its prompt sees itself both ways, answers are causal; 0 is text elsewhere
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of logits, relative to the largest


def load_processor(folder: Path | str) -> Any:
    """The folder's processor, padding on the left; one for images and text only where torchvision is missing.

    Video processors need torchvision, which has no build for every torch. A processor made this way is for running,
    not for saving: it would write its own class name.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:
        processor = image_only(processor_class(Path(folder))).from_pretrained(folder, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"
    return processor


def processor_class(folder: Path) -> Any:
    """The class that the folder names, from its own module: the top level has a dummy where a package is missing."""
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
    """PixtralProcessor's module imports a function of the torchvision image processor; the PIL one has the same."""
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
    """The processor class without its video part."""
    from transformers import ProcessorMixin

    module: Any = sys.modules[cls.__module__]
    if getattr(module, "num2words", "unused") is None:  # SmolVLM spells out the number of frames of a video with it
        module.num2words = str

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


def encode(processor: Any, chats: list[list[dict[str, Any]]], images: list[list[Any]]) -> dict[str, Any]:
    """Chats as tensors, padded on the left: one user turn each, images first, then the generation prompt."""
    texts = [render(processor, chat) for chat in chats]
    options = {}
    bos = processor.tokenizer.bos_token
    if bos and texts[0].startswith(bos):
        options["add_special_tokens"] = False  # the template has written it already
    shown = images if any(images) else None
    inputs = dict(processor(text=texts, images=shown, padding=True, return_tensors="pt", **options))
    inputs.pop("labels", None)  # PaliGemma's processor adds some that ask for nothing
    return inputs


class PromptError(ValueError):
    """A checkpoint's chat template is missing, fails, or does not place the images."""


def render(processor: Any, chat: list[dict[str, Any]]) -> str:
    """Put a chat as the chat template writes it; for processors without one (PaliGemma) image tokens and the text.

    Raises: PromptError where a template is missing, as after fine-tuning: the bare text would be another prompt than
    the one that the model was trained with; where it fails; and where it does not place every image once.
    """
    own = getattr(processor, "chat_template", None)
    if template := own or getattr(processor.tokenizer, "chat_template", None):  # the tokenizer's is not looked for
        chosen = {} if own else {"chat_template": template}
        try:
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


def _check_places(processor: Any, text: str, chat: list[dict[str, Any]]) -> None:
    """Raise PromptError unless the image token stands once for each image of the chat."""
    shown = sum(part["type"] == "image" for turn in chat for part in turn["content"])
    marks = {getattr(processor, name, None) for name in ("image_token", "boi_token")}  # Gemma 3 writes the latter
    placed = max((text.count(mark) for mark in marks if isinstance(mark, str) and mark), default=shown)
    if placed != shown:
        raise PromptError(
            f"the prompt has {placed} places for {shown} images: the chat template does not place them, or the text "
            "holds the image token itself"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def reference_inputs(processor: Any) -> dict[str, Any]:
    """The same small question for every checkpoint: a drawn image, so that nobody's data travels with a model."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (96, 96), (30, 40, 60))
    pen = ImageDraw.Draw(image)
    pen.ellipse((10, 12, 50, 52), fill=(220, 60, 50))
    pen.rectangle((54, 40, 88, 88), fill=(70, 200, 90))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REFERENCE_QUESTION}]}]
    return encode(processor, [chat], [[image]])


def reference_answer(model: Any, processor: Any) -> dict[str, list[Any]]:
    """What the model says to the reference question, greedily, and how sure it is of each token.

    'margins' are the gaps between the two highest logits, relative to the highest magnitude: two machines may well
    disagree about a token whose margin is below the rounding of the dtype.
    """
    import torch

    inputs = {k: v.to(model.device) for k, v in reference_inputs(processor).items()}
    made = generate(model, inputs)
    logits = torch.stack([step[0] for step in made.logits]).float()  # [tokens, vocabulary]
    best = logits.topk(2).values
    margins = (best[:, 0] - best[:, 1]) / logits.abs().amax(-1)
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return {"tokens": tokens, "margins": [round(m, 6) for m in margins.tolist()]}


def generate(model: Any, inputs: dict[str, Any], new_tokens: int = REFERENCE_TOKENS) -> Any:
    """Exactly `new_tokens` greedy tokens and their logits, whatever the checkpoint's generation config says."""
    exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with greedy(model, **exactly, return_dict_in_generate=True, output_logits=True) as settings:
        return model.generate(**inputs, generation_config=settings)


def greedy_answers(model: Any, inputs: dict[str, Any], max_new_tokens: int, **routing: Any) -> Any:
    """Greedy answers [B, A] of at most `max_new_tokens`, whatever the checkpoint's generation config says.

    Args:
        routing: what a routed model's `generate` takes beside its inputs.
    """
    with greedy(model, max_new_tokens=max_new_tokens) as settings:
        made = model.generate(**inputs, generation_config=settings, **routing)
    return made[:, inputs["input_ids"].shape[1] :]


@contextmanager
def greedy(model: Any, **more: Any) -> Iterator[Any]:
    """Give settings for `generate` that take nothing from the folder's generation_config.json but its token ids.

    The model's own settings step aside meanwhile: `generate` fills in from them whatever it is not given, such as a
    bias, a penalty, a time limit, or a number of answers.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    ids = {name: _token_ids(own, name) for name in GENERATION_TOKENS}
    settings = GenerationConfig(**ids, **more, do_sample=False, num_beams=1, use_cache=True)
    model.generation_config = GenerationConfig(**ids)
    try:
        yield settings
    finally:
        model.generation_config = own


def _token_ids(settings: Any, name: str) -> int | list[int] | None:
    """One entry of generation_config.json. Raises ValueError unless it is a token id, a list of them, or nothing."""
    value = getattr(settings, name, None)
    several = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in several):
        if name != "pad_token_id":
            raise ValueError(f"generation_config.json: {name} is {value!r}, which is no token id.")
        return None  # -1 for none: some checkpoints have it, and `generate` then pads with the end token
    return value


def cache_difference(model: Any, processor: Any, **routing: Any) -> float:
    """How far an answer's logits with the cache are from those of one pass without, relative to the largest.

    Args:
        routing: what a routed model's pass takes beside its inputs.
    """
    import torch

    inputs = {k: v.to(model.device) for k, v in reference_inputs(processor).items()}
    length = inputs["input_ids"].shape[1]
    made = generate(model, inputs)
    answer = made.sequences[:, length:]
    whole = extend(inputs, answer, torch.ones_like(answer, dtype=torch.bool), model.config.model_type)
    with torch.no_grad():
        logits = model(**whole, use_cache=False, **routing).logits[0, length - 1 : -1].float()
    decoded = torch.stack([step[0] for step in made.logits]).float()
    return ((logits - decoded).abs().max() / decoded.abs().max()).item()


def first_difference(said: list[int], expected: list[int], margins: list[float], tolerance: float) -> int | None:
    """Position of the first token that differs and was not a tie within rounding; what follows a tie counts no more."""
    for position, (token, wanted, margin) in enumerate(zip(said, expected, margins, strict=True)):
        if token != wanted:
            return None if margin <= tolerance else position
    return None


def extend(inputs: dict[str, Any], answers: Any, real: Any, model_type: str) -> dict[str, Any]:
    """Model inputs with tokens appended: answers [B, A], real [B, A] (False: padding)."""
    import torch

    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], answers], 1)
    grown["attention_mask"] = torch.cat([inputs["attention_mask"], real.to(inputs["attention_mask"].dtype)], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            kind = ANSWER_TOKEN_TYPE.get(model_type, 0)
            grown[name] = torch.cat([inputs[name], torch.full_like(answers, kind, dtype=inputs[name].dtype)], 1)
    return grown


def verify(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Load with transformers alone and compare with what was recorded at export. {"problems": [...], ...}

    A folder with a router is looked at twice: as the plain model that it is without remote code, and routed.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = json.loads((folder / "compression.json").read_text(encoding="utf-8-sig"))
    report = verify_once(folder, device, record, record["reference"], trust=False)
    if "router" in record and not report["problems"]:
        routed = verify_once(folder, device, record, record["router"]["reference"], trust=True)
        report["problems"] = [f"routed: {problem}" for problem in routed["problems"]]
        report["routed"] = routed
    return report


def verify_once(
    folder: Path, device: str, record: dict[str, Any], reference: dict[str, Any], trust: bool
) -> dict[str, Any]:
    """Load, answer the reference question, with and without the cache; `trust`: by the folder's own modeling file."""
    import torch
    from transformers import AutoModelForImageTextToText

    dtype = record["reference"]["dtype"]
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=trust
    )
    model.eval().to(device)
    if "preset" in reference:  # the default was set to another one since
        model.set_budget(reference["preset"])
    problems = []
    tolerated = set(record["source"].get("unexpected_keys", ()))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(set(map(str, report[kind])) - tolerated)
        if names:
            problems.append(f"{len(names)} {kind.replace('_', ' ')}, {names[0]} among them")
    if problems:
        return {"problems": problems}
    processor = load_processor(folder)
    tolerance = TOLERANCE[dtype]
    try:
        said = reference_answer(model, processor)["tokens"]
    except PromptError as error:
        return {"problems": [str(error)]}
    expected = reference["tokens"]
    if (at := first_difference(said, expected, reference["margins"], tolerance)) is not None:
        problems.append(f"token {at + 1} of the reference answer is {said[at]}, not {expected[at]} as at export")
    routing = {"prompt_length": reference_inputs(processor)["input_ids"].shape[1]} if trust else {}
    difference = cache_difference(model, processor, **routing)
    if not difference <= tolerance:
        problems.append(f"logits with and without the cache differ by {difference:.1e} (at most {tolerance:.0e})")
    return {
        "problems": problems,
        "tokens": said,
        "cache_difference": difference,
        "class": type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
    }


class _Blocked:
    """An import hook that makes `exporter` unimportable, installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "exporter":
            raise ImportError("the clean process must not import exporter")


def main() -> None:
    sys.meta_path.insert(0, _Blocked())
    report = verify(Path(sys.argv[1]), *sys.argv[2:])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
