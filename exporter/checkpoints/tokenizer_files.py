"""Tokenizer and template files: what can be seen of a damage in them.

A word of another spelling, or one that is missing, can't be told from the vocabulary of another tokenizer. Two words of
one id can: only one of them comes back when the id is decoded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import InputError
from .json_file import parse_json

logger = logging.getLogger(__name__)
TOKENIZER_JSON = "tokenizer.json"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


def check_templates(name: str, folder: Path) -> None:
    """Raise InputError for a template that is no text: zeros in it would go into every prompt."""
    for path in (path for pattern in TEMPLATES for path in sorted(folder.glob(pattern))):
        file = path.relative_to(folder).as_posix()
        if not path.is_file():  # a pipe would be waited for without end
            raise InputError(f"{name}: {file} is {'a folder' if path.is_dir() else 'no regular file'}, not a template.")
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: {file} is no text in UTF-8 ({error.reason} at byte {error.start}).") from error
        if 0 in content:
            raise InputError(
                f"{name}: {file} holds {content.count(0)} zero bytes, which are in no text. Download it again."
            )


def check_vocabulary(name: str, folder: Path) -> None:
    """Refuse steps of tokenizer.json that have no type; say where two words have one id.

    Raises: InputError.
    """
    if not (folder / TOKENIZER_JSON).exists():
        return
    tokenizer = parse_json(folder / TOKENIZER_JSON)
    for step in STEPS:
        settings = tokenizer.get(step)
        if isinstance(settings, dict) and not isinstance(settings.get("type", ""), str):
            raise InputError(f"{name}: {TOKENIZER_JSON} says {step}.type={settings['type']!r:.60}; a name is needed.")
    if undefined := _undefined(tokenizer.get("post_processor")):
        raise InputError(
            f"{name}: {TOKENIZER_JSON}'s post_processor puts {undefined!r:.60} around texts and has no ids for it "
            "under special_tokens. Download it again."
        )
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and (shared := _shared(vocabulary)):
        first, second, index = shared
        logger.warning(
            "%s: %s gives the words %r and %r the same id, %d: decoding it makes one of them", name, TOKENIZER_JSON,
            first, second, index,
        )  # fmt: skip


def _undefined(step: Any) -> str | None:
    """Return the first special token of a template, or of one among several steps, that the step does not define."""
    if not isinstance(step, dict):
        return None
    several = step.get("processors")
    if isinstance(several, list):
        return next(filter(None, map(_undefined, several)), None)
    parts = [part for way in ("single", "pair") if isinstance(step.get(way), list) for part in step[way]]
    tokens = [part["SpecialToken"] for part in parts if isinstance(part, dict) and "SpecialToken" in part]
    defined = step.get("special_tokens")
    named = [str(token["id"]) for token in tokens if isinstance(token, dict) and "id" in token]
    return next((token for token in named if not isinstance(defined, dict) or token not in defined), None)


def _shared(vocabulary: dict[str, Any]) -> tuple[str, str, int] | None:
    """Return the first two words of one id."""
    if len(set(vocabulary.values())) == len(vocabulary):
        return None
    words: dict[int, str] = {}
    for word, index in vocabulary.items():
        if index in words:
            return words[index], word, index
        words[index] = word
    return None
