"""The divergence of a changed model from the original, on answers that the original gives itself.

No labels are needed: the original answers every calibration question greedily, and a variant is judged by the
likelihood that it gives to those tokens, all of them, since first tokens hide damage.

Shapes: B samples, S prompt tokens, A answer tokens, N answer tokens of a whole batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..clean_room import PromptError, extend, greedy_answers, render
from ..data.batches import Batch
from ..progress import Progress, silent
from .divergence import KINDS, StateErrors
from .loading import text_decoder
from .replay import logits
from .state_error import errors_of, head_states, kinds_of
from .sweep import ORIGINAL, Change, Passed, sweep

Walks = Callable[[Sequence[Change]], Iterator[Passed]]  # of a few batches, by what variants change
ANSWER_TOKENS = 128  # that an answer may take: whole ones matter, since damage shows late in long ones


@dataclass(frozen=True)
class AnsweredBatch:
    """A batch with answers appended, and which positions predict an answer token."""

    batch: Batch
    predicts: Tensor  # [B, S + A] True where the next token is an answer's
    targets: Tensor  # [N] the answer tokens, sequence by sequence


def answered(model: Any, batch: Batch, max_new_tokens: int = ANSWER_TOKENS) -> AnsweredBatch:
    """Let the model answer, and append what it says, up to and with its end token."""
    batch = batch.to(model.device)
    return with_answers(model, batch, greedy_answers(model, batch.inputs, max_new_tokens))


def with_answers(model: Any, batch: Batch, answers: Tensor, real: Tensor | None = None) -> AnsweredBatch:
    """Append given answer tokens [B, A]; whatever follows an end token, or is not `real` [B, A], is padding."""
    if real is None:
        ends = torch.tensor(sorted(end_ids(model)), dtype=answers.dtype, device=answers.device)
        is_end = torch.isin(answers, ends)
        ended = is_end.cumsum(1) - is_end.long() > 0  # [B, A] strictly after the first end token
    else:
        ended = ~real
    inputs = extend(batch.inputs, answers, ~ended, model.config.model_type)
    nothing = torch.zeros_like(ended)
    is_answer = torch.cat([torch.zeros_like(batch.is_visual), ~ended], 1)
    is_visual, is_text = torch.cat([batch.is_visual, nothing], 1), torch.cat([batch.is_text, ~ended], 1)
    extended = Batch(inputs=inputs, is_visual=is_visual, is_text=is_text, samples=batch.samples, is_answer=is_answer)
    predicts = torch.cat([torch.zeros_like(batch.is_visual[:, 1:]), ~ended, nothing[:, :1]], 1)
    return AnsweredBatch(extended, predicts, answers[~ended])


def end_ids(model: Any) -> set[int]:
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def answer_end(processor: Any, ends: Collection[int]) -> int | None:
    """Return which of a model's end tokens it puts behind an answer: the one that its chat template puts there.

    Gemma 3 has two, and its tokenizer's is not the one that ends a turn.
    """
    tokenizer, reply = processor.tokenizer, "yes"
    chat = [{"role": role, "content": [{"type": "text", "text": reply}]} for role in ("user", "assistant")]
    try:
        behind = render(processor, chat).rpartition(reply)[2]
    except PromptError:  # of a model that takes single questions
        behind = ""
    written = [token for token in tokenizer.encode(behind, add_special_tokens=False) if token in ends]
    if not written and tokenizer.eos_token_id in ends:
        written = [tokenizer.eos_token_id]
    return written[0] if written else min(ends, default=None)


@dataclass(frozen=True)
class AnswerDivergence:
    """KL(original || without some decoder layers) per token of the original's answers: a localizer's SetLoss.

    It uses the whole distribution, where the likelihood knows only of the one token that was said.
    """

    model: Any
    batches: Sequence[AnsweredBatch]  # the share of this process, as below
    outputs: Sequence[Tensor]  # [N, D] the original's last layer's output where an answer token is predicted
    progress: Progress = silent

    @classmethod
    def of(cls, model: Any, batches: Sequence[AnsweredBatch], progress: Progress = silent) -> AnswerDivergence:
        outputs = [output[passed.batch.predicts] for passed in sweep(model, batches) for _, output in passed.outputs()]
        return cls(model, batches, outputs, progress)

    @property
    def num_layers(self) -> int:
        return len(text_decoder(self.model).layers)

    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """Return the divergence without each of the sets of layers, from one walk for all of them."""
        pairs = zip(sweep(self.model, self.batches, without(sets)), self.outputs, strict=True)
        by_batch = [
            [self._kl(passed.batch, original, output) for _, output in passed.outputs()]
            for passed, original in self.progress(pairs, "leave layers out", len(self.batches))
        ]
        tokens = ranks.total(sum(len(answered_batch.targets) for answered_batch in self.batches))
        return [sum(losses) / tokens for losses in zip(*ranks.gathered(by_batch), strict=True)]

    def _kl(self, answered_batch: AnsweredBatch, original: Tensor, output: Tensor) -> float:
        log_p = logits(self.model, original).float().log_softmax(-1)  # [N, vocabulary]
        log_q = logits(self.model, output[answered_batch.predicts]).float().log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum())


@dataclass(frozen=True)
class StateError:
    """The error of the states that the head reads (`state_error.py`): a SetLoss for few questions.

    A dozen questions rank sets of layers by it as steadily as hundreds do by the divergence, and by what folds can make
    up for.
    """

    model: Any
    batches: Sequence[Batch]
    progress: Progress = silent
    states: list[list[Tensor]] = field(default_factory=list)  # of the original, a batch: [N, D] of each kind of token
    walks: Walks | None = None  # through the layers; None: each runs all of them

    @classmethod
    def of(
        cls, model: Any, batches: Iterable[Batch], progress: Progress = silent, walks: Walks | None = None
    ) -> StateError:
        return cls(model, list(batches), progress, walks=walks)

    @property
    def num_layers(self) -> int:
        return len(text_decoder(self.model).layers)

    def of_sets(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """Return the error without each of the sets of layers, from one walk for all of them.

        The first walk takes the original along, whose states are kept.
        """
        by_batch: list[list[StateErrors]] = []
        beside = [] if self.states else [ORIGINAL]
        changes = [*beside, *without(sets)]
        walk = sweep(self.model, self.batches, changes) if self.walks is None else self.walks(changes)
        for place, passed in enumerate(self.progress(walk, "leave layers out", len(self.batches))):
            outputs, kinds = passed.outputs(), kinds_of(passed.batch)
            if beside:
                self.states.append(head_states(self.model, next(outputs)[1], kinds))
            by_batch.append(
                [errors_of(self.states[place], head_states(self.model, output, kinds)) for _, output in outputs]
            )
        return [sum(errors, StateErrors()).over(KINDS) for errors in zip(*ranks.gathered(by_batch), strict=True)]


def without(sets: Sequence[frozenset[int]]) -> list[Change]:
    """Return the variants that leave sets of layers out."""
    return [Change(frozenset(layers)) for layers in sets]


def answer_all(model: Any, batches: Iterable[Batch], max_new_tokens: int = ANSWER_TOKENS) -> list[AnsweredBatch]:
    return [answered(model, batch, max_new_tokens) for batch in batches]
