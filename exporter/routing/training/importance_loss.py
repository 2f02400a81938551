"""Learn to rank tokens and layers by what they mean to the answer: the default loss.

One backward pass through gates (`relaxation.py`) says what each token means to the answer beside those that stay; a few
sets of layers are skipped and what that costs is measured. One ranking serves all budgets. A question costs one forward
pass through the gates and two back (three, where activations are computed again to save memory), and half a pass for
each set of layers that is tried.

Shapes: B samples, S tokens, N candidate layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .learner import TrainingBatch
from .losses import drawn_counts
from .relaxation import gumbel, straight_through

LEAST_KL = 1e-3  # nats an answer; less than this is nothing


def importance_loss(
    batch: TrainingBatch,
    generator: torch.Generator,
    *,
    power: float = 0.5,
    draws: int = 1,
    least: float = 0.05,
    most: float = 1.0,
    noise: float = 1.0,
    sets: int = 3,
    weight: float = 3.0,
) -> Tensor:
    """Rank tokens by what each means to the answer beside those that are kept, and layers by `layer_risk`.

    For each question a budget is drawn, and a choice by the router's logits and Gumbel noise. What a token means is the
    square of what opening its gate there would add to log p(answer), if it would add something, for an answer drawn
    from the original's probabilities. (Where all gates are open that is close to the diagonal of the Fisher
    information, to second order the divergence that shutting one of them causes: Optimal Brain Damage, LeCun et al.,
    1990. But where many tokens say the same, none of them alone means anything, and a router that learnt from open
    gates dropped too many of them.)

    The loss is the cross entropy of softmax(logits) against the shares of importance (ListNet, Cao et al., 2007).

    Args:
        power: of the importances before they are made to sum to 1; below 1, small differences count too.
        draws: answers drawn at each position of a question's answer.
        least, most: share of the visual tokens that stay, drawn log-uniformly between them.
        noise: of Gumbel noise on the logits that choose them.
        sets: of layers that are tried for each question.
        weight: of what is lost by layers, beside what is lost by tokens.
    """
    visual, device = batch.visual, batch.token_logits.device
    count = drawn_counts(visual, least, most, generator)
    noisy = batch.token_logits.detach() + noise * gumbel(batch.token_logits.shape, generator).to(device)
    tokens = straight_through(noisy, visual, count).detach().requires_grad_()
    log_q = batch.log_q(batch.gates(tokens, torch.ones_like(batch.layer_logits)))
    importance = torch.zeros_like(tokens)
    for draw in range(draws):
        answer = torch.multinomial(batch.log_p.exp().cpu(), 1, generator=generator).to(device)
        (gradient,) = torch.autograd.grad(log_q.gather(1, answer).sum(), tokens, retain_graph=draw + 1 < draws)
        importance += gradient.clamp(min=0).square()
    return ranking_loss(batch.token_logits, importance, visual, power) + weight * layer_risk(batch, generator, sets)


def layer_risk(batch: TrainingBatch, generator: torch.Generator, sets: int) -> Tensor:
    """Compute the cost of skipping layers where the router chooses among a few sets (minimum risk, arXiv 1512.02433).

    For each question some sets of the same size are drawn, one candidate to half of them, by the router's logits and
    Gumbel noise, and the divergence of each is measured. The risk is the mean of its logarithm, weighed by
    softmax(- sum of the logits of the layers skipped): layers of the better sets sink, those of the worse ones rise.

    Args:
        sets: tried for each question; two or more, since they are compared with each other.
    Returns: [], 0 where no layer may be skipped.
    """
    logits, (number, free) = batch.layer_logits, batch.layer_logits.shape
    if not free:
        return logits.sum() * 0
    kept = free - torch.randint(1, max(1, free // 2) + 1, (number,), generator=generator).to(logits.device)
    everywhere = torch.ones_like(logits, dtype=torch.bool)
    tried = [
        straight_through(logits + gumbel(logits.shape, generator).to(logits.device), everywhere, kept).detach()
        for _ in range(sets)
    ]
    cost = torch.log(batch.kl_of_layers(tried) + LEAST_KL)  # [sets, B]
    weights = torch.stack([-((1 - runs) * logits).sum(1) for runs in tried]).softmax(0)
    return (weights * (cost - cost.mean(0))).sum(0).mean()


def ranking_loss(logits: Tensor, importance: Tensor, there: Tensor, power: float) -> Tensor:
    """Compute the cross entropy of softmax(logits) and shares of importance over items that are `there`: [B, S] each.

    Rows where nothing has any importance say nothing.
    """
    if not there.any():
        return logits.sum() * 0
    shares = importance.double().pow(power) * there  # squares of small gradients are smaller than float32 can divide by
    shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    log_chosen = logits.masked_fill(~there, torch.finfo(logits.dtype).min).log_softmax(1)
    return -(shares.to(logits.dtype) * log_chosen.masked_fill(~there, 0)).sum(1).mean()
