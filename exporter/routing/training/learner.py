"""A frozen model, a router, and a batch of questions as losses see them: what a route would change about the answers.

The original answers every question once. From then on a route is judged by KL(original || routed) at the tokens of
those answers, put through the decoder with gates (`relaxation.py`). The answers cost two forward passes a question,
once.

Shapes: B samples, S tokens, A answer tokens, N candidate layers, L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ... import ranks
from ...data.batches import Batch, make_batch, size_order
from ...data.samples import Sample
from ...modeling.routed_places import coordinates_of
from ...modeling.routed_route import RouterSettings
from ...modeling.routed_router import Router
from ...models.answers import ANSWER_TOKENS, AnsweredBatch, answered, with_answers
from ...models.loading import text_decoder
from ...models.replay import Trace, trace
from ...probe.stack import head_logits, logits_of
from ...progress import Progress
from ..rules import fastv_scores
from .perturbed import attention_of_heads
from .relaxation import GatedAttention, Gates, gated_states, straight_through

PROBES = ((0.5, 0.0), (0.25, 0.0), (0.25, 1 / 3))  # budgets of the learning curve: tokens kept, candidates skipped


@dataclass(frozen=True)
class TeacherOutputs:
    """The original's answer to one question, and the states behind it."""

    tokens: Tensor  # [A] up to and with the end token
    states: Tensor  # [A, D] last hidden states at the positions that predict them


# --- what the original says -------------------------------------------------------------------------------------------


