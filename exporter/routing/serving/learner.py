"""A frozen model, a serving router, and a batch of questions as its loss sees them.

The original answers every question once. What the router makes of the pictures is judged by KL(original || shorter
prompt) at the tokens of those answers. Training runs the shorter prompt as it will be served: rows of it are weighted
means with a correction, which have gradients. Beside it the original runs on the whole prompt, layer by layer: how far
the states of text behind the pictures are from its own tells far more of each question than its few answer tokens do.

Shapes: B samples, S tokens, A answer tokens of the batch, N rows of a picture, n of them that stay, D hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import ranks
from ...data.batches import Batch
from ...modeling.served_layout import Layout, question_rows
from ...modeling.served_router import ServingRouter, select, tokens_kept
from ...models.answers import AnsweredBatch
from ...models.last_state import last_state
from ...models.loading import text_decoder
from ...models.replay import trace
from ...probe.stack import head_logits
from ..training.learner import Teacher, batches_of
from .questions import question_ids


@dataclass(frozen=True)
class ServingBatch:
    """What the original and a shorter prompt say at the answers' tokens."""

    log_p: Tensor  # [A, V] the original's
    log_q: Tensor  # [A, V] of the shorter prompt
    lengths: tuple[int, ...]  # of the answers, in tokens

    @property
    def kl(self) -> Tensor:
        """Return KL(original || shorter prompt) at each answer token, [A]."""
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)

    @property
    def of_answers(self) -> Tensor:
        """Return the mean of `kl` over each answer's tokens, [B]."""
        return torch.stack([answer.mean() for answer in torch.split(self.kl, list(self.lengths))])


@dataclass(frozen=True)
class ServedTraining(ServingBatch):
    """What training makes small."""

    of_states: Tensor  # [B] mean squared error of the states of text, relative to the original's


@dataclass(frozen=True)
class Judgement:
    """What a budget does to the original's answers."""

    of_tokens: float  # mean KL over all answers' tokens
    of_answers: float  # mean KL over answers, of each the mean over its tokens: what training makes small
    kept: float  # share of the answers of which each token is still the likeliest one


def text_behind_pictures(inputs: dict[str, Any], pictured: Tensor) -> Tensor:
    """Return which tokens are text that comes after a picture's first token, [B, S]: what came before has not seen one.

    Args:
        pictured: [B, S] True at placeholders of pictures.
    """
    visible: Tensor = inputs["attention_mask"].to(pictured.device).bool()
    return (pictured.long().cumsum(1) > 0) & ~pictured & visible


class OriginalBeside:
    """Runs the original on the whole prompt beside a shorter one, layer by layer, and tells how far they are apart.

    Of either, one layer's states are held at a time.
    """

    def __init__(self, model: Any, batch: Batch, text: Tensor) -> None:
        """Prepare it. `text`: [B, S] the tokens that are compared, the same ones in both prompts."""
        self.text, self.layers = text, text_decoder(model).layers
        self.traced = trace(model, batch, torch.no_grad)
        self.state, self.by_token = self.traced.entry, torch.zeros(int(text.sum()), device=text.device)

    def see(self, layer_idx: int, states: Tensor) -> None:
        """Add the error of a layer of the shorter prompt, whose text tokens' states are [tokens, D]."""
        with torch.no_grad():
            output = self.traced.step(self.layers[layer_idx], layer_idx, self.state)
            self.state = self.traced.after(layer_idx, output)
            whole = output[self.text].float()
        size = whole.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        self.by_token = self.by_token + (states.float() - whole).square().sum(-1) / size

    def errors(self) -> Tensor:
        """Return the mean over layers and text tokens of the squared error relative to the original's state, [B]."""
        by_sequence = torch.split(self.by_token / len(self.layers), self.text.sum(1).tolist())
        return torch.stack([some.mean() if len(some) else some.sum() for some in by_sequence])


