"""Ask a model the reference question, greedily: what a checkpoint says at export and must say again when verified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .processing import encode, extend

REFERENCE_QUESTION = "Describe this image."
REFERENCE_TOKENS = 12
GENERATION_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # all that greedy answers take from a folder


def reference_inputs(processor: Any) -> dict[str, Any]:
    """Make the same small question for every checkpoint: a drawn image, so that nobody's data travels with a model."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (96, 96), (30, 40, 60))
    pen = ImageDraw.Draw(image)
    pen.ellipse((10, 12, 50, 52), fill=(220, 60, 50))
    pen.rectangle((54, 40, 88, 88), fill=(70, 200, 90))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REFERENCE_QUESTION}]}]
    return encode(processor, [chat], [[image]])


def reference_answer(model: Any, processor: Any) -> dict[str, list[Any]]:
    """Return what the model says to the reference question, greedily, and how sure it is of each token.

    'margins' are the gaps between the two highest logits, relative to the highest magnitude: two machines may well
    disagree about a token whose margin is below the rounding of the dtype.
    """
    import torch

    inputs = {k: v.to(model.device) for k, v in reference_inputs(processor).items()}
    generated = generate(model, inputs)
    logits = torch.stack([step[0] for step in generated.logits]).float()  # [tokens, vocabulary]
    tokens = generated.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return {"tokens": tokens, "margins": reference_margins(logits)}


def reference_margins(logits: Any) -> list[float]:
    """Return the gap between the two highest of each token's logits [tokens, vocabulary], relative to the highest."""
    best = logits.topk(2).values
    margins = (best[:, 0] - best[:, 1]) / logits.abs().amax(-1)
    return [round(margin, 6) for margin in margins.tolist()]


def generate(model: Any, inputs: dict[str, Any], new_tokens: int = REFERENCE_TOKENS) -> Any:
    """Generate exactly `new_tokens` greedy tokens, with logits, whatever the checkpoint's generation config says."""
    exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with greedy(model, **exactly, return_dict_in_generate=True, output_logits=True) as settings:
        return model.generate(**inputs, generation_config=settings)


def greedy_answers(model: Any, inputs: dict[str, Any], max_new_tokens: int, **routing: Any) -> Any:
    """Return greedy answers [B, A] of at most `max_new_tokens`, whatever the checkpoint's generation config says.

    Args:
        routing: what a routed model's `generate` takes beside its inputs; what is None is left out, for plain models.
    """
    routing = {name: value for name, value in routing.items() if value is not None}
    with greedy(model, max_new_tokens=max_new_tokens) as settings:
        sequences = model.generate(**inputs, generation_config=settings, **routing)
    return sequences[:, inputs["input_ids"].shape[1] :]


@contextmanager
def greedy(model: Any, **more: Any) -> Iterator[Any]:
    """Give settings for `generate` that take nothing from the folder's generation_config.json but its token ids.

    The model's own settings step aside meanwhile: `generate` fills in from them whatever it is not given, such as a
    bias, a penalty, a time limit, or a number of answers.
    """
    from transformers import GenerationConfig

    settings_before = model.generation_config
    ids = {name: _token_ids(settings_before, name) for name in GENERATION_TOKENS}
    settings = GenerationConfig(**ids, **more, do_sample=False, num_beams=1, use_cache=True)
    model.generation_config = GenerationConfig(**ids)
    try:
        yield settings
    finally:
        model.generation_config = settings_before


def _token_ids(settings: Any, name: str) -> int | list[int] | None:
    """Read an entry of generation_config.json. Raises ValueError unless it is a token id, a list of them, or null."""
    value = getattr(settings, name, None)
    several = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in several):
        if name != "pad_token_id":
            raise ValueError(f"generation_config.json: {name} is {value!r}, which is no token id.")
        return None  # -1 for none: some checkpoints have it, and `generate` then pads with the end token
    return value


def cache_difference(model: Any, processor: Any, **routing: Any) -> float:
    """Return how far an answer's logits with the cache are from those of one pass without, relative to the largest.

    Args:
        routing: what a routed model's pass takes beside its inputs.
    """
    import torch

    inputs = {k: v.to(model.device) for k, v in reference_inputs(processor).items()}
    length = inputs["input_ids"].shape[1]
    generated = generate(model, inputs)
    answer = generated.sequences[:, length:]
    whole = extend(inputs, answer, torch.ones_like(answer, dtype=torch.bool), model.config.model_type)
    with torch.no_grad():
        logits = model(**whole, use_cache=False, **routing).logits[0, length - 1 : -1].float()
    decoded = torch.stack([step[0] for step in generated.logits]).float()
    difference: float = ((logits - decoded).abs().max() / decoded.abs().max()).item()
    return difference


def first_difference(actual: list[int], expected: list[int], margins: list[float], tolerance: float) -> int | None:
    """Return the position of the first token that differs; None behind a tie within rounding, where nothing counts."""
    for position, (token, right, margin) in enumerate(zip(actual, expected, margins, strict=True)):
        if token != right:
            return None if margin <= tolerance else position
    return None
