"""Turns of a conversation as files of this field write them, as the turns that chat templates take. Pure.

Three spellings: {role, content}, {from, value} of ShareGPT and LLaVA-instruct, and content in parts, of OpenAI and
transformers, whose images may stand in them. `<image>` in a text is the place of an image that the line names.
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
TEXT_PARTS = ("text", "input_text", "output_text")
PLACE = re.compile(r"[ \t]*\n?<image>\n?")
IMAGE_MARK = "<image>"

Turn = dict[str, Any]


def read_turns(value: Any, origin: str) -> tuple[list[Turn], list[Any]]:
    """Read turns of one spelling, and the images that stand in their parts.

    Returns: turns whose content is text, or parts of {"type": "text", "text"} and {"type": "image"}; and for each of
    the latter, in order, what stands in the part, None where the line has the image elsewhere.
    Raises: InputError for what is no conversation with a user's turn.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise InputError(_needed(origin))
    turns, images = [], []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            hint = f" {role!r} is no such role: {nearest(role, ROLES)}" if isinstance(role, str) else ""
            raise InputError(_needed(origin) + hint)
        read, part_images = _content(content, origin)
        turns.append({"role": ROLES[role.lower()], "content": read})
        images += part_images
    if not any(turn["role"] == "user" for turn in turns):
        raise InputError(_needed(origin))
    return turns, images


def _needed(origin: str) -> str:
    return (
        f"{origin}: 'messages' must be a list of {{'role': 'user' | 'assistant' | 'system', 'content': text or parts}} "
        "with a user turn."
    )


def _content(content: Any, origin: str) -> tuple[str | list[Turn], list[Any]]:
    if isinstance(content, str):
        check_text(content, origin)
        parts = _placed(content)
        images = [None] * sum(part["type"] == "image" for part in parts)
        return (parts, images) if images else (content, [])
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise InputError(_needed(origin))
    parts, images = [], []
    for part in content:
        read, part_images = _part(part, origin)
        parts += read
        images += part_images
    return parts, images


def _part(part: Any, origin: str) -> tuple[list[Turn], list[Any]]:
    """Return one part of a turn; a text may have places of images in it."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(_needed(origin))
    held = {key: value for key, value in part.items() if value is not None}  # tables have every key in every row
    kind = held.get("type", next((key for key in (*TEXT_PARTS, *IMAGE_PARTS) if key in held), None))
    if kind in TEXT_PARTS:
        text = held.get("text", held.get("content"))
        if not isinstance(text, str):
            raise InputError(f"{origin}: a part of type '{kind}' holds no text.")
        check_text(text, origin)
        placed = _placed(text)
        images = [None] * sum(piece["type"] == "image" for piece in placed)
        return (placed if images else [{"type": "text", "text": text}]), images
    if kind in IMAGE_PARTS:
        return [{"type": "image"}], [_inline(held)]
    raise InputError(f"{origin}: a part of type {kind!r} is neither text nor an image ({', '.join(IMAGE_PARTS)}).")


def _inline(part: Mapping[str, Any]) -> Any:
    """Return the image that stands in a part, as `image_from` takes it; None for a mere place."""
    for key in ("image_url", "image", "url", "path", "base64", "bytes", "data"):
        if key in part:
            value = part[key]
            if key == "image_url" and isinstance(value, Mapping):
                return value.get("url")
            return {key: value} if key in ("base64", "bytes") else value
    return None


def _placed(text: str) -> list[Turn]:
    """Return a text as parts, split where `<image>` stands."""
    if IMAGE_MARK not in text:
        return [{"type": "text", "text": text}]
    parts: list[Turn] = []
    for number, piece in enumerate(PLACE.split(text)):
        if number > 0:
            parts.append({"type": "image"})
        if piece:
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
