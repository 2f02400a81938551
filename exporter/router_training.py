"""Trains a router on unlabelled questions about images; the LVLM is frozen.

The original answers every question once. From then on a router is judged by KL(original || routed) at the tokens of
those answers. Three losses:
- `importance` (default): one backward pass through gates on all tokens and layers (`relaxation.py`) says what each of
  them means to the answer, and the router learns to rank them so. One ranking serves all budgets.
- `relaxed`: budgets are drawn anew for every question, the router's choice is put through the gates, and the KL itself
  is what gradients lower. It sees what is lost together, but where the attention's mass has been dropped the gradients
  of what would bring it back are a thousand times larger than all others.
- `preference`: the paper's (PAR, arXiv 2412.06458, section 4.2): five pruning actions a question, the better ones by KL
  preferred over the worse ones, without a gradient through the decoder.

What one question costs, in forward passes: `importance` and `relaxed` one through the gates and two back (three, where
activations are computed again to save memory); `preference` one for each action. The original's answers cost two more,
once.

Shapes: B samples, S tokens, A answer tokens, N candidate layers, L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .calibration import Batch, Sample, make_batch
from .errors import InputError
from .fidelity import AnsweredBatch, answered, with_answers
from .modeling.modeling_routed import Router, RouterSettings, places_of
from .relaxation import GatedAttention, Gates, gated_attention, gated_states, gumbel, straight_through
from .replay import Trace, trace
from .rules import fastv_scores
from .source import text_decoder

HELD_OUT = 8  # one in so many questions is not trained on but judged by, 64 at most
PROBES = ((0.5, 0.0), (0.25, 0.0), (0.25, 1 / 3))  # budgets of the learning curve: tokens kept, candidates skipped
SAVE_EVERY = 50  # steps
POOL = 4  # batches whose questions are drawn together

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True)
class Training:
    """How a router is trained; what a recipe's `router` says."""

    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    loss: str = "importance"
    options: dict[str, Any] = field(default_factory=dict)  # of the loss
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A router and how it got there."""

    weights: dict[str, Tensor]
    curve: list[dict[str, float]]  # by step: training loss, and KL of held-out questions under each probe
    questions: int
    held_out: int


@dataclass(frozen=True)
class Said:
    """What the original answers to one question, and the states behind it."""

    tokens: Tensor  # [A] up to and with the end token
    states: Tensor  # [A, D] last hidden states at the positions that predict them


# --- the verb's core --------------------------------------------------------------------------------------------------


def train_router(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: RouterSettings,
    training: Training,
    progress: Progress,
    state_file: Path | None = None,
    fingerprint: str = "",
) -> Trained:
    """Train on the samples.

    Args:
        state_file: where the state is kept, so that a broken-off run goes on; removed by the caller.
        fingerprint: of everything that the result depends on; a state of another one is not gone on from.
    """
    teacher = Teacher(model, processor, tuple(samples))
    held_out = list(range(0, len(samples), HELD_OUT))[:64] if len(samples) >= 2 * HELD_OUT else []
    trained_on = [i for i in range(len(samples)) if i not in set(held_out)]
    sizes = [sample.pixels for sample in samples]
    teacher.ask(progress, training.batch_size)
    torch.manual_seed(training.seed)
    router = Router(model.config.get_text_config().hidden_size, settings).to(model.device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, training.steps))
    state = State(router, optimizer, schedule, fingerprint)
    first = state.load(state_file)
    loss_of = LOSSES[training.loss]
    with gated_attention(model) as attention:
        learner = Learner(teacher, router, settings, attention)
        for step in progress(range(first, training.steps), "train router", training.steps - first):
            generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
            chosen = drawn(trained_on, sizes, step, training)
            loss = loss_of(learner.look(chosen), generator, **training.options)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            state.note(step, loss.item())
            if held_out and ((step + 1) % max(1, training.steps // 10) == 0 or step == 0):
                state.curve[-1] |= learner.probe(held_out, training.batch_size)
            if state_file is not None and (step + 1) % SAVE_EVERY == 0:
                state.save(state_file, step + 1)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in router.state_dict().items()}
    return Trained(weights, state.curve, len(trained_on), len(held_out))


def rate(step: int, steps: int) -> float:
    """A warm-up over a twentieth of the steps, then down by a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def drawn(indices: Sequence[int], sizes: Sequence[int], step: int, training: Training) -> list[int]:
    """The questions of a step: epoch after epoch, each in an order of its own.

    Of POOL batches' worth of questions each batch takes those of like size, in random turn: half the tokens of a random
    batch about images of any size would be padding.
    """
    size, pool = training.batch_size, step // POOL
    found: list[int] = []
    for place in range(pool * POOL * size, (pool + 1) * POOL * size):
        epoch, within = divmod(place, len(indices))
        found.append(indices[_order(len(indices), training.seed * 7919 + epoch)[within]])
    found.sort(key=lambda index: sizes[index])
    turn = _order(POOL, training.seed * 104_729 + pool)[step % POOL]
    return found[turn * size : (turn + 1) * size]


