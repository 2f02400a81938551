"""Checks the shape of data that was read from JSON, and reads JSON files of ours without surprises.

A shape is written as data: a `Kind` for a value, a dict for an object (a key that ends in '?' may be missing),
`ListOf`, `MapOf`, `TextOr` and `Maybe` (null is fine) for the rest. Whatever does not fit is named by its path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError

LARGEST = 2**63  # of numbers: what a file may say of sizes, counts and measurements


@dataclass(frozen=True)
class Kind:
    """A kind of value: what it is called in a message, and which values are of it."""

    name: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class ListOf:
    shape: Any
    length: int | None = None  # None: any


@dataclass(frozen=True)
class MapOf:
    """An object with any keys of a kind."""

    shape: Any
    key: Kind | None = None


@dataclass(frozen=True)
class Maybe:
    """The shape, or null."""

    shape: Any


@dataclass(frozen=True)
class TextOr:
    """A text, or an object of a shape."""

    shape: Any


class Misfit(ValueError):  # noqa: N818 - a message in the making, which becomes an InputError
    """A value that is not of its shape. The message names its path and what is needed."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value) if isinstance(value, float) else real and abs(value) < LARGEST


def _is_inner_path(value: Any) -> bool:
    """Return a file below a folder, written with slashes: nothing that leads out of it."""
    if not isinstance(value, str) or not value or re.search(r"[\\\0:]", value):
        return False
    parts = PurePosixPath(value).parts
    return ".." not in parts and parts[0] != "/" and PurePosixPath(*parts).as_posix() == value


HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a pair
ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("a text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 up", _is_count)
POSITIVE = Kind("a whole number from 1 up", lambda value: _is_count(value) and value > 0)
NUMBER = Kind("a finite number", _is_number)
SIZE = Kind("a number from 0 up", lambda value: _is_number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
# Of float32 sums of many terms: one that is 0 may come out a little below.
DIVERGENCE = Kind("a number from 0 up", lambda value: _is_number(value) and value > -1e-3)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SHA256 = Kind("a SHA-256", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-fA-F]{64}", value)))
INNER_PATH = Kind("a file below the folder", _is_inner_path)
HASHES = MapOf(SHA256, key=INNER_PATH)


def one_of(*choices: Any) -> Kind:
    return Kind(" or ".join(map(repr, choices)), lambda value: isinstance(value, str) and value in choices)


def check(value: Any, shape: Any, where: str = "") -> None:
    """Raise Misfit for the first value that is not of its shape."""
    match shape:
        case Kind():
            if not shape.fits(value):
                raise Misfit(f"{_named(where)} is not {shape.name}")
        case Maybe():
            if value is not None:
                check(value, shape.shape, where)
        case TextOr():
            if not isinstance(value, str | dict):
                raise Misfit(f"{_named(where)} is neither a text nor a JSON object")
            if isinstance(value, dict):
                check(value, shape.shape, where)
        case ListOf():
            if not isinstance(value, list) or len(value) != (len(value) if shape.length is None else shape.length):
                needed = "a list" if shape.length is None else f"a list of {shape.length}"
                raise Misfit(f"{_named(where)} is not {needed}")
            for index, item in enumerate(value):
                check(item, shape.shape, f"{where}[{index}]")
        case MapOf():
            _check_object(value, where)
            for key, item in value.items():
                if shape.key is not None and not shape.key.fits(key):
                    raise Misfit(f"{_named(where)} names {key!r:.80}, which is not {shape.key.name}")
                check(item, shape.shape, f"{where}.{key}")
        case dict():
            _check_fields(value, shape, where)
        case _:
            raise TypeError(f"{shape!r} is no shape")


def _check_fields(value: Any, shape: dict[str, Any], where: str) -> None:
    _check_object(value, where)
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name in value:
            check(value[name], inner, f"{where}.{name}" if where else name)
        elif name == key:
            raise Misfit(f"it has no '{name}'" if not where else f"'{where}' has no '{name}'")


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise Misfit(f"{_named(where)} is no JSON object" if where else "it is no JSON object")


def _named(where: str) -> str:
    return f"'{where.removeprefix('.')}'" if where else "it"


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, with or without a byte order mark.

    Raises: Misfit for what is no JSON: other bytes, NaN and Infinity, nesting beyond all measure.
    """
    try:
        return parse_line(path.read_text(encoding="utf-8-sig"))
    except Misfit:
        raise
    except ValueError as error:
        raise Misfit(str(error) or type(error).__name__) from error


def parse_line(text: str) -> Any:
    """Return what a text says in JSON. Raises Misfit for what is none, as `read_json` does."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        require_whole_characters(text, content)
        return content
    except Misfit:
        raise
    except (ValueError, RecursionError) as error:
        raise Misfit(str(error) or type(error).__name__) from error


def require_whole_characters(text: str, content: Any) -> None:
    """Raise ValueError where JSON holds half of a surrogate pair: no file, no message and no hash can be made of it.

    Args:
        content: what `text` says.
    """
    if not HALF.search(text):
        return
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character, \\ud800 to \\udfff alone") from error


def _refuse_constant(name: str) -> Any:
    raise Misfit(f"it holds {name}, which is no number of JSON")


def require_file(path: Path, what: str) -> None:
    """Raise InputError unless the path is a regular file (not a folder, a pipe or a device)."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"{path} is {kind}, not {what}.")
