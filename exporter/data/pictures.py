"""Which questions are about the same picture, and choices among questions that keep a picture's questions together.

What is learnt from one question about a picture helps with the next one about it. Questions that judge are therefore
about pictures that nothing was learnt from. Choices are drawn with a seed: every n-th row of a file is no sample of it,
since files often go through their types of questions in turn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .samples import Sample

FEWEST = 8  # pictures that there must be for some of them to be held out


@dataclass(frozen=True)
class Split:
    """Questions to fit on and questions to judge by, as indices in the order in which they are drawn.

    Any first part of either one is a sample of it, over as many pictures as possible.
    """

    fit: tuple[int, ...]
    held_out: tuple[int, ...]  # empty where there are too few pictures
    drawn: tuple[int, ...]  # all of them
    pictures: tuple[int, ...]  # per question, the number of its picture

    @property
    def num_pictures(self) -> int:
        return len(set(self.pictures))

    @property
    def too_few(self) -> str:
        """Return a sentence where nothing could be held out; else empty."""
        if self.held_out:
            return ""
        return (
            f"the questions are about {self.num_pictures} pictures, and at least {FEWEST} are needed to hold some out "
            "and judge by them"
        )


def pictures_of(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Number the pictures, by their content: questions that share an image, a frame or a video have the same number."""
    number_of: dict[str, int] = {}  # by content
    parent: list[int] = []

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    firsts = []
    for sample in samples:
        numbers = []
        parts = (part for video in sample.videos for part in video.frames or (video.file,))
        for image in (*sample.images, *parts):
            key = _content(image)
            if key not in number_of:
                number_of[key] = len(parent)
                parent.append(len(parent))
            numbers.append(root(number_of[key]))
        if not numbers:  # no image: a picture of its own
            numbers.append(len(parent))
            parent.append(len(parent))
        for number in numbers:  # several images of one question belong together
            parent[number] = min(numbers)
        firsts.append(min(numbers))
    return tuple(root(number) for number in firsts)


def _content(image: Any) -> str:
    if isinstance(image, Path):
        try:
            return hashlib.sha256(image.read_bytes()).hexdigest()
        except OSError:  # said elsewhere, by the line that names it
            return str(image)
    return hashlib.sha256(image.tobytes()).hexdigest()


def split_by_picture(samples: Sequence[Sample], number: int, seed: int) -> Split:
    """Hold out about as many questions as are wanted, by picture; of each type its share, where types are given."""
    pictures = pictures_of(samples)
    questions: dict[int, list[int]] = {}
    for index, picture in enumerate(pictures):
        questions.setdefault(picture, []).append(index)
    order = list(questions)
    random.Random(seed).shuffle(order)
    held_out: list[int] = []
    if len(order) >= FEWEST:
        held_out = _held_out([questions[picture] for picture in order], samples, number)
    out = {pictures[index] for index in held_out}
    fit = [picture for picture in order if picture not in out]
    return Split(
        _in_turn([questions[picture] for picture in fit]),
        _in_turn([questions[picture] for picture in order if picture in out]),
        _in_turn([questions[picture] for picture in order]),
        pictures,
    )


def _held_out(groups: Sequence[Sequence[int]], samples: Sequence[Sample], number: float) -> list[int]:
    """Choose questions of some of the groups: those whose types are still short of their share, in the order given."""
    totals: dict[str | None, int] = {}
    for sample in samples:
        totals[sample.type] = totals.get(sample.type, 0) + 1
    share = number / len(samples)
    short = {name: share * total for name, total in totals.items()}
    held_out: list[int] = []
    later: list[Sequence[int]] = []
    most_groups = len(groups) // 2
    taken = 0
    for group in groups:
        if sum(short[samples[index].type] for index in group) >= 0.5 * len(group) and taken < most_groups:
            for index in group:
                short[samples[index].type] -= 1
            held_out += group
            taken += 1
        else:
            later.append(group)
    for group in later:  # types too rare for a share of their own
        if taken >= 2 and len(held_out) + len(group) / 2 > number:
            break
        held_out += group
        taken += 1
    return held_out


def _in_turn(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the first question of each group, then the second of each, and so on."""
    longest = max(map(len, groups), default=0)
    return tuple(group[place] for place in range(longest) for group in groups if place < len(group))
