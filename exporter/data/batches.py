"""Batches: questions as the tensors that a model takes, with every token's kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError
from .samples import Sample

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Model inputs of a few samples, and which tokens are which."""

    inputs: dict[str, torch.Tensor]  # as the processor made them, left-padded
    is_visual: torch.Tensor  # [B, S] image and video placeholders
    is_text: torch.Tensor  # [B, S] neither visual, nor special, nor padding
    samples: tuple[Sample, ...]
    is_answer: torch.Tensor | None = None  # [B, S] text of the model's own answer; None: prompts only

    def to(self, device: Any) -> Batch:
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        is_answer = None if self.is_answer is None else self.is_answer.to(device)
        return Batch(
            inputs=moved,
            is_visual=self.is_visual.to(device),
            is_text=self.is_text.to(device),
            samples=self.samples,
            is_answer=is_answer,
        )


def size_order(samples: Sequence[Sample]) -> list[int]:
    """Return indices of the questions by the size of their images: batches in this order hold little padding."""
    return sorted(range(len(samples)), key=lambda index: samples[index].pixels)


def by_size(samples: Sequence[Sample]) -> list[Sample]:
    return [samples[index] for index in size_order(samples)]


def make_batches(samples: Sequence[Sample], processor: Any, config: Any, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(samples), batch_size):
        yield make_batch(samples[start : start + batch_size], processor, config)


def make_batch(samples: Sequence[Sample], processor: Any, config: Any) -> Batch:
    """Return questions with the generation prompt, left-padded."""
    from ..clean_room import PromptError, VideoError, encode

    chats, images = [sample.chat() for sample in samples], [sample.open_images() for sample in samples]
    videos = [sample.open_videos() for sample in samples]
    try:
        inputs = encode(processor, chats, images, videos)
    except (PromptError, VideoError) as error:
        raise InputError(prompt_message(error, samples, config)) from error
    except Exception as error:  # processors raise what they like: AttributeError, OverflowError, RuntimeError ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{samples[0].origin} (or a line of its batch) is refused by the processor: {reason}"
        ) from error
    _refuse_long(samples, inputs, config)
    batch = Batch(inputs, *token_kinds(inputs, processor, config), tuple(samples))
    for sample, sees in zip(samples, batch.is_visual.any(1).tolist(), strict=True):
        if sample.is_seen and not sees:
            shown = "image" if sample.images else "video"
            raise InputError(
                f"{sample.origin}: the prompt has no place for its {shown}: the processor, or image_token_id of "
                "config.json, belongs to another model."
            )
    return batch


def _refuse_long(samples: Sequence[Sample], inputs: dict[str, torch.Tensor], config: Any) -> None:
    """Raise InputError for a prompt with more tokens than a model takes whose code says how many that are."""
    limit = getattr(config, "longest_prompt", None)
    if limit is None:
        return
    for sample, length in zip(samples, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if length > limit:
            raise InputError(
                f"{sample.origin} makes a prompt of {length} tokens, and the model takes {limit}: shorten the "
                "question, or leave the line out."
            )


def check_prompt(samples: Sequence[Sample], processor: Any, config: Any) -> None:
    """Put the first question, without its images: what is wrong with a template is said before a model is loaded."""
    from ..clean_room import PromptError, VideoError, render

    for sample in samples[:1]:
        try:
            render(processor, sample.chat())
        except (PromptError, VideoError) as error:
            raise InputError(prompt_message(error, samples, config)) from error


def prompt_message(error: Exception, samples: Sequence[Sample], config: Any) -> str:
    from ..families import FAMILIES

    family = FAMILIES.get(config.model_type)
    example = (
        f" ({family.example}, for one)" if family and family.example and "copy chat_template" in str(error) else ""
    )
    return f"{samples[0].origin}: {error}{example}."


def token_kinds(inputs: dict[str, torch.Tensor], processor: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are visual, and which are text: [B, S] each. Padding and special tokens are neither."""
    import torch

    from ..families import visual_token_ids

    ids = inputs["input_ids"]
    special = torch.tensor(sorted(special_ids(processor.tokenizer)))
    is_visual = torch.isin(ids, torch.tensor(visual_token_ids(config)))
    is_text = inputs["attention_mask"].bool() & ~is_visual & ~torch.isin(ids, special)
    return is_visual, is_text


def special_ids(tokenizer: Any) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def spread(items: Iterable[T], share: float) -> Iterator[T]:
    """Yield a share of the items, evenly spread over all of them; the first one in any case."""
    taken = 0
    for number, item in enumerate(items):
        if taken <= number * share:
            taken += 1
            yield item