@dataclass
class ServingLearner:
    """The frozen model, of the served class, and the router that learns from it."""

    teacher: Teacher
    router: ServingRouter
    question_aware: bool

    @property
    def model(self) -> Any:
        return self.teacher.model

    def training_batch(self, indices: Sequence[int], shares: Sequence[float], told: bool) -> ServedTraining:
        """Put the answers behind shorter prompts through the decoder, each sequence under its own share.

        Args:
            shares: of each sequence's rows that stay.
            told: whether the router is told the questions.
        """
        _, answered, log_p = self.teacher.question(indices)
        inputs = answered.batch.inputs
        questions = self.embedded_questions(indices) if told else None
        stay: list[Tensor] = []  # [n, D] of each picture

        def choose(rows: Tensor, places: Tensor, sequence: int) -> tuple[Tensor, Tensor]:
            count = min(tokens_kept(len(rows), shares[sequence]), max(1, len(rows) - 1))
            question = None if questions is None else questions[sequence]
            kept, numbers = select(self.router, rows, count, coordinates=places, question=question)
            stay.append(kept)
            return kept.detach(), numbers

        pictured = inputs["input_ids"] == self.model.config.image_token_id
        with torch.no_grad():
            outputs = self.model.picture_outputs(inputs)
            beside = OriginalBeside(self.model, answered.batch, text_behind_pictures(inputs, pictured))
        shorter, layout = self.model.shorter(inputs, pictured, outputs, choose)
        log_q = self._log_q(answered, shorter, layout=layout, rows=torch.cat(stay), beside=beside)
        lengths = tuple(answered.predicts.sum(1).tolist())
        return ServedTraining(log_p=log_p, log_q=log_q, lengths=lengths, of_states=beside.errors())

    def embedded_questions(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the embedded questions, [Q, D] each."""
        ids = question_ids([self.teacher.samples[i] for i in indices], self.teacher.processor)
        return question_rows(ids, self.model.get_input_embeddings(), len(ids))

    def _log_q(
        self, answered: AnsweredBatch, shorter: dict[str, Any], layout: Layout, rows: Tensor, beside: OriginalBeside
    ) -> Tensor:
        """Return log-probabilities at each answer token of the shorter prompt, [A, V], differentiable in its rows.

        Args:
            rows: of all pictures, in the order of the prompts.
            beside: is shown the states of the shorter prompt.
        """
        positions = layout.numbered(shorter["attention_mask"], self.model.axes())
        batch = replace(answered.batch, inputs={**shorter, "position_ids": positions})
        traced = trace(self.model, batch, torch.no_grad)
        pictured = shorter["input_ids"] == self.model.config.image_token_id
        state = traced.entry.masked_scatter(pictured[..., None], rows.to(traced.entry.dtype))
        predicts, text = (layout.narrowed(at.long(), 0).bool() for at in (answered.predicts, beside.text))
        output = last_state(self.model, traced, state, lambda layer_idx, states: beside.see(layer_idx, states[text]))
        log_q: Tensor = head_logits(self.model, output[predicts]).float().log_softmax(-1)
        return log_q

    @torch.no_grad()
    def judge(self, indices: Sequence[int], share: int | float, told: bool, batch_size: int) -> Judgement:
        """Compare answers under a budget, by the served class, with the original's."""

        def of_batch(chosen: Sequence[int]) -> tuple[float, float, int, int]:
            _, answered, log_p = self.teacher.question(chosen)
            asking = {"question_ids": question_ids([self.teacher.samples[i] for i in chosen], self.teacher.processor)}
            output = self.model(
                **answered.batch.inputs, use_cache=False, keep_visual_tokens=share, **(asking if told else {})
            )
            log_q = output.logits[answered.predicts].float().log_softmax(-1)
            batch = ServingBatch(log_p, log_q, tuple(answered.predicts.sum(1).tolist()))
            same = log_q.argmax(-1) == answered.targets
            kept = sum(bool(part.all()) for part in same.split(batch.lengths))
            return float(batch.kl.sum()), float(batch.of_answers.sum()), len(log_q), kept

        by_batch = ranks.gathered(map(of_batch, ranks.share(batches_of(indices, batch_size))))
        divergence, of_answers, tokens, kept = (sum(some) for some in zip((0.0, 0.0, 0, 0), *by_batch, strict=True))
        number = max(1, len(indices))
        return Judgement(divergence / max(1, tokens), of_answers / number, kept / number)