@functools.lru_cache(maxsize=4)
def _order(number: int, seed: int) -> list[int]:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class State:
    """What a training run needs to go on, and its curve."""

    router: Router
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    fingerprint: str
    curve: list[dict[str, float]] = field(default_factory=list)

    def note(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise InputError(f"the router's loss is {loss} at step {step}: try --dtype float32.")
        self.curve.append({"step": step, "loss": round(loss, 6)})

    def load(self, path: Path | None) -> int:
        """The step to begin at."""
        if path is None or not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        if saved["fingerprint"] != self.fingerprint:
            return 0
        self.router.load_state_dict(saved["router"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.curve = saved["curve"]
        return int(saved["step"])

    def save(self, path: Path, step: int) -> None:
        saved = {
            "fingerprint": self.fingerprint,
            "router": self.router.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "curve": self.curve,
            "step": step,
        }
        part = path.with_suffix(".partial")
        torch.save(saved, part)
        part.replace(path)


# --- what the original says -------------------------------------------------------------------------------------------


@dataclass
class Teacher:
    """The original model with its answers to all questions."""

    model: Any
    processor: Any
    samples: tuple[Sample, ...]
    said: dict[int, Said] = field(default_factory=dict)

    def ask(self, progress: Progress, batch_size: int, answer_tokens: int = 32) -> None:
        """Let it answer every question, once."""
        order = sorted(range(len(self.samples)), key=lambda i: self.samples[i].pixels)
        starts = range(0, len(order), batch_size)
        for start in progress(starts, "answer questions", len(starts)):
            indices = order[start : start + batch_size]
            one = answered(self.model, self._batch(indices), answer_tokens)
            with torch.inference_mode():
                states = self.model.base_model(**one.batch.inputs, use_cache=False).last_hidden_state[one.predicts]
            lengths = one.predicts.sum(1).tolist()
            for index, tokens, state in zip(indices, one.targets.split(lengths), states.split(lengths), strict=True):
                self.said[index] = Said(tokens.cpu(), state.cpu())

    def question(self, indices: Sequence[int]) -> tuple[Batch, AnsweredBatch, Tensor]:
        """Questions, the same with their answers appended, and the original's log-probabilities [A of all rows, V]."""
        said = [self.said[i] for i in indices]
        tokens = pad_sequence([one.tokens for one in said], batch_first=True).to(self.model.device)  # [B, A]
        lengths = torch.tensor([len(one.tokens) for one in said])
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self.model.device)
        prompt = self._batch(indices).to(self.model.device)
        one = with_answers(self.model, prompt, tokens, real)
        with torch.no_grad():
            states = torch.cat([each.states for each in said]).to(self.model.device)
            log_p = self.model.get_output_embeddings()(states).float().log_softmax(-1)
        return prompt, one, log_p

    def _batch(self, indices: Sequence[int]) -> Batch:
        return make_batch([self.samples[i] for i in indices], self.processor, self.model.config)


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """A batch of questions as the router sees them, and all that is needed to try a route on them."""

    learner: Learner
    prompt: Batch
    one: AnsweredBatch
    given: Trace
    state: Tensor  # [B, S, D] input of layer drop_at
    log_p: Tensor  # [A of all rows, V] the original's
    token_logits: Tensor  # [B, S]
    layer_logits: Tensor  # [B, N]

    @property
    def visual(self) -> Tensor:
        return self.one.batch.is_visual

    def gates(self, tokens: Tensor, candidates: Tensor) -> Gates:
        """From gates of visual tokens [B, S] and of candidate layers [B, N]."""
        layers = torch.ones(len(tokens), self.learner.num_layers, device=tokens.device)
        places = torch.tensor(self.learner.settings.candidates, device=tokens.device, dtype=torch.long)
        layers = layers.scatter(1, places.expand(len(tokens), -1), candidates.to(layers.dtype))
        return Gates(torch.where(self.visual, tokens, torch.ones_like(tokens)), layers)

    def kl(self, gates: Gates) -> Tensor:
        """KL(original || routed) at each answer token, [A of all rows], differentiable in the gates."""
        return (self.log_p.exp() * (self.log_p - self.log_q(gates))).sum(-1)

    def log_q(self, gates: Gates) -> Tensor:
        """Log-probabilities at each answer token, [A of all rows, V], differentiable in the gates."""
        model, start = self.learner.teacher.model, self.learner.settings.drop_at
        output = gated_states(model, self.given, self.learner.attention, self.state, start, gates)
        hidden = text_decoder(model).norm(output[self.one.predicts])
        return model.get_output_embeddings()(hidden).float().log_softmax(-1)

    @property
    def fastv(self) -> Tensor:
        """FastV's scores of the visual tokens, on a logarithmic scale, [B, S]."""
        scores = fastv_scores(self.learner.teacher.model, self.prompt)
        answers = self.visual.shape[1] - scores.shape[1]
        return F.pad(scores, (0, answers), value=-math.inf).clone()  # no inference tensor: gradients go past it

    def per_sample(self, kl: Tensor) -> Tensor:
        """Sums over each row's answer: [A of all rows] -> [B]."""
        return torch.stack([part.sum() for part in kl.split(self.one.predicts.sum(1).tolist())])


@dataclass
class Learner:
    """The frozen model and the router that learns from it."""

    teacher: Teacher
    router: Router
    settings: RouterSettings
    attention: GatedAttention

    @property
    def num_layers(self) -> int:
        return len(text_decoder(self.teacher.model).layers)

    def look(self, indices: Sequence[int]) -> Look:
        prompt, one, log_p = self.teacher.question(indices)
        model = self.teacher.model
        given = trace(model, one.batch, torch.no_grad)
        read, state = self._prefix(given)
        visible = one.batch.inputs["attention_mask"].bool() & ~answer_tokens(one)
        places = places_of(model.config, one.batch.is_visual, one.batch.inputs)
        tokens, layers = self.router(read, one.batch.is_visual, visible, places)
        return Look(self, prompt, one, given, state, log_p, tokens, layers)

    @torch.no_grad()
    def _prefix(self, given: Trace) -> tuple[Tensor, Tensor]:
        """What enters layer `read_at` and layer `drop_at`, [B, S, D] each."""
        state = read = given.entry
        for layer_idx in range(self.settings.drop_at):
            output = given.step(text_decoder(self.teacher.model).layers[layer_idx], layer_idx, state)
            state = given.after(layer_idx, output)
            if layer_idx + 1 == self.settings.read_at:
                read = state
        return read, state

    @torch.no_grad()
    def probe(self, indices: Sequence[int], batch_size: int) -> dict[str, float]:
        """Mean KL per answer token on held-out questions at the PROBES, without noise."""
        totals, number = dict.fromkeys(map(probe_name, PROBES), 0.0), 0
        for start in range(0, len(indices), batch_size):
            look = self.look(indices[start : start + batch_size])
            number += len(look.log_p)
            for share, skipped in PROBES:
                visual = look.visual.sum(1)
                count = (visual * share).round().long().clamp(min=1)
                tokens = straight_through(look.token_logits, look.visual, count)
                free = look.layer_logits.shape[1]
                kept = torch.full_like(count, free - round(free * skipped))
                candidates = straight_through(
                    look.layer_logits, torch.ones_like(look.layer_logits, dtype=torch.bool), kept
                )
                totals[probe_name((share, skipped))] += look.kl(look.gates(tokens, candidates)).sum().item()
        return {name: round(total / max(1, number), 6) for name, total in totals.items()}


def probe_name(probe: tuple[float, float]) -> str:
    share, skipped = probe
    return f"KL at {share:.0%} of the tokens" + (f", {skipped:.0%} of the candidates skipped" if skipped else "")


def answer_tokens(one: AnsweredBatch) -> Tensor:
    """[B, S] True at the tokens of the answers, which no question comes with."""
    return F.pad(one.predicts[:, :-1], (1, 0))


# --- losses -----------------------------------------------------------------------------------------------------------


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
