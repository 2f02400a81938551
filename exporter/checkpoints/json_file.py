"""Reading a JSON file of a checkpoint: an object, or one sentence that says what is wrong with the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .safetensors_ranges import LFS_POINTER
from .shapes import require_whole_characters

MAX_JSON_BYTES = 512 << 20  # the largest tokenizer.json of the hub has 35 MB


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds. Raises InputError where it is missing, damaged or no object."""
    if not path.exists():
        raise InputError(f"{path.parent} has no {path.name}: it is no Hugging Face checkpoint.")
    return parse_json(path)


def parse_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would be waited for without end
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, not a JSON file.")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise InputError(f"{path} has {size:,} bytes, more than any JSON file of a checkpoint.")
    raw = path.read_bytes()
    if raw.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder.")
    try:
        text = raw.decode()
        content = json.loads(text, parse_constant=_constant)
        require_whole_characters(text, content)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no JSON in UTF-8 ({error.reason} at byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        state = "it is empty" if not raw.strip() else str(error)
        raise InputError(f"{path} is no JSON ({state}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def _constant(name: str) -> float:
    """Read Infinity, which stands in some configurations; refuse NaN, which is nobody's setting."""
    if name == "NaN":
        raise ValueError("NaN is no value of JSON")
    return float(name)
