"""Answers that the original model gave elsewhere, for calibration questions: it then need not answer them here.

Two kinds of lines: those of `evaluate --predictions`, which name a question by its key, and lines that repeat the
question: {"image": …, "question": …, "answer": …}, as whoever asks a server writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .images import open_bytes
from .records import read_records
from .samples import ANSWER_COLUMNS, Sample, sample_from

KEY = "key"  # of a question, in a line
KEY_DIGITS = 32


@dataclass(frozen=True)
class GivenAnswers:
    """One answer a question, in their order."""

    texts: tuple[str, ...]
    path: str
    sha256: str  # of the file


def question_key(sample: Sample) -> str:
    """Return what tells a question about its images from all others: a hash of the turns and of the image files."""
    digest = hashlib.sha256(json.dumps(sample.messages, sort_keys=True).encode())
    for image in sample.images:
        digest.update(hashlib.sha256(open_bytes(image, sample.origin)).digest())
    return digest.hexdigest()[:KEY_DIGITS]


def given_answers(path: str, samples: Sequence[Sample]) -> GivenAnswers:
    """Read the answers to some questions from a file. What it answers beside them is left alone.

    Raises: InputError where a question has none or several, and for lines that are no answers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"there is no file of answers {path}: `evaluate --predictions FILE` makes one.")
    by_key: dict[str, set[str]] = {}
    for origin, record in read_records(file):
        key, answer = _line(record, origin, file.parent)
        by_key.setdefault(key, set()).add(answer)
    answers = [sorted(by_key.get(question_key(sample), ())) for sample in samples]
    _refuse_unfit(path, samples, answers, others=len(by_key))
    return GivenAnswers(tuple(some[0] for some in answers), path, hashlib.sha256(file.read_bytes()).hexdigest())


def _line(record: Mapping[str, Any], origin: str, folder: Path) -> tuple[str, str]:
    """Return the key of a line's question, and the answer."""
    answer = record.get("answer")
    if not isinstance(answer, str):
        raise InputError(f"{origin}: 'answer' must be a text, what the original model said to the question.")
    if KEY in record:
        if not isinstance(record[KEY], str):
            raise InputError(f"{origin}: '{KEY}' must be the text that `evaluate --predictions` writes.")
        return record[KEY], answer.strip()
    if "index" in record and "correct" in record and not {"question", "messages", "conversations"} & record.keys():
        raise InputError(
            f"{origin} does not say which question it answers: an earlier version wrote it. Make the file again with "
            "`evaluate --predictions`."
        )
    question = {name: value for name, value in record.items() if name not in (*ANSWER_COLUMNS, "choices", "options")}
    return question_key(sample_from(question, origin, folder)), answer.strip()


def _refuse_unfit(path: str, samples: Sequence[Sample], answers: Sequence[Sequence[str]], others: int) -> None:
    """Raise InputError, with the numbers, unless every question has one answer that says something."""
    groups = {
        "have none": [sample for sample, some in zip(samples, answers, strict=True) if not some],
        "have different ones": [sample for sample, some in zip(samples, answers, strict=True) if len(some) > 1],
        "have an empty one": [sample for sample, some in zip(samples, answers, strict=True) if list(some) == [""]],
    }
    wrong = {what: some for what, some in groups.items() if some}
    if not wrong:
        return
    counts = ", ".join(f"{len(some)} {what} ({some[0].origin})" for what, some in wrong.items())
    raise InputError(
        f"{path} has answers to {others} questions; of the {len(samples)} calibration questions {counts}. Each needs "
        "one answer, to the same words about the same image file."
    )
