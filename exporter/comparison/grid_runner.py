"""Runs the cells of a grid together, so that what they share is computed once."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.shapes import read_json
from ..clean_room import greedy_answers
from ..compression.job import CompressionJob
from ..compression.steps import fold_job, localize
from ..data.batches import make_batch, make_batches
from ..data.samples import Sample
from ..data.task import SPARE_TOKENS, Task
from ..evaluation.judge import HALF
from ..evaluation.metrics.table import METRICS
from ..evaluation.scoring import Fidelity, Rate, TaskResult
from ..fold.job import FoldRefused
from ..localize.scores import LayerScores
from ..methods import FOLDS, LOCALIZERS, resolve
from ..models.answers import AnsweredBatch, with_answers
from ..models.capture import BatchStatistics, layer_statistics
from ..models.questions import Questions
from ..models.variants import AnswerAgreement, Variant, assembled, judge
from ..plan import Folded, PruningPlan, make_plan
from ..progress import Progress
from ..recipe import Method
from .cells_file import CellsFile, as_kept
from .grid import Cell, Comparison, Grid, Key, cell_from_data, label

CELLS_AT_A_TIME = 16  # whose new tensors are held together


def alike_together(keys: Sequence[Key], choices: dict[tuple[str, int], LayerScores]) -> Iterator[list[Key]]:
    """Yield the keys in parts of CELLS_AT_A_TIME different models: localizers that choose alike share their cells."""
    models: dict[tuple[frozenset[int], str], list[Key]] = {}
    for localizer, fold, count in keys:
        models.setdefault((frozenset(choices[localizer, count].drop), fold), []).append((localizer, fold, count))
    alike = list(models.values())
    for start in range(0, len(alike), CELLS_AT_A_TIME):
        yield [key for same in alike[start : start + CELLS_AT_A_TIME] for key in same]


@dataclass
class GridRunner:
    """One model, its calibration statistics and the original's answers, from which every cell is computed."""

    grid: Grid
    job: CompressionJob
    model: Any
    task: Task
    progress: Progress
    counts: tuple[int, ...]  # of layers that go
    clock: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # folds that this model does not take, and why

    def timed(self, what: str, begin: float) -> None:
        self.clock.setdefault(what, []).append(time.monotonic() - begin)

    # localizers

    def choose(self) -> dict[tuple[str, int], LayerScores]:
        """Return the layers that each localizer drops at each budget."""
        chosen = {}
        for method in self.grid.localizers:
            for count in self.counts:
                chosen[label(method), count] = self._choose(method, count)
        return chosen

    def _choose(self, method: Method, count: int) -> LayerScores:
        row = LOCALIZERS[method.name]
        if row.from_statistics:
            chosen: LayerScores = resolve(row.run)(self.statistics, count, self.job.protect, **method.options)
            return chosen
        options = tuple(sorted(method.options.items()))
        if not row.nested:
            return self._choice(method.name, options, count)
        longest = self._choice(method.name, options, max(self.counts))
        return dataclasses.replace(longest, drop=longest.drop[:count])

    @functools.cache  # noqa: B019 - one runner a run
    def _choice(self, name: str, options: tuple[tuple[str, Any], ...], count: int) -> LayerScores:
        begin = time.monotonic()
        recipe = dataclasses.replace(self.job.recipe, localizer=Method(name, dict(options)))
        scores = localize(dataclasses.replace(self.job, recipe=recipe, count=count), self.model, self.questions)
        self.timed(name, begin)
        return scores

    @functools.cached_property
    def questions(self) -> Questions:
        return self.job.questions(self.model)

    @functools.cached_property
    def statistics(self) -> list[BatchStatistics]:
        begin = time.monotonic()
        measured = list(layer_statistics(self.model, self.questions.batches("score layers")))
        self.timed("statistics", begin)
        return measured

    def __hash__(self) -> int:
        return id(self)

    # cells

    def keys(self, choices: dict[tuple[str, int], LayerScores]) -> list[Key]:
        return [(name, label(fold), count) for name, count in choices for fold in self.grid.folds]

    def fill(self, choices: dict[tuple[str, int], LayerScores], keys: Sequence[Key]) -> dict[Key, Cell]:
        """Fold, judge against the original's answers, and generate where a cell departs from them."""
        folds = {label(fold): fold for fold in self.grid.folds}
        wanted = {key: (make_plan(self.job.source.num_layers, choices[key[0], key[2]].drop), key[1]) for key in keys}
        distinct: dict[tuple[PruningPlan, str], Variant] = {}
        for plan, fold in dict.fromkeys(wanted.values()):
            try:
                distinct[plan, fold] = Variant(plan, self.fold(plan, folds[fold]))
            except FoldRefused as error:
                self.refused[fold] = str(error)
        variants = list(distinct.values())
        begin = time.monotonic()
        bar = iter(
            self.progress(
                range(len(variants) * len(self.reference_answers)), "judge", len(variants) * len(self.reference_answers)
            )
        )
        agreements = judge(self.model, variants, self.reference_answers, lambda _: next(bar, None))
        for _ in bar:
            pass
        correct = [self._correct(v, a) for v, a in zip(variants, agreements, strict=True)]
        self.timed("judge", begin)
        judged = dict(zip(distinct, zip(agreements, correct, strict=True), strict=True))
        return {key: self._cell(key, at[0], *judged[at]) for key, at in wanted.items() if at in judged}

    def fold(self, plan: PruningPlan, method: Method) -> Folded:
        if not plan.drop:
            return {}
        begin = time.monotonic()
        fold_inputs = fold_job(self.job, self.model, questions=self.questions, plan=plan, memo=self._measured)
        folded: Folded = resolve(FOLDS[method.name].run)(fold_inputs, **method.options)
        self.timed("fold", begin)
        return folded

    @functools.cached_property
    def _measured(self) -> dict[Any, Any]:
        return {}

    # the original's answers

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

    def _cell(self, key: Key, plan: PruningPlan, agreement: AnswerAgreement, correct: list[float]) -> Cell:
        fidelity = Fidelity.of(agreement.kl, agreement.same, agreement.tokens)
        result = TaskResult.of([sample.type for sample in self.task.samples], correct, fidelity)
        gone = sum(self.job.source.parameters_per_layer[layer] for layer in plan.drop)
        return Cell(
            localizer=key[0],
            fold=key[1],
            drop=plan.drop,
            parameters=self.job.source.weights.num_parameters - gone,
            **as_kept(result, self.original.accuracy),
            wrong=tuple(index for index, right in enumerate(correct) if right < HALF),
        )

    def naive_seconds(self, cells: int) -> float:
        """Return the seconds of a loop over cells that shares nothing: each would localize, fold and answer anew."""
        per_cell = {what: max(times) for what, times in self.clock.items()}
        clocks = [
            "statistics" if LOCALIZERS[method.name].from_statistics else method.name for method in self.grid.localizers
        ]
        localizing = sum(per_cell.get(clock, 0.0) for clock in clocks) / len(clocks)
        return cells * (localizing + per_cell.get("fold", 0.0) + per_cell.get("answer", 0.0))


class FinishedCells:
    """Cells of the grid on disk as they are done."""

    def __init__(self, out: Path, grid: Grid) -> None:
        self.out = out
        columns = [f.name for f in dataclasses.fields(Cell)]
        asked = asdict(grid) | {"task": grid.task.to_data()}
        self.file = CellsFile(out / "cells.jsonl", [asked, columns])
        self.cells: dict[Key, Cell] = {}
        for cell in self.file.read(cell_from_data):
            self.cells[cell.localizer, cell.fold, len(cell.drop)] = cell

    def finished(self) -> Comparison | None:
        """Return the result of an earlier run that came to its end, if there is one."""
        results = self.out / "results.json"
        if not results.is_file():
            return None
        try:
            return Comparison.from_data(read_json(results), results.parent)
        except (OSError, ValueError, KeyError, TypeError):  # a damaged one is made again from the cells
            return None

    def add(self, cells: dict[Key, Cell]) -> None:
        self.file.add([asdict(cell) for cell in cells.values()])
