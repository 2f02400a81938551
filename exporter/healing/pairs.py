"""Which questions are learnt from, and which ones, about other pictures, judge."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.pictures import split_by_picture
from ..data.samples import Sample
from ..models.questions import portion

SHARE_HELD_OUT, MOST_HELD_OUT = 8, 128  # one question in so many judges, so many at most


def parted(samples: Sequence[Sample], seed: int) -> tuple[list[int], list[int]]:
    """Return the questions to learn from and those to judge by, about other pictures, as indices.

    The latter are among those on which nothing was fitted when the same questions served to compress. None are held
    out where there are too few pictures.
    """
    split = split_by_picture(samples, portion("held_out", len(samples)), seed)
    number = min(MOST_HELD_OUT, max(len(samples) // SHARE_HELD_OUT, portion("held_out", len(samples)) // 2))
    pictures: set[int] = set()
    numbers = {picture: split.pictures.count(picture) for picture in {split.pictures[i] for i in split.held_out}}
    for index in split.held_out:
        if sum(numbers[picture] for picture in pictures) >= number:
            break
        pictures.add(split.pictures[index])
    held_out = [index for index, picture in enumerate(split.pictures) if picture in pictures]
    return [index for index, picture in enumerate(split.pictures) if picture not in pictures], held_out
