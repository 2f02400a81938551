"""Checks of plain data, as YAML and JSON give it: each refuses what is wrong in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, nearest
from .methods import fits, in_words


def paths_as_text(data: Any, *names: str) -> None:
    """Turn fields of a frozen dataclass that were given as paths into text, which is what is kept of them."""
    for name in names:
        if isinstance(value := getattr(data, name), Path):
            object.__setattr__(data, name, str(value))


def check_types(cls: type, data: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise InputError where an entry that was read is not of the type that the data class has it in."""
    from typing import get_type_hints

    hints = get_type_hints(cls)
    for name in names:
        if name in data and not fits(data[name], hints[name]):
            raise InputError(f"{name} must be {in_words(hints[name])}, not {data[name]!r:.80}.")


def integers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(map(is_whole, value)):
        raise InputError(f"{name} must be a list of layer numbers, not {value!r}.")
    return tuple(value)


def is_whole(value: Any) -> bool:
    """Tell whether a value of YAML is a whole number; yes and no are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_keys(data: Any, known: Any, what: str) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"{what} must be a mapping of keys to values, not {type(data).__name__}.")
    for key in data:
        if key not in known:
            raise InputError(f"{what} has no key '{key}': {nearest(str(key), known)}")
