"""The order in which questions are learnt from, and how the learning rate goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

POOL = 4  # batches whose questions are drawn together


def rate(step: int, steps: int) -> float:
    """Return a warm-up over a twentieth of the steps, then down by a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def questions_of_step(indices: Sequence[int], sizes: Sequence[int], step: int, batch_size: int, seed: int) -> list[int]:
    """Return the questions of a step: epoch after epoch, each in an order of its own.

    Of POOL batches' worth of questions each batch takes those of like size, in random turn: a sixth of the tokens
    of a random batch would be padding.

    Args:
        sizes: of all questions, in pixels.
    """
    drawn = draws_of_step(
        len(indices), lambda epoch, number: sizes[indices[number]], step=step, batch_size=batch_size, seed=seed
    )
    return [indices[number] for _, number in drawn]


def draws_of_step(
    number: int, size_of: Callable[[int, int], int], step: int, batch_size: int, seed: int
) -> list[tuple[int, int]]:
    """Return a step's part of `number` questions as (epoch, number); arguments as of `questions_of_step`.

    Args:
        size_of: gives the size of a question, by epoch and number.
    """
    pool = step // POOL
    drawn: list[tuple[int, int]] = []
    for at in range(pool * POOL * batch_size, (pool + 1) * POOL * batch_size):
        epoch, within = divmod(at, number)
        drawn.append((epoch, _order(number, seed * 7919 + epoch)[within]))
    drawn.sort(key=lambda pair: size_of(*pair))
    turn = _order(POOL, seed * 104_729 + pool)[step % POOL]
    return drawn[turn * batch_size : (turn + 1) * batch_size]


@functools.lru_cache(maxsize=4)
def _order(number: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
