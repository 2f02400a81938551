"""A task: questions with answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..recipe import TaskData
from .calibration import load_calibration
from .samples import Sample

SPARE_TOKENS = 8  # beyond the longest right answer, so that one that goes on too long is seen to be wrong


@dataclass(frozen=True)
class Task:
    """Questions with answers."""

    samples: tuple[Sample, ...]
    fingerprint: str  # of questions and images, not of answers
    metric: str = "exact"  # by its name in exporter/evaluation/metrics/table.py

    def longest(self, processor: Any) -> int:
        """Return tokens that an answer may take."""
        encode = processor.tokenizer.encode
        lengths = [len(encode(a, add_special_tokens=False)) for sample in self.samples for a in sample.answers]
        return max(lengths) + SPARE_TOKENS

    @property
    def answers_fingerprint(self) -> str:
        """Return SHA-256 over the right answers."""
        right = [[sample.answers, sample.choices] for sample in self.samples]
        return hashlib.sha256(json.dumps(right).encode()).hexdigest()


def load_task(task: TaskData, samples: int | None, seed: int, *, text_only: bool = False) -> Task:
    """Read a task, as `load_calibration` reads questions; `samples` of them, None: all.

    Raises: InputError for questions without an answer, and without an image where not `text_only`: a figure is of all.
    """
    data = load_calibration(
        task.data, samples=samples, seed=seed, **task.options, skip_text_only=False, text_only=text_only
    )
    unlabelled = [sample for sample in data.samples if not sample.answers]
    if unlabelled:
        raise InputError(
            f"{unlabelled[0].origin} has no 'answer' ({len(unlabelled)} of {len(data.samples)} have none): a task "
            "needs one on every line."
        )
    return Task(data.samples, data.fingerprint)
