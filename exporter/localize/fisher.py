"""Fisher: the set of layers whose removal moves the original's answers least, to second order, with their interactions.

Multiply what each layer adds by a gate. At gates of 1 the divergence KL(original || gated) is zero and flat; its second
derivative is the Fisher information F = E[a aᵀ], a the gradient of the log-likelihood of an answer drawn from the
model itself with respect to the gates. Removing a set of layers moves their gates from 1 to 0, so that it costs about
half the sum of F's entries over the set: one backward pass says so for all sets at once. Optimal Brain Damage (LeCun et
al., 1990) with whole layers for weights, and without its assumption that they do not interact.

Shapes: B samples, S tokens, L layers, R draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..errors import InputError
from ..models.answers import AnsweredBatch
from ..models.loading import text_decoder
from ..models.questions import JobSize
from ..models.replay import trace
from ..models.residency import ranges_of
from ..probe.stack import head_logits
from .job import LocalizeJob, with_question_count
from .scores import LayerScores

SAMPLES = 64  # questions that are read
SEEDS_APART = 1_000_003  # of the first batches of two runs
EXHAUSTIVE = 200_000  # sets that are simply all tried; above, from each layer on the cheapest next, then exchanges


def fisher(information: Tensor, count: int, protect: Sequence[int] = ()) -> LayerScores:
    """Drop the `count` layers over which the information sums to the least; values are minus each layer's own.

    Args:
        information: [L, L], in nats per answer token.
    """
    free = [layer for layer in range(len(information)) if layer not in protect]
    values = (-information.diagonal() / 2).tolist()
    chosen = cheapest_set(information, free, count)
    drop = tuple(sorted(chosen, key=lambda layer: (-values[layer], -layer)))
    return LayerScores("fisher", tuple(values), drop, {"predicted": set_cost(information, chosen)})


def set_cost(information: Tensor, layers: Sequence[int]) -> float:
    index = torch.tensor(layers, dtype=torch.long)
    return float(information[index][:, index].sum() / 2)


def cheapest_set(information: Tensor, free: Sequence[int], count: int) -> tuple[int, ...]:
    if not count:
        return ()
    if math.comb(len(free), count) <= EXHAUSTIVE:
        return min(itertools.combinations(free, count), key=lambda layers: set_cost(information, layers))
    sets = [_exchanged(information, free, _grown(information, free, first, count)) for first in free]
    return min(sets, key=lambda layers: set_cost(information, layers))


def _grown(information: Tensor, free: Sequence[int], first: int, count: int) -> list[int]:
    """Choose one layer after the other, each the cheapest beside those before it."""
    chosen = [first]
    while len(chosen) < count:
        rest = [layer for layer in free if layer not in chosen]
        chosen.append(min(rest, key=lambda layer: set_cost(information, [*chosen, layer])))
    return chosen


def _exchanged(information: Tensor, free: Sequence[int], chosen: list[int]) -> tuple[int, ...]:
    """Exchange one layer for another as long as that lowers the cost."""
    current, improved = set_cost(information, chosen), True
    while improved:
        improved = False
        for place, new in itertools.product(range(len(chosen)), free):
            if new in chosen:
                continue
            changed = [*chosen[:place], new, *chosen[place + 1 :]]
            if (cost := set_cost(information, changed)) < current:
                chosen, current, improved = changed, cost, True
    return tuple(chosen)


def information(model: Any, batches: Iterable[AnsweredBatch], draws: int = 2, seed: int = 0) -> Tensor:
    """Compute F [L, L] per answer token, from answers drawn from the model at the positions of those that it gave.

    Tokens are drawn independently at each position of the given answer, so that the gradients of different tokens are
    uncorrelated and a sample's sum may be squared in their stead. Each batch has draws of its own, whoever takes it.

    Args:
        batches: the share of this process.
    """
    num_layers, tokens = len(text_decoder(model).layers), 0
    by_batch: list[Tensor] = []
    for number, answered_batch in enumerate(batches):
        place = ranks.rank() + number * ranks.world()  # among all batches
        generator = torch.Generator().manual_seed((SEEDS_APART * seed + place) % 2**63)
        total = torch.zeros(num_layers, num_layers, dtype=torch.double)
        gates = torch.ones(len(answered_batch.batch.is_visual), num_layers, device=model.device, requires_grad=True)
        log_p = _gated_log_p(model, answered_batch, gates)  # [N, vocabulary]
        for draw in range(draws):
            sampled = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            likelihood = log_p.gather(1, sampled).sum()
            (rows,) = torch.autograd.grad(likelihood, gates, retain_graph=draw + 1 < draws)
            rows = rows.double().cpu()  # [B, L]
            total += rows.T @ rows / draws
        by_batch.append(total)
        tokens += len(answered_batch.targets)
    information = torch.zeros(num_layers, num_layers, dtype=torch.double)
    for total in ranks.gathered(by_batch):
        information += total
    return information / ranks.total(tokens)


def _gated_log_p(model: Any, answered_batch: AnsweredBatch, gates: Tensor) -> Tensor:
    """Return log-probabilities of answer tokens, differentiable in gates [B, L] of what layers add."""
    traced = trace(model, answered_batch.batch, torch.no_grad)
    state = traced.entry
    for layer_idx, layer in enumerate(text_decoder(model).layers):
        gate = gates[:, layer_idx, None, None].to(state.dtype)
        state = traced.after(layer_idx, state + gate * (traced.step(layer, layer_idx, state) - state))
    log_p: Tensor = head_logits(model, state[answered_batch.predicts]).float().log_softmax(-1)
    return log_p


def by_fisher(
    job: LocalizeJob, count: int, protect: Sequence[int], *, samples: int = SAMPLES, draws: int = 2
) -> LayerScores:
    """Drop the layers over which the information of a few questions sums to the least.

    Args:
        samples: questions that are read.
        draws: answers drawn at each token.
    """
    if ranges_of(job.model) is not None:
        raise InputError(
            "fisher takes gradients through all layers at once, which have to be in memory: allow more --memory, or "
            "take another localizer."
        )
    batches = list(job.required_questions.answered("score layers", number=samples))
    return with_question_count(fisher(information(job.model, batches, draws, job.seed), count, protect), batches)


def passes(size: JobSize, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return what it costs: a pass and its gradients, of a few questions."""
    return 4 * min(1.0, options.get("samples", SAMPLES) / size.questions), 1.0
