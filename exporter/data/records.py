"""Records of a file: one JSON object a line, or a JSON array of them.

Lines end at a newline and nowhere else: U+2028, U+0085 and the like may stand in a JSON text.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

Record = dict[str, Any]
OTHER_TEXTS = {  # byte order marks
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}


def read_records(path: Path) -> list[tuple[str, Record]]:
    """Return every record with its place, 'file.jsonl line 3'. Raises InputError that names the line."""
    text = read_text(path)
    records = list(_array(text, path) if text.lstrip()[:1] == "[" and _is_array(text) else _lines(text, path))
    if not records:
        raise InputError(f"{path} holds no lines: one JSON object a line is needed.")
    return records


def read_text(path: Path) -> str:
    """Return the text of a regular file in UTF-8, with or without its mark. Raises InputError."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):
        raise InputError(f"{path} is a pipe or a device, which can't be read twice: save it as a file.")
    content = path.read_bytes()
    for mark, name in OTHER_TEXTS.items():
        if content.startswith(mark):
            raise InputError(f"{path} is {name} text: save it as UTF-8.")
    for mark, name in PACKED.items():
        if content.startswith(mark):
            raise InputError(f"{path} is compressed by {name}: decompress it first.")
    if content[:8].count(0) > 2 and b"{" in content[:8]:
        raise InputError(f"{path} is UTF-16 text: save it as UTF-8.")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file ({error.reason} at byte {error.start}).") from error


def _lines(text: str, path: Path) -> Iterator[tuple[str, Record]]:
    whole = _whole_object(text)
    if whole is not None:
        yield from _listed(whole, path)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            origin = f"{path} line {number}"
            yield origin, _object(parse(line, f"{origin} is no JSON", ": one object a line is needed."), origin)


def _is_array(text: str) -> bool:
    """Return whether the whole file is one array; a line that is an array of its own is that line's mistake."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return not any(line.lstrip().startswith("{") for line in text.split("\n")[1:2])
    return True


def _array(text: str, path: Path) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(parse(text, f"{path} is no JSON", "."), 1):
        origin = f"{path} record {number}"
        yield origin, _object(record, origin)


def _whole_object(text: str) -> Record | None:
    """Return the object of a file that is one over several lines; None for lines."""
    if text.strip().count("\n") == 0 or _reads(text.strip().split("\n", 1)[0]):
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _reads(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _listed(whole: Record, path: Path) -> Iterator[tuple[str, Record]]:
    """Yield the records of one object: itself, or the list under 'data', as TextVQA has it."""
    if isinstance(whole.get("data"), list):
        for number, record in enumerate(whole["data"], 1):
            origin = f"{path} record {number}"
            yield origin, _object(record, origin)
        return
    yield f"{path}", whole


def _object(record: Any, origin: str) -> Record:
    if not isinstance(record, dict):
        raise InputError(f"{origin} holds a {type(record).__name__}, not a JSON object.")
    return record


def parse(text: str, head: str, tail: str) -> Any:
    """Read JSON, strictly: no key twice, of which one would be lost, and no NaN. Raises InputError: head (why) tail."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise InputError(f"{head} (nested too deeply){tail}") from error
    except ValueError as error:
        raise InputError(f"{head} ({error}){tail}") from error


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return entries


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON, write null")
