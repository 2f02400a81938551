"""A sample: one question about images, with the answers that are right, from a record of any spelling."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .answers import answers_among, lettered_choices, read_answers, read_choices, read_listed, read_type
from .chats import IMAGE_MARK, Turn, check_text, read_turns, text_of
from .images import image_from, image_pixels, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

# What metrics read beside question, answer and choices, and the columns that hold it where none is named.
METRIC_COLUMNS = {
    "category": ("category", "data_type"),
    "question_id": ("question_id",),
    "index": ("index",),
    "hint": ("hint",),
    "direct_answers": ("direct_answers",),
    "reference": ("reference", "gpt_answer", "gpt_answer_1"),
    "caption": ("caption", "context"),
}
ANSWER_COLUMNS = ("answer", "answers", "correct_choice_idx", "reference", "gpt_answer", "gpt_answer_1")  # the first
TURN_KEYS = ("messages", "conversations", "conversation")


class TextOnlyError(InputError):
    """A question without an image: there is nothing wrong with it, but it says nothing of how a picture is seen."""


@dataclass(frozen=True)
class Sample:
    """One question about zero or more images."""

    origin: str  # 'file.jsonl line 3', for messages
    images: tuple[Any, ...]  # `Path`, `images.Encoded`, or images of PIL: not decoded before `open_images`
    messages: tuple[Turn, ...]  # chat turns; images are still apart from them
    answers: tuple[str, ...] = ()  # any of them is right; empty: unlabelled
    type: str | None = None
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)  # what else of its line a metric may read

    @functools.cached_property
    def pixels(self) -> int:
        """Return the pixels of all images by their headers, 0 for one that can't be read: visual tokens follow."""
        return sum(map(image_pixels, self.images))

    def open_images(self) -> list[Image]:
        """Return upright RGB images. Raises InputError that names the file and where it was asked for."""
        return [open_image(image, self.origin) for image in self.images]

    def chat(self) -> list[Turn]:
        """Return turns for a chat template: images first in the first user turn, unless the turns place them."""
        turns: list[Turn] = []
        for turn in self.messages:
            content = turn["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            turns.append({"role": turn["role"], "content": parts})
        placed = sum(part.get("type") == "image" for turn in turns for part in turn["content"])
        if placed == 0:
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = [{"type": "image"}] * len(self.images) + first["content"]
        elif placed != len(self.images):
            raise InputError(f"{self.origin}: the messages place {placed} images, the line names {len(self.images)}.")
        return turns


def sample_from(
    record: Mapping[str, Any], origin: str, folder: Path, *, allow_urls: bool = False, text_only: bool = False
) -> Sample:
    """Read one record; unknown keys are ignored. Raises InputError, TextOnlyError for a record that names no image.

    Args:
        folder: what paths of images are relative to.
        text_only: take a record that names no image, or null, as a question without one.
    """
    turns, inline = _turns(record, origin)
    images = [] if text_only and _names_no_image(record, inline) else _images(record, inline, origin)
    if not images and not text_only:
        raise TextOnlyError(f"{origin}: a question without an image ('image' or 'images' is missing).")
    answer = next((record[key] for key in ANSWER_COLUMNS if record.get(key) is not None), None)
    answers = read_answers(answer, origin)
    if turns[-1]["role"] == "assistant":  # the wanted answer, written as a turn
        answers = answers or read_answers(text_of(turns[-1]), origin)
        turns = turns[:-1]
        if not any(turn["role"] == "user" for turn in turns):
            raise InputError(f"{origin}: the conversation asks nothing before its answer.")
    choices = read_choices(record.get("choices", record.get("options", lettered_choices(record))), origin)
    return Sample(
        origin=origin,
        images=tuple(image_from(image, folder, origin, allow_urls=allow_urls) for image in images),
        messages=tuple(turns),
        answers=answers_among(answers, answer, choices, origin),
        type=read_type(record.get("type")),
        choices=tuple(choices.values()),
        fields=_fields(record, answer, origin),
    )


def _fields(record: Mapping[str, Any], answer: Any, origin: str) -> dict[str, Any]:
    """Return what a metric may read of a record, under the names of METRIC_COLUMNS, and its answer as it stands."""
    fields = {"answer": answer}
    for name, columns in METRIC_COLUMNS.items():
        if (column := next((candidate for candidate in columns if candidate in record), None)) is not None:
            fields[name] = record[column]
    if "direct_answers" in fields:
        fields["direct_answers"] = read_listed(fields["direct_answers"], "direct_answers", origin)
    return fields | {key: record[key] for key in ("A", "B", "choice_a", "choice_b") if key in record}


def _names_no_image(record: Mapping[str, Any], inline: list[Any]) -> bool:
    named = [record.get(key) for key in ("image", "images")]
    return not inline and all(value in (None, [], [None]) for value in named)


def _turns(record: Mapping[str, Any], origin: str) -> tuple[list[Turn], list[Any]]:
    """Return the conversation, and what stands at its places of images (None: the record has the image elsewhere)."""
    for key in TURN_KEYS:
        if record.get(key):
            return read_turns(record[key], origin)
    question = record.get("question")
    if isinstance(question, list) and question:
        return read_turns(question, origin)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{origin}: neither 'question' nor 'messages'.")
    check_text(question, origin)
    return read_turns([{"role": "user", "content": question}], origin)


def _images(record: Mapping[str, Any], inline: list[Any], origin: str) -> list[Any]:
    """Return images in the order of their places; those of the record alone where the turns have none in them."""
    named = record.get("images", record.get("image"))
    if named is None:
        named = record.get("image")
    named = [] if named is None else list(named) if isinstance(named, list | tuple) else [named]
    if any(image is None for image in named):
        raise InputError(f"{origin}: an image is null. Take it out, or the line.")
    if not any(image is not None for image in inline):
        if inline and len(inline) != len(named):
            raise InputError(f"{origin}: the messages place {len(inline)} images, the line names {len(named)}.")
        return named
    places = sum(image is None for image in inline)
    if places != len(named) and not (places == 0 and named == inline):
        raise InputError(
            f"{origin}: the messages hold {len(inline) - places} images and place {places} more, the line names "
            f"{len(named)}."
        )
    rest = iter(named)
    return [next(rest) if image is None else image for image in inline]


__all__ = ["IMAGE_MARK", "Sample", "TextOnlyError", "sample_from"]
