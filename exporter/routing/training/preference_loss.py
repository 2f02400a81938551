"""Prefer the better of several pruning actions, the loss of PAR (arXiv 2412.06458, section 4.2).

Five actions a question are judged by their KL, without a gradient through the decoder: a forward pass each.

Shapes: B samples, S tokens, N candidate layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .learner import TrainingBatch
from .perturbed import perturbed_heads, perturbed_mean
from .relaxation import straight_through


def preference_loss(
    batch: TrainingBatch,
    generator: torch.Generator,
    *,
    actions: int = 5,
    tokens: float = 0.25,
    layers: float = 0.25,
    noise: float = 1.0,
    noise_on: Literal["mean", "heads"] = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Compute PAR's loss: -log sigmoid(beta log pi(better) - beta log pi(worse)), over the two halves of the actions.

    pi is the product of the router's probabilities of all that an action keeps and drops (equation 4).

    Args:
        actions: tried for each question.
        tokens: share of the visual tokens that an action keeps, those of the highest FastV score after noise.
        layers: share of the candidate layers that an action skips, drawn at random.
        noise: standard deviation of the Gaussian noise on attention's logits.
        noise_on: "mean" adds one number a token to the logarithm of the mean over heads; "heads" one to each head's
            logits, as PAR's own code does: of 32 such numbers, most cancels in the mean.
        beta: PAR's, by which differences of log pi count.
    """
    visual, device = batch.visual, batch.token_logits.device
    scores = batch.fastv if noise_on == "mean" else batch.fastv_of_heads
    number, free = batch.layer_logits.shape
    count = (visual.sum(1) * tokens).round().long().clamp(min=1)
    kept = torch.full_like(count, free - round(free * layers))
    tried, distances = [], []
    everywhere = torch.ones_like(batch.layer_logits, dtype=torch.bool)
    for _ in range(actions):
        if noise_on == "mean":
            noisy = perturbed_mean(scores, noise, generator)
        else:
            noisy = perturbed_heads(scores, visual, noise, generator)
        gates_of_tokens = straight_through(noisy, visual, count).detach()
        drawn_layers = torch.rand(number, free, generator=generator).to(device)
        gates_of_layers = straight_through(drawn_layers, everywhere, kept).detach()
        with torch.no_grad():
            distances.append(batch.per_sample(batch.kl(batch.gates(gates_of_tokens, gates_of_layers))))
        tried.append((gates_of_tokens, gates_of_layers))
    log_pi = torch.stack([log_probability(batch, *action) for action in tried])  # [actions, B]
    ranked = torch.stack(distances).argsort(dim=0)
    half = actions // 2
    better, worse = (log_pi.gather(0, part) for part in (ranked[:half], ranked[-half:].flip(0)))
    return -F.logsigmoid(beta * better - beta * worse).mean()


def log_probability(batch: TrainingBatch, tokens: Tensor, layers: Tensor) -> Tensor:
    """Return the logarithm of an action's probability: gates of tokens [B, S] and of candidates [B, N] -> [B]."""
    token_part = F.logsigmoid(torch.where(tokens > 0.5, batch.token_logits, -batch.token_logits))
    layer_part = F.logsigmoid(torch.where(layers > 0.5, batch.layer_logits, -batch.layer_logits))
    return (token_part * batch.visual).sum(1) + layer_part.sum(1)
