"""Distances between the smaller model's distributions and the original's, of which the likeliest tokens are known.

The other tokens count as one: by the data processing inequality what is computed is at most the whole divergence.

Shapes: A answer tokens, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 1e-7  # probability of all other tokens together


def divergence(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) at each answer token, [A].

    Args:
        log_p: [A, K] of the original's likeliest tokens; ids: [A, K] which they are; log_q: [A, V].
    """
    p, q = _with_rest(log_p), _with_rest(log_q.gather(1, ids))
    return (p.exp() * (p - q)).sum(-1)


def reverse(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p) at each answer token, [A]; arguments as of `divergence`."""
    p, q = _with_rest(log_p), _with_rest(log_q.gather(1, ids))
    return (q.exp() * (q - p)).sum(-1)


def symmetric(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """Return the mean of both directions at each answer token, [A]."""
    return (divergence(log_p, ids, log_q) + reverse(log_p, ids, log_q)) / 2


def _with_rest(log_p: Tensor) -> Tensor:
    """Extend [A, K] to [A, K + 1] log-probabilities, the last one of all other tokens together."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=LEAST)
    return torch.cat([log_p, rest.log()], -1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward": divergence,
    "reverse": reverse,
    "symmetric": symmetric,
}
