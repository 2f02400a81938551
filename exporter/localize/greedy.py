"""Greedy removal by loss: drop the layer whose removal hurts least, look again, repeat.

SLEB (arXiv 2402.09025), algorithm 1, with the divergence from the original at its own answers in place of perplexity on
text: questions about images come without labels, and multi-token answers show damage that first tokens hide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..models.answers import AnswerDivergence
from ..models.questions import JobSize
from .job import LocalizeJob, SetLoss
from .scores import LayerScores


def greedy(
    loss: SetLoss, count: int, protect: tuple[int, ...] = (), width: int | None = None, steps: int | None = None
) -> LayerScores:
    """Drop `count` layers one after the other. Values are minus the loss that each layer's removal alone causes.

    Args:
        width: after the first removal only so many layers are looked at again, the cheapest by when they last were
            (a layer that was dear alone is seldom cheap beside others); None: all.
        steps: at most; where more layers go than that, several go in a step, the best together of those looked at.
    """
    alone = loss.of_sets([frozenset({layer}) for layer in range(loss.num_layers)])
    current = {layer: alone[layer] for layer in range(loss.num_layers) if layer not in protect}
    a_step = layers_a_step(count, steps)
    dropped: list[int] = []
    losses: list[float] = []
    together: dict[tuple[int, ...], float] = {(layer,): value for layer, value in current.items()}
    while len(dropped) < count:
        going = min(a_step, count - len(dropped))
        if dropped or going > 1:
            cheapest = sorted(current, key=lambda layer: (current[layer], -layer))[: looked_at(width, going)]
            sets = list(itertools.combinations(cheapest, going))
            together = dict(zip(sets, loss.of_sets([frozenset({*dropped, *layers}) for layers in sets]), strict=True))
            current |= {layer: min(value for s, value in together.items() if layer in s) for layer in cheapest}
        best = min(together, key=lambda layers: (together[layers], [-layer for layer in layers]))
        dropped += best
        losses.append(together[best])
        for layer in best:
            del current[layer]
    return LayerScores("greedy", tuple(-value for value in alone), tuple(dropped), {"losses": losses})


def layers_a_step(count: int, steps: int | None) -> int:
    """Return how many layers go in each step."""
    return math.ceil(count / steps) if steps and count else 1


def looked_at(width: int | None, going: int) -> int | None:
    """Return how many layers are looked at for so many that go together, two of which are to spare at least."""
    return width if width is None or going == 1 else max(width, going + 2)


def search_size(num_layers: int, count: int, width: int, steps: int) -> tuple[int, int]:
    """Return how many sets a search judges, at most, and in how many walks."""
    a_step = layers_a_step(count, steps)
    parts = [min(a_step, count - gone) for gone in range(0, count, a_step)]
    if a_step == 1:
        parts = parts[1:]  # that each layer is looked at alone says which goes first
    return num_layers + sum(math.comb(looked_at(width, going) or 0, going) for going in parts), 1 + len(parts)


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
