"""Turns of a conversation as files of this field write them, as the turns that chat templates take. Pure.

Three spellings: {role, content}, {from, value} of ShareGPT and LLaVA-instruct, and content in parts, of OpenAI and
transformers, whose images and videos may stand in them. `<image>` in a text is the place of an image that the line
names, `<video>` that of a video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, nearest

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}
IMAGE_PARTS = ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url", "input_video")
TEXT_PARTS = ("text", "input_text", "output_text")
PLACE = re.compile(r"[ \t]*\n?<(image|video)>\n?")
IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"

Turn = dict[str, Any]
Inline = dict[str, list[Any]]  # by kind, "image" and "video": what stands at each place, None where it is elsewhere


def read_turns(value: Any, origin: str) -> tuple[list[Turn], Inline]:
    """Read turns of one spelling, and the images and videos that stand in their parts.

    Returns: turns whose content is text, or parts of {"type": "text", "text"}, {"type": "image"} and {"type": "video"};
    and for each of the latter two, by kind and in order, what stands in the part, None where the line has it elsewhere.
    Raises: InputError for what is no conversation with a user's turn.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise InputError(_needed(origin))
    turns: list[Turn] = []
    inline: Inline = {"image": [], "video": []}
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            hint = f" {role!r} is no such role: {nearest(role, ROLES)}" if isinstance(role, str) else ""
            raise InputError(_needed(origin) + hint)
        turns.append({"role": ROLES[role.lower()], "content": _content(content, inline, origin)})
    if not any(turn["role"] == "user" for turn in turns):
        raise InputError(_needed(origin))
    return turns, inline


def _needed(origin: str) -> str:
    return (
        f"{origin}: 'messages' must be a list of {{'role': 'user' | 'assistant' | 'system', 'content': text or parts}} "
        "with a user turn."
    )


def _content(content: Any, inline: Inline, origin: str) -> str | list[Turn]:
    """Return a turn's text or parts; what stands in its places is put into `inline`."""
    if isinstance(content, str):
        check_text(content, origin)
        parts = _placed(content, inline)
        return content if all(part["type"] == "text" for part in parts) else parts
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise InputError(_needed(origin))
    return [read for part in content for read in _part(part, inline, origin)]


def _part(part: Any, inline: Inline, origin: str) -> list[Turn]:
    """Return one part of a turn; a text may have places of images and videos in it."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(_needed(origin))
    held = {key: value for key, value in part.items() if value is not None}  # tables have every key in every row
    named = (key for key in (*TEXT_PARTS, *IMAGE_PARTS, *VIDEO_PARTS) if key in held)
    kind = held.get("type", next(named, None))
    if kind in TEXT_PARTS:
        text = held.get("text", held.get("content"))
        if not isinstance(text, str):
            raise InputError(f"{origin}: a part of type '{kind}' holds no text.")
        check_text(text, origin)
        return _placed(text, inline)
    if kind in IMAGE_PARTS:
        inline["image"].append(_inline_image(held))
        return [{"type": "image"}]
    if kind in VIDEO_PARTS:
        inline["video"].append(_inline_video(held))
        return [{"type": "video"}]
    raise InputError(
        f"{origin}: a part of type {kind!r} is neither text nor an image ({', '.join(IMAGE_PARTS)}) nor a video "
        f"({', '.join(VIDEO_PARTS)})."
    )


def _inline_image(part: Mapping[str, Any]) -> Any:
    """Return the image that stands in a part, as `image_from` takes it; None for a mere place."""
    for key in ("image_url", "image", "url", "path", "base64", "bytes", "data"):
        if key in part:
            value = part[key]
            if key == "image_url" and isinstance(value, Mapping):
                return value.get("url")
            return {key: value} if key in ("base64", "bytes") else value
    return None


def _inline_video(part: Mapping[str, Any]) -> Any:
    """Return the video that stands in a part, with its times, as `video_from` takes it; None for a mere place."""
    for key in ("video_url", "video", "frames", "url", "path"):
        if key in part:
            value = part[key]
            if isinstance(value, Mapping):
                return value
            held = {"frames" if isinstance(value, list) else "path": value}
            return held | {name: part[name] for name in ("fps", "timestamps") if name in part}
    return None


def _placed(text: str, inline: Inline) -> list[Turn]:
    """Return a text as parts, split where `<image>` and `<video>` stand."""
    if IMAGE_MARK not in text and VIDEO_MARK not in text:
        return [{"type": "text", "text": text}]
    parts: list[Turn] = []
    for number, piece in enumerate(PLACE.split(text)):  # texts, with the kinds of places between them
        if number % 2:
            inline[piece].append(None)
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def check_text(text: str, origin: str) -> None:
    """Raise InputError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: the text holds an incomplete character ({error.reason} at {error.start})."
        ) from error


def text_of(turn: Turn) -> str:
    """Return all text of a turn."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
