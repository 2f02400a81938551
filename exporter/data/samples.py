"""A sample: one question about images or videos, with the answers that are right, from a record of any spelling."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .answers import answers_among, lettered_choices, read_answers, read_choices, read_listed, read_type
from .chats import IMAGE_MARK, Turn, check_text, read_turns, text_of
from .images import image_from, image_pixels, open_bytes, open_image
from .videos import TIME_KEYS, Video, open_video, video_from

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..clean_room import Clip

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
    """One question about zero or more images and videos."""

    origin: str  # 'file.jsonl line 3', for messages
    images: tuple[Any, ...]  # `Path`, `images.Encoded`, or images of PIL: not decoded before `open_images`
    messages: tuple[Turn, ...]  # chat turns; images are still apart from them
    answers: tuple[str, ...] = ()  # any of them is right; empty: unlabelled
    type: str | None = None
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)  # what else of its line a metric may read
    videos: tuple[Video, ...] = ()  # no frame is decoded before `open_videos`

    @functools.cached_property
    def pixels(self) -> int:
        """Return the pixels of all images and frames by their headers, 0 for what can't be read: tokens follow."""
        return sum(map(image_pixels, self.images)) + sum(video.pixels for video in self.videos)

    @property
    def kind(self) -> tuple[bool, tuple[int, ...]]:
        """Return what questions of one batch have in common: images or none, and the lengths of their videos."""
        return bool(self.images), tuple(len(video.frames) or video.most_frames for video in self.videos)

    @property
    def is_seen(self) -> bool:
        """Tell whether it shows anything: an image or a video."""
        return bool(self.images or self.videos)

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of all images, and of all videos, which fingerprints are made of. Raises InputError."""
        for image in self.images:
            yield open_bytes(image, self.origin)
        for video in self.videos:
            yield from video.contents(self.origin)

    def open_images(self) -> list[Image]:
        """Return upright RGB images. Raises InputError that names the file and where it was asked for."""
        return [open_image(image, self.origin) for image in self.images]

    def open_videos(self) -> list[Clip]:
        """Return the frames of each video, RGB and upright, with their times. Raises InputError, as for images."""
        return [open_video(video, self.origin) for video in self.videos]

    def check(self) -> None:
        """Raise InputError for places that don't fit, and for images and videos that can't be read."""
        self.chat()
        self.open_images()
        self.open_videos()

    def chat(self) -> list[Turn]:
        """Return turns for a chat template: images, then videos, first in the first user turn, unless turns place them.

        Raises: InputError where the turns place others than there are.
        """
        turns: list[Turn] = []
        for turn in self.messages:
            content = turn["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            turns.append({"role": turn["role"], "content": parts})
        first = next(turn for turn in turns if turn["role"] == "user")
        for kind, held in (("video", self.videos), ("image", self.images)):
            placed = sum(part.get("type") == kind for turn in turns for part in turn["content"])
            if placed == 0:
                first["content"] = [{"type": kind}] * len(held) + first["content"]
            elif placed != len(held):
                raise InputError(f"{self.origin}: the messages place {placed} {kind}s, the line names {len(held)}.")
        return turns


def sample_from(
    record: Mapping[str, Any],
    origin: str,
    folder: Path,
    *,
    allow_urls: bool = False,
    text_only: bool = False,
    frames: int | None = None,
) -> Sample:
    """Read one record; unknown keys are ignored. Raises InputError, TextOnlyError for a record that shows nothing.

    Args:
        folder: what paths of images are relative to.
        text_only: take a record that names no image, or null, as a question without one.
        frames: the most to take of a video file; None: DEFAULT_FRAMES.
    """
    turns, placed = _turns(record, origin)
    inline = placed["image"]
    videos = _videos(record, placed["video"], origin)
    no_image = (text_only or videos) and _names_no_image(record, inline)
    images = [] if no_image else _images(record, inline, origin)
    if not images and not videos and not text_only:
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
        videos=tuple(
            video_from(
                video, folder, origin, times=_video_times(record, videos, origin), frames=frames, allow_urls=allow_urls
            )
            for video in videos
        ),
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


def _turns(record: Mapping[str, Any], origin: str) -> tuple[list[Turn], dict[str, list[Any]]]:
    """Return the conversation, and by kind what stands at its places of images and videos (None: it is elsewhere)."""
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
    return _in_their_places("image", named, inline, origin)


def _videos(record: Mapping[str, Any], inline: list[Any], origin: str) -> list[Any]:
    """Return videos in the order of their places: what 'videos' lists, or 'video' alone, whose list is its frames."""
    several, single = record.get("videos"), record.get("video")
    if several is not None and not isinstance(several, list | tuple):
        raise InputError(f"{origin}: 'videos' is a list of videos; one alone is 'video'.")
    named = list(several) if several is not None else [] if single is None else [single]
    return _in_their_places("video", named, inline, origin)


def _video_times(record: Mapping[str, Any], videos: list[Any], origin: str) -> dict[str, Any]:
    """Return 'fps' or 'timestamps' of a record, which are its only video's. Raises InputError where it has several."""
    times = {key: record[key] for key in TIME_KEYS if record.get(key) is not None}
    if times and len(videos) > 1:
        raise InputError(
            f"{origin}: '{next(iter(times))}' does not say which of {len(videos)} videos it is of: write "
            "{'frames': [...], 'fps': ...} for each."
        )
    return times


def _in_their_places(kind: str, named: list[Any], inline: list[Any], origin: str) -> list[Any]:
    """Return what a record names and what stands in its turns, in the order of the places. Raises InputError."""
    if not any(item is not None for item in inline):
        if inline and len(inline) != len(named):
            raise InputError(f"{origin}: the messages place {len(inline)} {kind}s, the line names {len(named)}.")
        return named
    places = sum(item is None for item in inline)
    if places != len(named) and not (places == 0 and named == inline):
        raise InputError(
            f"{origin}: the messages hold {len(inline) - places} {kind}s and place {places} more, the line names "
            f"{len(named)}."
        )
    rest = iter(named)
    return [next(rest) if item is None else item for item in inline]


__all__ = ["IMAGE_MARK", "Sample", "TextOnlyError", "sample_from"]
