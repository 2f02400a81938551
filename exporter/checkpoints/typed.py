"""Read JSON data into frozen dataclasses: the annotations of a class are the shape that the data must have.

A field with a default may be missing, `X | None` may be null, `Annotated[int, COUNT]` must be of that kind, and
`Annotated[X | None, OR_MISSING]` may be missing but not null. What no field names is allowed: later versions write
more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .shapes import (
    ANYTHING,
    COUNT,
    DIVERGENCE,
    FLAG,
    NUMBER,
    POSITIVE,
    SHARE,
    SIZE,
    TEXT,
    Kind,
    ListOf,
    MapOf,
    Maybe,
    check,
)

T = TypeVar("T")
Text = Annotated[str, TEXT]
Count = Annotated[int, COUNT]
Positive = Annotated[int, POSITIVE]
Number = Annotated[float, NUMBER]
Size = Annotated[float, SIZE]  # a time, or a quotient of two amounts
Share = Annotated[float, SHARE]
Divergence = Annotated[float, DIVERGENCE]
Flag = Annotated[bool, FLAG]
OR_MISSING = "may be missing, but not null"


@dataclasses.dataclass(frozen=True)
class Length:
    """Says how long a list must be: `Annotated[tuple[Number, ...], Length(2)]`."""

    items: int


def from_data(cls: type[T], data: Any) -> T:
    """Check JSON data against a class's annotations and return it as an instance.

    Raises: Misfit that names the first value that does not fit, by its path.
    """
    check(data, _shape_of(cls))
    read: T = _built(cls, data)
    return read


def _read_fields(cls: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """Return the fields that JSON has, each with its annotation."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple((f, hints[f.name]) for f in dataclasses.fields(cls) if f.metadata.get("key", f.name))


_fields: Callable[[Any], tuple[tuple[dataclasses.Field[Any], Any], ...]] = functools.cache(_read_fields)


def _key(field: dataclasses.Field[Any]) -> str:
    key: str = field.metadata.get("key", field.name)
    return key


def named(key: str | None) -> dict[str, Any]:
    """Return a field's metadata: its key in JSON where that is no name in Python; None: it is not in JSON."""
    return {"key": key}


def shape_of(annotation: Any) -> Any:
    """Return the shape that `check` takes of an annotation."""
    if dataclasses.is_dataclass(annotation):
        return {_key(f) + ("?" if _optional(f) else ""): shape_of(hint) for f, hint in _fields(annotation)}
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        for note in arguments[1:]:
            if isinstance(note, Kind):
                return note
            if isinstance(note, Length):
                return dataclasses.replace(shape_of(arguments[0]), length=note.items)
            if note is OR_MISSING:
                return shape_of(arguments[0]).shape
        return shape_of(arguments[0])
    if origin in (Union, UnionType):
        (inner,) = (part for part in arguments if part is not type(None))
        return Maybe(shape_of(inner))
    if origin is tuple:
        return ListOf(shape_of(arguments[0]))
    if origin is dict:
        key = shape_of(arguments[0])
        return MapOf(shape_of(arguments[1]), key=None if key is TEXT else key)
    if annotation is Any:
        return ANYTHING
    raise TypeError(f"{annotation!r} is no annotation of a record")


_shape_of: Callable[[Any], Any] = functools.cache(shape_of)  # of a whole record, made once


def _optional(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _built(annotation: Any, value: Any) -> Any:
    """Build data that was checked."""
    if value is None or annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        read = {f.name: _built(hint, value[_key(f)]) for f, hint in _fields(annotation) if _key(f) in value}
        return annotation(**read)  # type: ignore[operator]
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return _built(arguments[0], value)
    if origin in (Union, UnionType):
        return _built(next(part for part in arguments if part is not type(None)), value)
    if origin is tuple:
        return tuple(_built(arguments[0], item) for item in value)
    if origin is dict:
        return {key: _built(arguments[1], item) for key, item in value.items()}
    return value
