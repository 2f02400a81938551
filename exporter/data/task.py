"""A task: questions with answers, and a model's answers to them.

Shapes: B samples, S prompt tokens, A answer tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import clean_room
from ..errors import InputError
from ..modeling.routed_route import Route
from .batches import Batch
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


def load_task(
    task: str,
    samples: int | None,
    seed: int,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    allow_urls: bool = False,
    text_only: bool = False,
) -> Task:
    """Read a task, as `load_calibration` reads questions.

    Raises: InputError for questions without an answer, and without an image where not `text_only`: a figure is of all.
    """
    data = load_calibration(
        task,
        samples=samples,
        seed=seed,
        columns=columns,
        split=split,
        config=config,
        allow_urls=allow_urls,
        skip_text_only=False,
        text_only=text_only,
    )
    unlabelled = [sample for sample in data.samples if not sample.answers]
    if unlabelled:
        raise InputError(
            f"{unlabelled[0].origin} has no 'answer' ({len(unlabelled)} of {len(data.samples)} have none): a task "
            "needs one on every line."
        )
    return Task(data.samples, data.fingerprint)


def greedy_answers(model: Any, batch: Batch, max_new_tokens: int, route: Route | None = None) -> Tensor:
    """Return greedy answers [B, A], whatever sampling the generation config asks for."""
    routing = {} if route is None else {"route": route}
    answers: Tensor = clean_room.greedy_answers(model, batch.inputs, max_new_tokens, **routing)
    return answers
