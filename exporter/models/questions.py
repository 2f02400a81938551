"""Calibration questions with the answers that the model itself gives to them, as localizers and folds read them.

Prompts alone hold no answer token, and what a smaller model loses shows where it answers: everything is measured on
prompt and answer. The model answers each question once, whole, greedily; the tokens are kept, the batches are made anew
for every pass over them. No labels are needed.

Shapes: B samples, S tokens, A answer tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import ranks
from ..clean_room import REFERENCE_TOKENS, reference_answer, reference_inputs
from ..data.batches import Batch, make_batch, token_kinds
from ..data.given import GivenAnswers
from ..data.pictures import FEWEST, Split, split_by_picture
from ..data.samples import Sample
from ..errors import InputError
from ..families import visual_token_ids
from ..plan import PruningPlan
from ..progress import Progress
from .answers import ANSWER_TOKENS, AnsweredBatch, answer_end, answered, end_ids, with_answers
from .drafting import may_draft
from .drafts import Draft, DraftPool
from .residency import ranges_of
from .together import answered_together, reference_by_guesses

PORTIONS = {  # of the questions, and how many at least: what they cost together, `--dry-run` says
    "held_out": (1 / 5, 16),  # that nothing is fitted on
    "fit": (9 / 16, 64),  # that folds are fitted on
    "rank": (1 / 32, 12),  # that rankings of layers are read from
    "sets": (1 / 32, 12),  # that sets of layers are judged by without a fold
    "fold_sets": (1 / 16, 24),  # that sets of layers are folded on
    "judge_sets": (1 / 16, 24),  # held-out ones that all folded sets, or all folds, are judged by
    "judge_few_sets": (1 / 8, 32),  # held-out ones that the best few folded sets are judged by
}
SUFFIX = 0.5  # share of the layers that a variant does not share with the original, roughly
Part = Literal["all", "fit", "held_out"]


def portion(name: str, questions: int) -> int:
    """Return how many of so many questions a step reads."""
    share, least = PORTIONS[name]
    if name == "held_out":  # of a few, a quarter
        return max(round(share * questions), min(least, questions // 4))
    return min(questions, max(round(share * questions), least))


@dataclass(frozen=True)
class JobSize:
    """The size of a job, for the estimate of what its methods cost.

    A method's `passes` in `exporter/methods.py` may be a function of a JobSize and the method's options. It returns
    the cost in forward passes of all questions through all layers, and the share of the questions that it needs answers
    to.
    """

    questions: int
    plan: PruningPlan  # a likely one: which layers go is not known yet
    drop: int  # how many will go; the plan has one at least
    refits: int = 3  # times that a layer is run to be refitted: twice where its inputs can be kept in memory
    streamed: bool = False  # layers are read from disk: what spares a pass over them may cost others to be computed

    @property
    def judges(self) -> bool:
        """Tell whether some questions are held out to judge by: fewer than the pictures that this needs are too few."""
        return self.questions >= FEWEST

    def share(self, step: str) -> float:
        """Return the share of the questions that a step reads."""
        return portion(step, self.questions) / self.questions


@dataclass
class Questions:
    """A model's calibration questions and its answers to them."""

    model: Any
    processor: Any
    samples: tuple[Sample, ...]
    batch_size: int
    seed: int
    progress: Progress
    answer_tokens: int = ANSWER_TOKENS
    elsewhere: GivenAnswers | None = None  # in their order, elsewhere; None: the model answers
    answers: dict[int, Tensor] = field(default_factory=dict)  # [A] by index, up to and with the end token
    tokens: dict[str, int] = field(default_factory=dict)  # visual and text, of the pass that read most
    passes: list[tuple[int, int]] = field(default_factory=list)  # the same of this process, not counted so far
    pool: DraftPool = field(default_factory=DraftPool)  # what was said, from which answers are guessed
    said_to_reference: list[int] = field(default_factory=list)  # by the whole model, to the reference question
    on_answers: Callable[[], object] = lambda: None  # called when some were given

    @functools.cached_property
    def split(self) -> Split:
        return split_by_picture(self.samples, portion("held_out", len(self.samples)), self.seed)

    def portion(self, name: str) -> int:
        """Return how many questions a step reads."""
        return portion(name, len(self.samples))

    @functools.cached_property
    def _half(self) -> dict[int, bool]:
        """Return whose pictures have an odd number, by the sample's identity."""
        return {id(sample): picture % 2 == 1 for sample, picture in zip(self.samples, self.split.pictures, strict=True)}

    def half_of(self, sample: Sample) -> bool:
        """Return which half of the pictures a question belongs to, for cross-validation."""
        return self._half[id(sample)]

    def indices(self, part: Part = "all", number: int | None = None, after: int = 0) -> list[int]:
        """Draw the first `number` questions of a part, ordered by size, so that batches hold little padding.

        Args:
            after: so many of these, which are left out.
        """
        drawn = {"all": self.split.drawn, "fit": self.split.fit, "held_out": self.split.held_out}[part]
        if part == "fit":
            number = self.portion("fit") if number is None else number
        return sorted(drawn[after:number], key=lambda index: (self.samples[index].pixels, index))

    def batches(self, what: str, share: float = 1.0, part: Part = "all", number: int | None = None) -> Iterator[Batch]:
        """Yield prompts and answers of a part of the questions, the same in the same order every time.

        With several processes these are the batches that this one takes.

        Args:
            what: is done with them, for the progress bar.
            share: of the part, one question at least; or
            number: of its questions.
        """
        if number is None and share < 1:
            number = max(1, round(share * len(self.indices(part))))
        answered = self.answered(what, part, number)
        return (answered_batch.batch for answered_batch in answered)

    def answered(
        self, what: str, part: Part = "all", number: int | None = None, after: int = 0
    ) -> Iterator[AnsweredBatch]:
        """Return the same, with what divergence needs to know of the answers.

        The model answers when this is called, not when the first batch is taken: what reads batches may have changed it
        by then.
        """
        chosen = self.indices(part, number, after)
        groups = [self.indices(part, max(len(chosen), self.portion("fit")) if part == "fit" else None)]
        if self._streamed and part != "all":  # the other side will be read too, and weights are read once a token
            groups.append(self.indices("held_out" if part == "fit" else "fit"))
        self.answer(*groups)
        return self._answered(what, chosen)

    def _answered(self, what: str, chosen: list[int]) -> Iterator[AnsweredBatch]:
        starts = ranks.share(range(0, len(chosen), self.batch_size))
        visual = text = 0
        for start in self.progress(starts, what, len(starts)):
            answered_batch = self._with_answers(chosen[start : start + self.batch_size])
            visual, text = (
                visual + int(answered_batch.batch.is_visual.sum()),
                text + int(answered_batch.batch.is_text.sum()),
            )
            yield answered_batch
        self.passes.append((visual, text))
        if ranks.world() == 1:  # else when all have come to the end of a step
            self.count_tokens()

    def count_tokens(self) -> dict[str, int]:
        """Return the tokens, visual and text, of the pass that read most, with those of other processes."""
        for shares in zip(*ranks.gathered([self.passes]), strict=True):
            visual, text = map(sum, zip(*shares, strict=True))
            if visual + text > sum(self.tokens.values()):
                self.tokens.update(visual=visual, text=text)
        self.passes = []
        return self.tokens

    @property
    def _streamed(self) -> bool:
        """Tell whether layers lie on disk."""
        return self.model is not None and ranges_of(self.model) is not None

    def answer(self, *groups: Sequence[int]) -> None:
        """Let the model answer those of the questions that it has not: like ones together, with answers as long."""
        known = len(self.answers)
        self._answer(*groups)
        if len(self.answers) > known:
            self.on_answers()

    def _answer(self, *groups: Sequence[int]) -> None:
        if self.elsewhere is not None:
            for index in {index for indices in groups for index in indices} - self.answers.keys():
                self.answers[index] = torch.tensor(self._answered_elsewhere(index))
            return
        parts: list[list[int]] = []
        for indices in groups:
            order = sorted((index for index in indices if index not in self.answers), key=self._kind)
            parts += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        mine = ranks.share(parts)
        by_batch: list[dict[int, Tensor]] = []
        for some, answered_batch in zip(
            self.progress(mine, "answer questions", len(mine)), self._answers_to(mine), strict=True
        ):
            answers = torch.split(answered_batch.targets.cpu(), answered_batch.predicts.sum(1).tolist())
            by_batch.append({index: tokens.clone() for index, tokens in zip(some, answers, strict=True)})
        for by_index in ranks.gathered(by_batch):
            self.answers.update(by_index)

    def _answers_to(self, parts: Sequence[list[int]]) -> Iterator[AnsweredBatch]:
        batches = (self._batch(some) for some in parts)
        if not self._streamed:
            for batch in batches:
                yield answered(self.model, batch, self.answer_tokens)
            return
        aside = None
        if ranks.is_first():  # which is asked for the reference answer later
            reference = self._reference_batch()
            aside = reference, self._drafts(reference)[0]
        yield from answered_together(self.model, batches, self.answer_tokens, self._drafts, aside=aside)
        if aside is not None:
            self.said_to_reference = self.said_to_reference or aside[1].answer

    def so_far(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what was answered, to be kept: what goes into JSON, and the tokens of each answer by its index."""
        texts, notes = self.pool.so_far()
        data = {"said_to_reference": self.said_to_reference, "texts": texts, "notes": notes}
        return data, {str(index): tokens for index, tokens in self.answers.items()}

    def go_on_from(self, data: dict[str, Any], answers: dict[str, Tensor]) -> None:
        """Take what a run before has answered, in place of asking again."""
        self.said_to_reference = list(data["said_to_reference"])
        self.pool.go_on_from(data["texts"], data["notes"])
        self.answers.update({int(index): tokens for index, tokens in answers.items()})

    def reference_answer(self) -> dict[str, list[Any]]:
        """Return what the model, as it is now, says to the reference question, and how sure it is of each token.

        Where layers lie on disk, what the whole model said to it among the other questions is a guess at it.
        """
        if not self._streamed or not may_draft(self.model.config):
            return reference_answer(self.model, self.processor)
        batch = self._reference_batch()
        if self.elsewhere is not None:
            for answer in self.answers.values():
                self.pool.note(answer.tolist(), 0)
        draft = self._drafts(batch)[0]
        draft = dataclasses.replace(draft, most=REFERENCE_TOKENS, ends=frozenset(), label=self.said_to_reference)
        return reference_by_guesses(self.model, batch.inputs, draft)

    def _reference_batch(self) -> Batch:
        inputs = reference_inputs(self.processor)
        return Batch(inputs, *token_kinds(inputs, self.processor, self.model.config), ())

    def _drafts(self, batch: Batch) -> list[Draft]:
        """Return what is guessed of a batch's answers, before any is given."""
        ends = frozenset(end_ids(self.model))
        is_read = batch.inputs["attention_mask"].bool() & ~batch.is_visual
        texts = [ids[some].tolist() for ids, some in zip(batch.inputs["input_ids"], is_read, strict=True)]
        if not batch.samples:  # the reference question
            return [Draft(self.pool, texts[0], min(self.answer_tokens, REFERENCE_TOKENS), ends)]
        return [
            Draft(self.pool, text, self.answer_tokens, ends, label=self._label(sample))
            for text, sample in zip(texts, batch.samples, strict=True)
        ]

    def _label(self, sample: Sample) -> list[int]:
        """Return the tokens of a right answer, where the user's file has one: nothing but a guess at the model's."""
        return self._tokens(sample.answers[0]) if sample.answers else []

    def _answered_elsewhere(self, index: int) -> list[int]:
        """Return the tokens of an answer that was given elsewhere, as many as an answer may take."""
        assert self.elsewhere is not None
        tokens = self._tokens(self.elsewhere.texts[index], ended=self.elsewhere.ended[index])
        if set(tokens) & set(visual_token_ids(self.model.config)):
            raise InputError(
                f"{self.elsewhere.path}: the answer to {self.samples[index].origin} holds the model's placeholder of "
                "an image: take it out."
            )
        return tokens[: self.answer_tokens]

    def _tokens(self, text: str, ended: bool = True) -> list[int]:
        """Return the tokens of an answer, with an end token unless it was cut off."""
        tokens: list[int] = self.processor.tokenizer.encode(text, add_special_tokens=False)
        return [*tokens, self._end] if ended and self._end is not None else tokens

    @functools.cached_property
    def _end(self) -> int | None:
        """Return the token that ends an answer; None: the model knows none."""
        return answer_end(self.processor, end_ids(self.model))

    def _kind(self, index: int) -> tuple[str, int, int]:
        sample = self.samples[index]
        return json.dumps(sample.messages, sort_keys=True), sample.pixels, index

    def _with_answers(self, indices: list[int]) -> AnsweredBatch:
        answers = [self.answers[index] for index in indices]
        lengths = torch.tensor([len(tokens) for tokens in answers])
        tokens = pad_sequence(answers, batch_first=True).to(self.model.device)  # [B, A]
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self.model.device)
        return with_answers(self.model, self._batch(indices).to(self.model.device), tokens, real)

    def _batch(self, indices: list[int]) -> Batch:
        return make_batch([self.samples[index] for index in indices], self.processor, self.model.config)
