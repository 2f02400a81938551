"""Entries of a settings file that are one slip away from an entry that is missing: 'image_stdx' for 'image_std'.

What nobody knows is left alone: folders of the hub carry entries of older versions, of training, of other programs.
Only where a known entry is missing and one that is unknown has nearly its name was something renamed, and what the
file says would silently be the class's default.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

SHORTEST = 4  # characters: shorter names are near each other by chance
OF_A_KIND = re.compile(r"(?:bo|eo)\w_token")  # begin and end of an image, of audio, of a text: neighbours, no slips


def misspelt(settings: Mapping[str, Any], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each unknown entry with the known one that it stands for, which the settings lack.

    Args:
        known: names that the class which reads the settings understands.
    """
    missing = [name for name in sorted(known) if name not in settings and not name.startswith("_")]
    for entry in settings:
        if entry in known or entry.startswith("_"):
            continue
        if meant := next((name for name in missing if is_slip(entry, name)), None):
            yield entry, meant


def is_slip(entry: str, known: str) -> bool:
    """Tell whether a name is another one in other case, with spaces around it, or with one character more or less."""
    plain = entry.strip().casefold()
    if plain == known.casefold():
        return True
    if min(len(plain), len(known)) < SHORTEST or (OF_A_KIND.match(plain) and OF_A_KIND.match(known)):
        return False
    if f"{plain}s" == known or f"{known}s" == plain:  # one or several: both are names that classes have
        return False
    return one_edit(plain, known.casefold())


def one_edit(first: str, second: str) -> bool:
    """Tell whether one character more, less or another makes a text of the other."""
    short, long = sorted((first, second), key=len)
    if len(long) - len(short) > 1:
        return False
    at = next((index for index, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[at:] == long[at + 1 :] or (len(short) == len(long) and short[at + 1 :] == long[at + 1 :])
