"""What a metric is: how a question is put, what an answer is worth, and what is told of all of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from ...data.samples import Sample
from ...errors import InputError

Figures = dict[str, float]  # by name: shares from 0 to 1, but where a metric says points


def as_it_stands(sample: Sample) -> list[Sample]:
    """Put a question as its line has it."""
    return [sample]


def no_figures(_samples: Sequence[Sample], _answers: Sequence[str]) -> Figures:
    """Tell nothing beside the mean."""
    return {}


def as_they_are(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Change nothing."""
    return samples


def no_group(sample: Sample) -> Hashable:
    """Count every question by itself."""
    return id(sample)


@dataclass(frozen=True)
class Metric:
    """One metric."""

    title: str  # of the column that shows its mean
    value: Callable[[Sample, str], float]  # of one answer, from 0 to 1
    needs: tuple[str, ...] = ()  # columns, as `--columns` names them
    check: Callable[[Sample], str | None] = lambda _sample: None  # what is wrong with a line, None for nothing
    put: Callable[[Sample], list[Sample]] = as_it_stands  # the questions that a line becomes
    figures: Callable[[Sequence[Sample], Sequence[str]], Figures] = no_figures
    prepare: Callable[[Sequence[Sample]], Sequence[Sample]] = as_they_are  # what only the whole task tells
    group: Callable[[Sample], Hashable] = no_group  # questions that belong together
    group_size: Callable[[Sample], int] | None = None  # how many a group needs to have; None: any number
    as_one: bool = False  # a group is one trial: right where all of it is
    text_only: bool = False  # lines without an image are questions, too
    judged: bool = False  # an OpenAI-compatible judge says what an answer is worth; `value` is not asked


def questions_for(name: str, metric: Metric, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return a task's questions as the metric puts them.

    Raises: InputError for lines without a column that it needs, with an answer that it does not know, or in groups that
    are not whole.
    """
    for sample in samples:
        for column in metric.needs:
            if sample.fields.get(column) in (None, "", [], {}):
                raise InputError(
                    f"{sample.origin} has no '{column}', which the metric '{name}' needs: say which column it is with "
                    f"--columns {column}=NAME, or choose another --metric."
                )
        if wrong := metric.check(sample):
            raise InputError(f"{sample.origin}: {wrong}: the metric '{name}' is not for this task.")
    put = tuple(question for sample in metric.prepare(samples) for question in metric.put(sample))
    if metric.group_size is not None:
        _check_groups(name, metric, put)
    return put


def _check_groups(name: str, metric: Metric, samples: Sequence[Sample]) -> None:
    for members in grouped(metric, samples).values():
        size = metric.group_size(samples[members[0]]) if metric.group_size else len(members)
        if len(members) != size:
            raise InputError(
                f"{samples[members[0]].origin}: the metric '{name}' judges {size} lines together, and here are "
                f"{len(members)}: take the whole task, without --samples."
            )


def grouped(metric: Metric, samples: Sequence[Sample]) -> dict[Hashable, list[int]]:
    """Return the numbers of the questions that belong together, by group, in order."""
    groups: dict[Hashable, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(metric.group(sample), []).append(number)
    return groups


def with_suffix(samples: Iterable[Sample], suffix: str) -> tuple[Sample, ...]:
    """Return the questions with a text behind the last turn of the user, on a line of its own."""
    return tuple(with_text(sample, lambda text: f"{text}\n{suffix}") for sample in samples)


def with_text(sample: Sample, change: Callable[[str], str]) -> Sample:
    """Return a sample whose last turn of the user says something else."""
    messages = list(sample.messages)
    place = max(number for number, turn in enumerate(messages) if turn["role"] == "user")
    content = messages[place]["content"]
    if isinstance(content, str):
        changed: object = change(content)
    else:
        parts = list(content)
        last = max((n for n, part in enumerate(parts) if part.get("type") == "text"), default=None)
        if last is None:
            parts.append({"type": "text", "text": change("")})
        else:
            parts[last] = {"type": "text", "text": change(parts[last]["text"])}
        changed = parts
    messages[place] = {**messages[place], "content": changed}
    return replace(sample, messages=tuple(messages))


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def by_category(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the numbers of the questions of each category, in the order of the names."""
    numbers: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        numbers.setdefault(str(sample.fields.get("category")), []).append(number)
    return dict(sorted(numbers.items()))
