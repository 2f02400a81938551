"""Which question is put to which picture: more questions than were given, at no cost but the original's answers.

The original answers any question about any picture, and what it says is what the smaller model, or the shorter prompt,
is to say. So a question that was written for one picture is put to others as well. Every pass of training sees other
pairs, where otherwise it would see the same few again and learn them by heart (function matching; Beyer et al., arXiv
2106.05237).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from .samples import Sample


def exchanged(samples: Sequence[Sample], rounds: int, seed: int) -> list[list[Sample]]:
    """Return the questions, round after round; after the first one each is put to another question's pictures.

    Questions with as many images, and videos as long, change places among themselves, in an order drawn once and
    shifted by another number in each round: no pair comes twice before all have come.
    """
    groups: dict[Any, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault((len(sample.images), sample.kind), []).append(index)
    draw = random.Random(seed)
    orders: list[tuple[list[int], list[int]]] = []
    for group in groups.values():
        order = draw.sample(group, len(group))
        shifts = draw.sample(range(1, len(group)), len(group) - 1)
        orders.append((order, shifts or [0]))
    rounds_drawn = [list(samples)]
    for number in range(rounds - 1):
        round_samples = list(samples)
        for order, shifts in orders:
            shift = shifts[number % len(shifts)]
            for place, index in enumerate(order):
                round_samples[index] = with_pictures(samples[index], samples[order[(place + shift) % len(order)]])
        rounds_drawn.append(round_samples)
    return rounds_drawn[:rounds]


def with_pictures(question: Sample, pictured: Sample) -> Sample:
    """Return the question about the other sample's images; what was right about its own is forgotten."""
    if question is pictured:
        return question
    origin = f"{question.origin} (with the images of {pictured.origin})"
    unlabelled = dataclasses.replace(question, origin=origin, answers=(), choices=())
    return dataclasses.replace(unlabelled, images=pictured.images, videos=pictured.videos)