@dataclass
class Teacher:
    """The original model with its answers to all questions."""

    model: Any
    processor: Any
    samples: tuple[Sample, ...]
    outputs: dict[int, TeacherOutputs] = field(default_factory=dict)

    def answer_all(self, progress: Progress, batch_size: int, answer_tokens: int = ANSWER_TOKENS) -> None:
        """Let it answer every question, once; processes share the batches, and each is told all answers."""
        order = size_order(self.samples)
        mine = ranks.share(batches_of(order, batch_size))
        answer = functools.partial(self._answers, answer_tokens=answer_tokens)
        for outputs in ranks.in_order(map(answer, progress(mine, "answer questions", len(mine)))):
            self.outputs |= outputs

    def _answers(self, indices: Sequence[int], answer_tokens: int) -> dict[int, TeacherOutputs]:
        answered_batch = answered(self.model, self._batch(indices), answer_tokens)
        with torch.inference_mode():
            states = self.model.base_model(**answered_batch.batch.inputs, use_cache=False).last_hidden_state[
                answered_batch.predicts
            ]
        lengths = answered_batch.predicts.sum(1).tolist()
        parts = zip(torch.split(answered_batch.targets, lengths), torch.split(states, lengths), strict=True)
        return {
            index: TeacherOutputs(*(part.cpu().clone() for part in both))
            for index, both in zip(indices, parts, strict=True)
        }

    def question(self, indices: Sequence[int]) -> tuple[Batch, AnsweredBatch, Tensor]:
        """Return questions, the same with their answers appended, and the original's log-probabilities [A, V]."""
        outputs = [self.outputs[i] for i in indices]
        tokens = pad_sequence([output.tokens for output in outputs], batch_first=True).to(self.model.device)  # [B, A]
        lengths = torch.tensor([len(output.tokens) for output in outputs])
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self.model.device)
        prompt = self._batch(indices).to(self.model.device)
        output = with_answers(self.model, prompt, tokens, real)
        with torch.no_grad():
            states = torch.cat([each.states for each in outputs]).to(self.model.device)
            log_p = logits_of(self.model, states).float().log_softmax(-1)
        return prompt, output, log_p

    def tokens(self, indices: Sequence[int]) -> int:
        """Return how many tokens the answers to some questions have together."""
        return sum(len(self.outputs[index].tokens) for index in indices)

    def _batch(self, indices: Sequence[int]) -> Batch:
        return make_batch([self.samples[i] for i in indices], self.processor, self.model.config)


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of questions as the router sees them, and all that is needed to try a route on them."""

    learner: Learner
    prompt: Batch
    answered: AnsweredBatch
    trace: Trace
    state: Tensor  # [B, S, D] input of layer drop_at
    log_p: Tensor  # [A of the batch, V] the original's
    token_logits: Tensor  # [B, S]
    layer_logits: Tensor  # [B, N]

    @property
    def visual(self) -> Tensor:
        return self.answered.batch.is_visual

    def gates(self, tokens: Tensor, candidates: Tensor) -> Gates:
        """Make gates from those of visual tokens [B, S] and of candidate layers [B, N]."""
        layers = torch.ones(len(tokens), self.learner.num_layers, device=tokens.device)
        index = torch.tensor(self.learner.settings.candidates, device=tokens.device, dtype=torch.long)
        layers = layers.scatter(1, index.expand(len(tokens), -1), candidates.to(layers.dtype))
        return Gates(torch.where(self.visual, tokens, torch.ones_like(tokens)), layers)

    def kl(self, gates: Gates) -> Tensor:
        """Compute KL(original || routed) at each answer token, [A of the batch], differentiable in the gates."""
        return self.divergence(self.log_q(gates))

    def log_q(self, gates: Gates) -> Tensor:
        """Return log-probabilities at each answer token, [A of the batch, V], differentiable in the gates."""
        model, start = self.learner.teacher.model, self.learner.settings.drop_at
        return self._answer_log_p(
            gated_states(
                model, self.trace, attention=self.learner.attention, state=self.state, start=start, gates=gates
            )
        )

    @torch.no_grad()
    def kl_of_layers(self, tried: Sequence[Tensor]) -> Tensor:
        """Compute KL(original || routed) of each sequence's answer under several choices of layers, [choices, B].

        All tokens stay. What comes before the first candidate is run once for all choices.

        Args:
            tried: [B, N] each, 1 where a layer runs and 0 where it is skipped.
        """
        model, settings = self.learner.teacher.model, self.learner.settings
        state, layers = self.state, text_decoder(model).layers
        first = max(settings.drop_at, min(settings.candidates))
        for layer_idx in range(settings.drop_at, first):
            state = self.trace.after(layer_idx, self.trace.step(layers[layer_idx], layer_idx, state))
        costs = []
        for candidates in tried:
            gates = self.gates(torch.ones_like(self.token_logits), candidates)
            log_q = self._answer_log_p(
                gated_states(model, self.trace, attention=self.learner.attention, state=state, start=first, gates=gates)
            )
            costs.append(self.per_sample(self.divergence(log_q)))
        return torch.stack(costs)

    def probe_gates(self, share: float, skipped: float) -> Gates:
        """Return gates that keep a share of the tokens and skip one of the candidate layers, without noise."""
        count = (self.visual.sum(1) * share).round().long().clamp(min=1)
        tokens = straight_through(self.token_logits, self.visual, count)
        free = self.layer_logits.shape[1]
        kept = torch.full_like(count, free - round(free * skipped))
        candidates = straight_through(self.layer_logits, torch.ones_like(self.layer_logits, dtype=torch.bool), kept)
        return self.gates(tokens, candidates)

    def divergence(self, log_q: Tensor) -> Tensor:
        """Compute KL(original || q) at each answer token, [A of the batch, V] -> [A of the batch]."""
        return (self.log_p.exp() * (self.log_p - log_q)).sum(-1)

    def _answer_log_p(self, output: Tensor) -> Tensor:
        """Return log-probabilities at answer tokens, [A of the batch, V], from the last layer's output [B, S, D]."""
        model = self.learner.teacher.model
        log_p: Tensor = head_logits(model, output[self.answered.predicts]).float().log_softmax(-1)
        return log_p

    @property
    def fastv(self) -> Tensor:
        """Return FastV's scores of the visual tokens, on a logarithmic scale, [B, S]."""
        scores = fastv_scores(self.learner.teacher.model, self.prompt)
        answers = self.visual.shape[1] - scores.shape[1]
        return F.pad(scores, (0, answers), value=-math.inf).clone()  # no inference tensor: gradients go past it

    @property
    def fastv_of_heads(self) -> Tensor:
        """Return each head's attention to every token, by which FastV scores visual ones, [B, H, S]."""
        attention = attention_of_heads(self.learner.teacher.model, self.prompt)
        return F.pad(attention, (0, self.visual.shape[1] - attention.shape[-1])).clone()

    def per_sample(self, kl: Tensor) -> Tensor:
        """Sum over each sequence's answer: [A of the batch] -> [B]."""
        return torch.stack([part.sum() for part in torch.split(kl, self.answered.predicts.sum(1).tolist())])


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

    def training_batch(self, indices: Sequence[int]) -> TrainingBatch:
        prompt, answered_batch, log_p = self.teacher.question(indices)
        model = self.teacher.model
        traced = trace(model, answered_batch.batch, torch.no_grad)
        read, state = self._prefix(traced)
        visible = answered_batch.batch.inputs["attention_mask"].bool() & ~answer_tokens(answered_batch)
        coordinates = coordinates_of(model.config, answered_batch.batch.is_visual, answered_batch.batch.inputs)
        tokens, layers = self.router(read, answered_batch.batch.is_visual, visible, coordinates)
        return TrainingBatch(
            learner=self,
            prompt=prompt,
            answered=answered_batch,
            trace=traced,
            state=state,
            log_p=log_p,
            token_logits=tokens,
            layer_logits=layers,
        )

    @torch.no_grad()
    def _prefix(self, traced: Trace) -> tuple[Tensor, Tensor]:
        """Return what enters layer `read_at` and layer `drop_at`, [B, S, D] each."""
        state = read = traced.entry
        for layer_idx in range(self.settings.drop_at):
            output = traced.step(text_decoder(self.teacher.model).layers[layer_idx], layer_idx, state)
            state = traced.after(layer_idx, output)
            if layer_idx + 1 == self.settings.read_at:
                read = state
        return read, state

    @torch.no_grad()
    def probe(self, indices: Sequence[int], batch_size: int) -> dict[str, float]:
        """Return mean KL per answer token on held-out questions at the PROBES, without noise."""
        probes = [probe for probe in PROBES if self.settings.candidates or not probe[1]]

        def of_batch(some: Sequence[int]) -> tuple[int, list[float]]:
            batch = self.training_batch(some)
            return len(batch.log_p), [batch.kl(batch.probe_gates(*probe)).sum().item() for probe in probes]

        by_batch = ranks.gathered(map(of_batch, ranks.share(batches_of(indices, batch_size))))
        number = sum(tokens for tokens, _ in by_batch)
        totals = map(sum, zip(*(sums for _, sums in by_batch), strict=True))
        return {
            probe_name(probe): round(total / max(1, number), 6) for probe, total in zip(probes, totals, strict=True)
        }


def batches_of(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Return questions in batches, in their order."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def probe_name(probe: tuple[float, float]) -> str:
    share, skipped = probe
    return f"KL at {share:.0%} of the tokens" + (f", {skipped:.0%} of the candidates skipped" if skipped else "")


def answer_tokens(answered_batch: AnsweredBatch) -> Tensor:
    """Return [B, S] True at the tokens of the answers, which no question comes with."""
    return F.pad(answered_batch.predicts[:, :-1], (1, 0))
