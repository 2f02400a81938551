"""The exception for everything a user can put right.

Derived from ValueError, so that library callers need no new name; a type of its own, so that the command line can tell
a wrong input (one sentence, exit code 2) from a bug of ours (traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_shown_as: dict[str, str] = {}  # paths of temporary folders, and what a user knows their content as


def show_as(path: object, name: object) -> None:
    """Have messages name a temporary folder as what it stands for: a user never sees where it lies."""
    _shown_as[str(path)] = str(name)


def shown(message: object) -> str:
    """Return a message without a temporary folder in it."""
    text = str(message)
    for path, name in reversed(_shown_as.items()):  # one may stand for another one that was there before
        text = text.replace(path, name)
    return text


def printable(text: str) -> str:
    """Return a text of one line that a terminal shows as it is: what is no character to print is written as its escape.

    Names come out of files: they may hold line ends, colours, or marks that turn the direction of writing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.splitlines()))


class InputError(ValueError):
    """Wrong input or an environment that can't do what was asked. The message says what, the numbers and the fix."""

    def __str__(self) -> str:
        return shown(super().__str__())


class CheckFailed(Exception):  # noqa: N818 - not an error of anybody: a check ran and did not hold
    """A check ran and did not hold (verification, ONNX validation): exit code 1."""

    def __str__(self) -> str:
        return shown(super().__str__())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ', did you mean X?' for the nearest known word, or a list of all of them."""
    known = list(known)
    match = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean '{match[0]}'?" if match else f"known: {', '.join(known)}."
