"""Greedy removal by loss: drop the layer whose removal hurts least, look again, repeat.

SLEB (arXiv 2402.09025), algorithm 1, with the divergence from the original at its own answers in place of perplexity on
text: questions about images come without labels, and multi-token answers show damage that first tokens hide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.answers import AnswerDivergence
from ..models.questions import JobSize
from .job import LocalizeJob, SetLoss
from .scores import LayerScores


def greedy(loss: SetLoss, count: int, protect: tuple[int, ...] = (), width: int | None = None) -> LayerScores:
    """Drop `count` layers one after the other. Values are minus the loss that each layer's removal alone causes.

    Args:
        width: after the first removal only so many layers are looked at again, the cheapest by when they last were
            (a layer that was dear alone is seldom cheap beside others); None: all.
    """
    alone = loss.of_sets([frozenset({layer}) for layer in range(loss.num_layers)])
    current = {layer: alone[layer] for layer in range(loss.num_layers) if layer not in protect}
    dropped: list[int] = []
    losses: list[float] = []
    looked_at = list(current)
    while len(dropped) < count:
        best = min(looked_at, key=lambda layer: (current[layer], -layer))
        dropped.append(best)
        losses.append(current.pop(best))
        if len(dropped) < count:
            looked_at = sorted(current, key=lambda layer: (current[layer], -layer))[:width]
            current |= zip(looked_at, loss.of_sets([frozenset({*dropped, layer}) for layer in looked_at]), strict=True)
    return LayerScores("greedy", tuple(-value for value in alone), tuple(dropped), {"losses": losses})


def by_greedy(job: LocalizeJob, count: int, protect: Sequence[int]) -> LayerScores:
    """Remove layers greedily by the divergence from the original at its own answers, over all questions."""
    questions = job.required_questions
    loss = AnswerDivergence.of(job.model, list(questions.answered("score layers")), questions.progress)
    return greedy(loss, count, tuple(protect))


def passes(size: JobSize, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return what it costs: half a pass for each layer that may go, as often as one goes."""
    return size.plan.num_layers / 2 * max(size.drop, 1), 1.0


def sweeps(size: JobSize, options: Mapping[str, Any]) -> int:
    """Return how often the weights are read: by the original, and for each layer that goes."""
    return 1 + max(size.drop, 1)
