"""Lower the divergence itself: the router's choice is put through gates, at budgets drawn anew for every question.

It sees what is lost together, but where most of the attention's mass has been dropped, the gradients of what would
bring it back outweigh all others. A question costs one forward pass through the gates and two back.

Shapes: B samples, S tokens, N candidate layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .learner import TrainingBatch
from .losses import drawn_counts
from .relaxation import gumbel, straight_through


def relaxed_loss(
    batch: TrainingBatch,
    generator: torch.Generator,
    *,
    least: float = 0.06,
    most: float = 0.7,
    skip: float = 0.5,
    noise: float = 0.3,
    temperature: float = 1.0,
) -> Tensor:
    """Compute KL to the original under the router's own choice, at budgets drawn for each question.

    Args:
        least, most: share of the visual tokens that is kept, drawn log-uniformly between them.
        skip: share of the questions for which layers are skipped, one to half of the candidates and one more.
        noise: of Gumbel noise on the logits, so that near choices are tried both ways.
        temperature: of the sigmoid that gradients go through.
    """
    visual, device = batch.visual, batch.token_logits.device
    number, free = batch.layer_logits.shape
    count = drawn_counts(visual, least, most, generator)
    skipping = torch.rand(number, generator=generator) < skip
    skipped = torch.randint(1, free // 2 + 2, (number,), generator=generator).clamp(max=free) * skipping
    tokens = batch.token_logits + noise * gumbel(batch.token_logits.shape, generator).to(device)
    layers = batch.layer_logits + noise * gumbel(batch.layer_logits.shape, generator).to(device)
    gates = batch.gates(
        straight_through(tokens, visual, count, temperature),
        straight_through(layers, torch.ones_like(layers, dtype=torch.bool), free - skipped.to(device), temperature),
    )
    return batch.kl(gates).mean()
