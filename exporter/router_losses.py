"""What a router learns from: three losses over one batch of questions.

- `importance` (default): one backward pass through gates on all tokens and layers (`relaxation.py`) says what each of
  them means to the answer, and the router learns to rank them so. One ranking serves all budgets.
- `relaxed`: budgets are drawn anew for every question, the router's choice is put through the gates, and the KL itself
  is what gradients lower. It sees what is lost together, but where most of the attention's mass has been dropped, the
  gradients of what would bring it back outweigh all others.
- `preference`: the paper's (PAR, arXiv 2412.06458, section 4.2): five pruning actions a question, the better ones by KL
  preferred over the worse ones, without a gradient through the decoder.

What one question costs, in forward passes: `importance` and `relaxed` one through the gates and two back (three, where
activations are computed again to save memory); `preference` one for each action.

Shapes: B samples, S tokens, A answer tokens, N candidate layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .relaxation import gumbel, straight_through
from .router_learner import Look


def importance_loss(look: Look, generator: torch.Generator, *, power: float = 0.5, draws: int = 1) -> Tensor:
    """Cross entropy of the router's ranking against what each visual token and candidate layer means to the answer.

    That is the diagonal of the Fisher information of the gates where all are open, E[(d log p(answer) / d gate)^2]: to
    second order twice the divergence from the original that shutting this one gate causes (Optimal Brain Damage, LeCun
    et al., 1990). Answers are drawn at the positions of the one that the original gave. Tokens and layers have a
    ranking each: softmax of the logits against the shares of importance (ListNet, Cao et al., 2007).

    Args:
        power: of the importances before they are made to sum to 1; below 1, small differences count too.
        draws: answers drawn at each position of a question's answer.
    """
    visual = look.visual
    tokens = torch.ones(visual.shape, device=visual.device, requires_grad=True)
    layers = torch.ones(look.layer_logits.shape, device=visual.device, requires_grad=True)
    log_q = look.log_q(look.gates(tokens, layers))
    importances = [torch.zeros_like(tokens), torch.zeros_like(layers)]
    for draw in range(draws):
        answer = torch.multinomial(log_q.detach().exp().cpu(), 1, generator=generator).to(log_q.device)
        likelihood = log_q.gather(1, answer).sum()
        for total, gradient in zip(
            importances, torch.autograd.grad(likelihood, (tokens, layers), retain_graph=draw + 1 < draws), strict=True
        ):
            total += gradient.square()
    everywhere = torch.ones_like(look.layer_logits, dtype=torch.bool)
    return ranking_loss(look.token_logits, importances[0], visual, power) + ranking_loss(
        look.layer_logits, importances[1], everywhere, power
    )


def ranking_loss(logits: Tensor, importance: Tensor, there: Tensor, power: float) -> Tensor:
    """Cross entropy of softmax(logits) against the shares of importance, over the items that are `there`: [B, S] each.

    Rows where nothing has any importance say nothing.
    """
    if not there.any():
        return logits.sum() * 0
    shares = importance.double().pow(power) * there  # squares of small gradients are smaller than float32 can divide by
    shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    log_chosen = logits.masked_fill(~there, torch.finfo(logits.dtype).min).log_softmax(1)
    return -(shares.to(logits.dtype) * log_chosen.masked_fill(~there, 0)).sum(1).mean()


def relaxed_loss(
    look: Look,
    generator: torch.Generator,
    *,
    least: float = 0.06,
    most: float = 0.7,
    skip: float = 0.5,
    noise: float = 0.3,
    temperature: float = 1.0,
) -> Tensor:
    """KL to the original under the router's own choice, at budgets drawn for each question.

    Args:
        least, most: share of the visual tokens that is kept, drawn log-uniformly between them.
        skip: share of the questions for which layers are skipped, one to half of the candidates and one more.
        noise: of Gumbel noise on the logits, so that near choices are tried both ways.
        temperature: of the sigmoid that gradients go through.
    """
    visual, device = look.visual, look.token_logits.device
    number, free = look.layer_logits.shape
    share = torch.exp(torch.empty(number).uniform_(math.log(least), math.log(most), generator=generator)).to(device)
    count = (visual.sum(1) * share).round().long().clamp(min=1)
    skipping = torch.rand(number, generator=generator) < skip
    skipped = torch.randint(1, free // 2 + 2, (number,), generator=generator).clamp(max=free) * skipping
    tokens = look.token_logits + noise * gumbel(look.token_logits.shape, generator).to(device)
    layers = look.layer_logits + noise * gumbel(look.layer_logits.shape, generator).to(device)
    gates = look.gates(
        straight_through(tokens, visual, count, temperature),
        straight_through(layers, torch.ones_like(layers, dtype=torch.bool), free - skipped.to(device), temperature),
    )
    return look.kl(gates).mean()


def preference_loss(
    look: Look,
    generator: torch.Generator,
    *,
    actions: int = 5,
    tokens: float = 0.25,
    layers: float = 0.25,
    noise: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """PAR's: -log sigmoid(beta log pi(better) - beta log pi(worse)), over the better and the worse half of the actions.

    pi is the product of the router's probabilities of all that an action keeps and drops (equation 4).

    Args:
        actions: tried for each question.
        tokens: share of the visual tokens that an action keeps, those of the highest FastV score after noise.
        layers: share of the candidate layers that an action skips, drawn at random.
        noise: standard deviation of the Gaussian noise on the logarithms of the scores.
    """
    visual, device = look.visual, look.token_logits.device
    scores = look.fastv
    number, free = look.layer_logits.shape
    count = (visual.sum(1) * tokens).round().long().clamp(min=1)
    kept = torch.full_like(count, free - round(free * layers))
    tried, distances = [], []
    everywhere = torch.ones_like(look.layer_logits, dtype=torch.bool)
    for _ in range(actions):
        noisy = scores + noise * torch.randn(scores.shape, generator=generator).to(device)
        gates_of_tokens = straight_through(noisy, visual, count).detach()
        drawn_layers = torch.rand(number, free, generator=generator).to(device)
        gates_of_layers = straight_through(drawn_layers, everywhere, kept).detach()
        with torch.no_grad():
            distances.append(look.per_sample(look.kl(look.gates(gates_of_tokens, gates_of_layers))))
        tried.append((gates_of_tokens, gates_of_layers))
    log_pi = torch.stack([log_probability(look, *action) for action in tried])  # [actions, B]
    ranked = torch.stack(distances).argsort(dim=0)
    half = actions // 2
    better, worse = (log_pi.gather(0, part) for part in (ranked[:half], ranked[-half:].flip(0)))
    return -F.logsigmoid(beta * better - beta * worse).mean()


def log_probability(look: Look, tokens: Tensor, layers: Tensor) -> Tensor:
    """Logarithm of the router's probability of an action: gates of tokens [B, S] and of candidates [B, N] -> [B]."""
    token_part = F.logsigmoid(torch.where(tokens > 0.5, look.token_logits, -look.token_logits))
    layer_part = F.logsigmoid(torch.where(layers > 0.5, look.layer_logits, -look.layer_logits))
    return (token_part * look.visual).sum(1) + layer_part.sum(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "importance": importance_loss,
    "relaxed": relaxed_loss,
    "preference": preference_loss,
}
