"""A task with its metric: the questions as the metric puts them, read and checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...data.calibration import Calibration, drawn
from ...data.samples import TextOnlyError
from ...data.task import Task, load_task
from ...errors import InputError
from ...recipe import TaskData
from .table import DEFAULT_METRIC, METRICS, chosen, questions_for, with_suffix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measure:
    """What is measured on a task: which metric, and what is put behind its questions."""

    metric: str | None = None  # None: the one that the columns clearly ask for, else exact match
    suffix: str | None = None  # 'Answer the question using a single word or phrase.'


def measured_task(data: TaskData, samples: int | None, seed: int) -> Task:
    """Read a task and put its questions as its metric does.

    Args:
        samples: how many of the questions, drawn with the seed; None: all.
    Raises: InputError as `load_task` does, and for a metric that there is not or that the task has no columns for.
    """
    may_be_text = data.metric is None or METRICS[chosen(data.metric, ())].text_only
    task = load_task(data, samples, seed, text_only=may_be_text)
    name = chosen(data.metric, task.samples)
    metric = METRICS[name]
    if not metric.text_only and (blind := next((s for s in task.samples if not s.is_seen), None)):
        raise TextOnlyError(f"{blind.origin}: a question without an image ('image' or 'images' is missing).")
    if data.metric is None and name != DEFAULT_METRIC:
        logger.warning("metric: %s, by the task's columns (--metric exact for exact match)", name)
    put = questions_for(name, metric, task.samples)
    if data.suffix:
        put = with_suffix(put, data.suffix)
    if put == task.samples:
        return replace(task, metric=name)
    fingerprint = Calibration(put, data.data, len(put), seed).fingerprint
    return Task(put, fingerprint, name)


def compared_task(data: TaskData, samples: int | None, seed: int) -> Task:
    """Read the task that a recipe names, for a comparison, whose cells are counted question by question.

    Raises: InputError as `measured_task` does, and for a metric that counts groups or asks a judge.
    """
    task = measured_task(data, samples if data.types is None else None, seed)
    if data.types is not None:
        task = of_types(task, data.types, samples, seed)
    metric = METRICS[task.metric]
    if metric.as_one or metric.judged:
        raise InputError(
            f"task: a comparison rates each question alone, which the metric '{task.metric}' does not: name another "
            "metric, or run `lvlm-exporter evaluate`."
        )
    return task


def of_types(task: Task, types: Sequence[str], samples: int | None, seed: int) -> Task:
    """Return a task's questions of some types: all of them, or `samples` that are drawn with the seed.

    Raises: InputError for a type that no question has.
    """
    there = sorted({sample.type for sample in task.samples if sample.type})
    if unknown := [name for name in types if name not in there]:
        raise InputError(f"task: no question is of type '{unknown[0]}'; there are {', '.join(there) or 'no types'}.")
    chosen = [sample for sample in task.samples if sample.type in types]
    some = tuple(drawn(chosen, samples, seed))
    return Task(some, Calibration(some, "", len(chosen), seed).fingerprint, task.metric)
