"""A task and what the original answers to it, by which the cells of a grid are rated."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..clean_room import greedy_answers
from ..compression.job import CompressionJob
from ..data.batches import make_batch, make_batches
from ..data.samples import Sample
from ..data.task import SPARE_TOKENS, Task
from ..data.uses import TaskUses
from ..evaluation.judge import HALF
from ..evaluation.metrics.table import METRICS
from ..evaluation.scoring import Fidelity, Rate, TaskResult
from ..models.answers import AnsweredBatch, with_answers
from ..models.variants import AnswerAgreement, Variant, assembled, judge
from ..progress import Progress
from .cells_file import as_kept
from .grid import Cell, Key


@dataclass
class TaskJudge:
    """One task. Its questions are answered by the original once, however many cells and seeds there are."""

    job: CompressionJob  # of any seed: its processor and options are read, not its calibration questions
    model: Any
    task: Task
    progress: Progress
    uses: TaskUses | None = None  # earlier ones, of a task that is kept for a last test
    clock: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, what: str, begin: float) -> None:
        self.clock.setdefault(what, []).append(time.monotonic() - begin)

    def rate(self, variants: Mapping[Key, Variant]) -> dict[Key, Cell]:
        """Judge variants against the original's answers, and generate where one departs from them."""
        distinct = list({id(variant): variant for variant in variants.values()}.values())
        begin = time.monotonic()
        steps = len(distinct) * len(self.reference_answers)
        bar = iter(self.progress(range(steps), "judge", steps))
        agreements = judge(self.model, distinct, self.reference_answers, lambda _: next(bar, None))
        for _ in bar:
            pass
        correct = [self._correct(v, a) for v, a in zip(distinct, agreements, strict=True)]
        self.timed("judge", begin)
        judged = {id(v): (a, right) for v, a, right in zip(distinct, agreements, correct, strict=True)}
        return {key: self._cell(key, variant.plan.drop, *judged[id(variant)]) for key, variant in variants.items()}

    @functools.cached_property
    def reference_answers(self) -> list[AnsweredBatch]:
        """Return the task's questions with what the original answers, in batches; also sets its correctness."""
        begin = time.monotonic()
        samples, size = self.task.samples, self.job.options.batch_size
        answered, right = [], []
        number = -(-len(samples) // size)
        for batch in self.progress(
            make_batches(samples, self.job.processor, self.job.source.config, size), "answer", number
        ):
            on_device = batch.to(self.model.device)
            answers = greedy_answers(self.model, on_device.inputs, self.longest)
            right += self._judge(answers, batch.samples)
            answered.append(with_answers(self.model, on_device, answers))
        self.correct = right
        self.timed("answer", begin)
        return answered

    @functools.cached_property
    def longest(self) -> int:
        return self.task.longest(self.job.processor) if self.task.samples else SPARE_TOKENS

    @property
    def original(self) -> Rate:
        self.reference_answers  # noqa: B018
        return Rate.of(self.correct)

    def _judge(self, answers: Any, samples: Sequence[Sample]) -> list[float]:
        texts = self.job.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        value = METRICS[self.task.metric].value
        return [value(s, text) for text, s in zip(texts, samples, strict=True)]

    def _correct(self, variant: Variant, agreement: AnswerAgreement) -> list[float]:
        """Rate each answer; only the questions that are answered otherwise are answered again."""
        correct = list(self.correct)
        departs = [i for i, follows in enumerate(agreement.follows) if not follows]
        size = self.job.options.batch_size
        with assembled(self.model, variant):
            for start in range(0, len(departs), size):
                indices = departs[start : start + size]
                samples = [self.task.samples[i] for i in indices]
                batch = make_batch(samples, self.job.processor, self.job.source.config).to(self.model.device)
                answers = greedy_answers(self.model, batch.inputs, self.longest)
                for i, right in zip(indices, self._judge(answers, samples), strict=True):
                    correct[i] = right
        return correct

    def _cell(self, key: Key, drop: tuple[int, ...], agreement: AnswerAgreement, correct: list[float]) -> Cell:
        fidelity = Fidelity.of(agreement.kl, agreement.same, agreement.tokens)
        result = TaskResult.of([sample.type for sample in self.task.samples], correct, fidelity)
        gone = sum(self.job.source.parameters_per_layer[layer] for layer in drop)
        return Cell(
            localizer=key[0],
            fold=key[1],
            drop=drop,
            parameters=self.job.source.weights.num_parameters - gone,
            **as_kept(result, self.original.accuracy),
            wrong=tuple(index for index, right in enumerate(correct) if right < HALF),
        )
