"""The exception for everything a user can put right.

Derived from ValueError, so that library callers need no new name; a type of its own, so that the command line can tell
a wrong input (one sentence, exit code 2) from a bug of ours (traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input or an environment that can't do what was asked. The message says what, the numbers and the fix."""


class CheckFailed(Exception):  # noqa: N818 - not an error of anybody: a check ran and did not hold
    """A check ran and did not hold (verification, ONNX validation): exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest known word, or a list of all of them."""
    known = list(known)
    match = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean '{match[0]}'?" if match else f"known: {', '.join(known)}."
