"""A frozen model, a serving router, and a batch of questions as its loss sees them.

The original answers every question once. A choice of rows is judged by KL(original || shorter prompt) at the tokens of
those answers. For training the prompt keeps its length: a row that leaves is a key that nobody attends to, by a gate of
0 (`training/relaxation.py`), and positions count what stays. That is what the shorter prompt computes, and gates have
gradients. Held-out questions are judged by the served class itself.

Shapes: B samples, S tokens, A answer tokens of the batch, N rows of a picture, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import ranks
from ...data.batches import Batch
from ...modeling.modeling_served import LONGER, PICTURE_ARGUMENTS
from ...modeling.served_layout import question_rows
from ...modeling.served_pictures import split_rows
from ...modeling.served_places import served_positions
from ...modeling.served_router import ServingRouter, best_rows, cells_of, tokens_kept
from ...models.answers import AnsweredBatch
from ...models.loading import text_decoder
from ...models.replay import trace
from ...probe.stack import head_logits
from ..training.learner import Teacher, batches_of
from ..training.relaxation import GatedAttention, Gates, gated_states, gumbel
from .questions import question_ids


@dataclass(frozen=True)
class Choice:
    """The router's choice among the rows of a batch's pictures, and what they carry, differentiable."""

    logits: list[Tensor]  # [N] a picture
    gates: list[Tensor]  # [N] 1 where a row stays
    rows: Tensor  # [all rows, D]


@dataclass(frozen=True)
class ServingBatch:
    """A batch of questions with their answers, under a choice of rows."""

    choice: Choice
    pictured: Tensor  # [B, S] True at placeholders
    tokens: Tensor  # [B, S] gates, 1 at text
    log_p: Tensor  # [A, V] the original's
    log_q: Tensor  # [A, V] of the shorter prompt

    @property
    def kl(self) -> Tensor:
        """Return KL(original || shorter prompt) at each answer token, [A]."""
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)


@dataclass
class ServingLearner:
    """The frozen model, of the served class, and the router that learns from it."""

    teacher: Teacher
    router: ServingRouter
    attention: GatedAttention
    question_aware: bool

    @property
    def model(self) -> Any:
        return self.teacher.model

    def training_batch(
        self, indices: Sequence[int], shares: Sequence[float], noise: float, told: bool, generator: torch.Generator
    ) -> ServingBatch:
        """Choose rows with noise, each sequence under its own share, and put the answers through the decoder.

        Args:
            shares: of each sequence's rows that stay.
            noise: of the Gumbel noise on the scores that choose.
            told: whether the router is told the questions.
            generator: of the noise.
        """
        _, answered, log_p = self.teacher.question(indices)
        pictured = answered.batch.inputs["input_ids"] == self.model.config.image_token_id
        with torch.no_grad():
            outputs = self.model.picture_outputs(answered.batch.inputs)
        questions = self.embedded_questions(indices) if told else None
        pictures = split_rows(outputs.pooler_output, pictured)
        choice = self._choose(
            pictures, pictured, answered, shares=shares, noise=noise, questions=questions, generator=generator
        )
        tokens = torch.ones(pictured.shape, device=pictured.device)
        tokens = tokens.masked_scatter(pictured, torch.cat(choice.gates))
        log_q = self._log_q(answered, outputs, pictured=pictured, tokens=tokens, rows=choice.rows)
        return ServingBatch(choice, pictured, tokens=tokens, log_p=log_p, log_q=log_q)

    def embedded_questions(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the embedded questions, [Q, D] each."""
        ids = question_ids([self.teacher.samples[i] for i in indices], self.teacher.processor)
        return question_rows(ids, self.model.get_input_embeddings(), len(ids))

    def _choose(
        self,
        pictures: Sequence[Tensor],
        pictured: Tensor,
        answered: AnsweredBatch,
        shares: Sequence[float],
        noise: float,
        questions: Sequence[Tensor] | None,
        generator: torch.Generator,
    ) -> Choice:
        sequences, start = pictured.nonzero()[:, 0].tolist(), 0
        logits, gates, rows = [], [], []
        for number, picture in enumerate(pictures):
            sequence = sequences[start]
            start += len(picture)
            places = self.model.coordinates_of(number, picture, answered.batch.inputs)
            x = self.router.read(picture, places, None if questions is None else questions[sequence])
            scores = self.router.head(x)[:, 0].float()
            stays = min(tokens_kept(len(picture), shares[sequence]), max(1, len(picture) - 1))
            gate = cell_gates(scores + noise * gumbel(scores.shape, generator).to(scores.device), stays)
            logits.append(scores)
            gates.append(gate)
            rows.append(self.router.carried(x, picture, gate))
        return Choice(logits, gates, torch.cat(rows))

    def _log_q(self, answered: AnsweredBatch, outputs: Any, pictured: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        """Return log-probabilities at each answer token under gates [B, S] and changed rows, [A, V]."""
        inputs: dict[str, Any] = {
            n: v for n, v in answered.batch.inputs.items() if n not in (*PICTURE_ARGUMENTS, *LONGER)
        }
        visible = inputs["attention_mask"].bool() & (tokens.detach() > 0.5)
        inputs |= {
            "mm_encoder_outputs": {"image": outputs},
            "position_ids": served_positions(visible, self.model.axes()),
        }
        batch: Batch = replace(answered.batch, inputs=inputs)
        traced = trace(self.model, batch, torch.no_grad)
        state = traced.entry.masked_scatter(pictured[..., None], rows.to(traced.entry.dtype))
        layers = torch.ones(len(tokens), len(text_decoder(self.model).layers), device=tokens.device)
        states = gated_states(
            self.model, traced, attention=self.attention, state=state, start=0, gates=Gates(tokens, layers)
        )
        log_q: Tensor = head_logits(self.model, states[answered.predicts]).float().log_softmax(-1)
        return log_q

    @torch.no_grad()
    def judge(self, indices: Sequence[int], share: int | float, told: bool, batch_size: int) -> tuple[float, float]:
        """Return the mean KL per answer token and the share of answers kept, by the served class at a budget.

        An answer is kept where each of its tokens is still the likeliest one.
        """

        def of_batch(chosen: Sequence[int]) -> tuple[float, int, int]:
            _, answered, log_p = self.teacher.question(chosen)
            asking = {"question_ids": question_ids([self.teacher.samples[i] for i in chosen], self.teacher.processor)}
            output = self.model(
                **answered.batch.inputs, use_cache=False, keep_visual_tokens=share, **(asking if told else {})
            )
            log_q = output.logits[answered.predicts].float().log_softmax(-1)
            same = log_q.argmax(-1) == answered.targets
            kept = sum(bool(part.all()) for part in same.split(answered.predicts.sum(1).tolist()))
            return float((log_p.exp() * (log_p - log_q)).sum()), len(log_q), kept

        by_batch = ranks.gathered(map(of_batch, ranks.share(batches_of(indices, batch_size))))
        divergence, tokens, kept = (sum(some) for some in zip((0.0, 0, 0), *by_batch, strict=True))
        return divergence / max(1, tokens), kept / max(1, len(indices))


def cell_gates(logits: Tensor, stays: int) -> Tensor:
    """Return 1 at the highest row of each cell and 0 at the others, with the gradient of a softmax over the cell, [N].

    Args:
        logits: [N]; stays: how many cells there are.
    """
    cells = cells_of(len(logits), stays, logits.device)
    hard = torch.zeros_like(logits).scatter(0, best_rows(logits.detach(), stays), 1.0)
    highest = torch.full((stays,), -torch.inf, device=logits.device).scatter_reduce(0, cells, logits.detach(), "amax")
    shares = (logits - highest[cells]).exp()
    soft = shares / torch.zeros(stays, device=logits.device).scatter_add(0, cells, shares)[cells]
    return hard + (soft - soft.detach())  # in this order, so that the value is exactly 0 or 1
