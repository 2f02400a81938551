"""What a router learns from: three losses over one batch of questions.

- `importance` (default): one backward pass through gates (`relaxation.py`) says what each token means to the answer
  beside those that stay, a few sets of layers are skipped and what that costs is measured, and the router learns to
  rank tokens and layers so. One ranking serves all budgets.
- `relaxed`: budgets are drawn anew for every question, the router's choice is put through the gates, and the KL itself
  is what gradients lower. It sees what is lost together, but where most of the attention's mass has been dropped, the
  gradients of what would bring it back outweigh all others.
- `preference`: the paper's (PAR, arXiv 2412.06458, section 4.2): five pruning actions a question, the better ones by KL
  preferred over the worse ones, without a gradient through the decoder.

What one question costs, in forward passes: `importance` and `relaxed` one through the gates and two back (three, where
activations are computed again to save memory), `importance` also the layers from the first candidate on for each set of
layers that it tries: half a pass; `preference` one for each action.

Shapes: B samples, S tokens, A answer tokens, N candidate layers, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...recipe import Method, check_options
from .learner import TrainingBatch
from .relaxation import gumbel, straight_through

LEAST_KL = 1e-3  # nats an answer; less than this is nothing


def importance_loss(
    look: TrainingBatch,
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
    """Tokens are ranked by what each means to the answer beside those that stay, layers by `layer_risk`.

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
    visual, device = look.visual, look.token_logits.device
    count = drawn_counts(visual, least, most, generator)
    noisy = look.token_logits.detach() + noise * gumbel(look.token_logits.shape, generator).to(device)
    tokens = straight_through(noisy, visual, count).detach().requires_grad_()
    log_q = look.log_q(look.gates(tokens, torch.ones_like(look.layer_logits)))
    importance = torch.zeros_like(tokens)
    for draw in range(draws):
        answer = torch.multinomial(look.log_p.exp().cpu(), 1, generator=generator).to(device)
        (gradient,) = torch.autograd.grad(log_q.gather(1, answer).sum(), tokens, retain_graph=draw + 1 < draws)
        importance += gradient.clamp(min=0).square()
    return ranking_loss(look.token_logits, importance, visual, power) + weight * layer_risk(look, generator, sets)


def layer_risk(look: TrainingBatch, generator: torch.Generator, sets: int) -> Tensor:
    """What skipping layers costs where the router chooses among a few sets (minimum risk training, arXiv 1512.02433).

    For each question some sets of the same size are drawn, one candidate to half of them, by the router's logits and
    Gumbel noise, and the divergence of each is measured. The risk is the mean of its logarithm, weighed by
    softmax(- sum of the logits of the layers skipped): layers of the better sets sink, those of the worse ones rise.

    Args:
        sets: tried for each question; two or more, since they are compared with each other.
    Returns: [], 0 where no layer may be skipped.
    """
    logits, (number, free) = look.layer_logits, look.layer_logits.shape
    if not free:
        return logits.sum() * 0
    kept = free - torch.randint(1, max(1, free // 2) + 1, (number,), generator=generator).to(logits.device)
    everywhere = torch.ones_like(logits, dtype=torch.bool)
    tried = [
        straight_through(logits + gumbel(logits.shape, generator).to(logits.device), everywhere, kept).detach()
        for _ in range(sets)
    ]
    cost = torch.log(look.kl_of_layers(tried) + LEAST_KL)  # [sets, B]
    weights = torch.stack([-((1 - runs) * logits).sum(1) for runs in tried]).softmax(0)
    return (weights * (cost - cost.mean(0))).sum(0).mean()


def drawn_counts(visual: Tensor, least: float, most: float, generator: torch.Generator) -> Tensor:
    """How many visual tokens stay, a share of each row's drawn log-uniformly: [B, S] -> [B]."""
    share = torch.empty(len(visual)).uniform_(math.log(least), math.log(most), generator=generator).exp()
    return (visual.sum(1) * share.to(visual.device)).round().long().clamp(min=1)


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
    look: TrainingBatch,
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
    count = drawn_counts(visual, least, most, generator)
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
    look: TrainingBatch,
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


def log_probability(look: TrainingBatch, tokens: Tensor, layers: Tensor) -> Tensor:
    """Logarithm of the router's probability of an action: gates of tokens [B, S] and of candidates [B, N] -> [B]."""
    token_part = F.logsigmoid(torch.where(tokens > 0.5, look.token_logits, -look.token_logits))
    layer_part = F.logsigmoid(torch.where(layers > 0.5, look.layer_logits, -look.layer_logits))
    return (token_part * look.visual).sum(1) + layer_part.sum(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "importance": importance_loss,
    "relaxed": relaxed_loss,
    "preference": preference_loss,
}


def check_loss(loss: Method) -> None:
    """Raise InputError where an option is not known or out of range, before the model is loaded."""
    function = LOSSES[loss.name]
    check_options(function, loss, "loss")
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    values = defaults | loss.options
    least, most = values.get("least", 1), values.get("most", 1)
    if not 0 < least <= most <= 1:
        raise InputError(f"least={least}, most={most}: shares of the visual tokens, 0 < least <= most <= 1.")
    for name, fewest in (("sets", 2), ("actions", 2), ("draws", 1)):  # sets and actions are compared with each other
        if (value := values.get(name, fewest)) < fewest:
            raise InputError(f"loss '{loss.name}': {name}={value}, {fewest} or more are needed.")
    for name in ("skip", "tokens", "layers"):
        if (value := values.get(name, 0)) > 1:
            raise InputError(f"loss '{loss.name}': {name}={value} is a share, at most 1.")
    for name, value in values.items():
        if math.isinf(value) or (name == "temperature" and not value):
            raise InputError(f"loss '{loss.name}': {name}={value} is out of range, a finite number above 0 is needed.")
