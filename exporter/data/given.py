"""Answers that the original model gave elsewhere, for calibration questions: it then need not answer them here.

Two kinds of lines: those of `evaluate --predictions`, which name a question by its key, and lines that repeat the
question: {"image": …, "question": …, "answer": …}, as whoever asks a server writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .images import open_bytes
from .records import read_records
from .samples import ANSWER_COLUMNS, Sample, sample_from

KEY = "key"  # of a question, in a line
ENDED = "ended"  # whether the model ended its answer, in a line of `evaluate --predictions`; else that cut it off
LAYERS = "layers"  # of the decoder of the model that answered, in a line of `evaluate --predictions`
KEY_DIGITS = 32
Answer = tuple[str, bool]  # its text, and whether the model ended it


@dataclass(frozen=True)
class GivenAnswers:
    """One answer a question, in their order."""

    texts: tuple[str, ...]
    ended: tuple[bool, ...]  # False where it was cut off
    path: str
    sha256: str  # of the file
    num_layers: frozenset[int] = frozenset()  # of the decoders that answered, as far as the lines tell

    def check_layers(self, num_layers: int) -> None:
        """Raise InputError where a model with another number of decoder layers gave all answers: it is another one."""
        if self.num_layers and num_layers not in self.num_layers:
            given_by = " and ".join(map(str, sorted(self.num_layers)))
            raise InputError(
                f"{self.path} holds the answers of a model of {given_by} layers, and this one has {num_layers}: what "
                "the original itself says is needed."
            )


def question_key(sample: Sample) -> str:
    """Return what tells a question from all others: a hash of the turns and of the files of its images and videos."""
    digest = hashlib.sha256(_words(sample).encode())
    for image in sample.images:
        digest.update(hashlib.sha256(open_bytes(image, sample.origin)).digest())
    for video in sample.videos:
        digest.update(video.digest(sample.origin))
    return digest.hexdigest()[:KEY_DIGITS]


def _words(sample: Sample) -> str:
    return json.dumps(sample.messages, sort_keys=True)


def given_answers(path: str, samples: Sequence[Sample], **how: Any) -> GivenAnswers:
    """Read the answers to some questions from a file. What it answers beside them is left alone.

    Args:
        how: `allow_urls` and `frames`, as `sample_from` takes them, of lines that repeat such a question.
    Raises: InputError where a question has none or several, and for lines that are no answers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"there is no file of answers '{path}': `evaluate --predictions FILE` makes one.")
    wanted_words = {_words(sample) for sample in samples}
    by_key: dict[str, dict[str, bool]] = {}  # texts, and whether they were ended
    runs: set[str] = set()
    num_layers: set[int] = set()
    for origin, record in read_records(file):
        answer = record.get("answer")
        if not isinstance(answer, str):
            raise InputError(f"{origin}: 'answer' must be a text, what the original model said to the question.")
        key = _key_of_line(record, wanted_words, origin=origin, folder=file.parent, how=how)
        ended = by_key.setdefault(key, {})
        ended[answer.strip()] = ended.get(answer.strip(), False) or record.get(ENDED) is not False
        runs.add(str(record.get("run", "")))
        if KEY in record and isinstance(layers := record.get(LAYERS), int):
            num_layers.add(layers)
    answers = [sorted(by_key.get(question_key(sample), {}).items()) for sample in samples]
    _refuse_unfit(path, samples, answers, num_answered=len(by_key), num_runs=len(runs))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    firsts = [some[0] for some in answers]
    return GivenAnswers(
        tuple(text for text, _ in firsts),
        tuple(ended for _, ended in firsts),
        path=path,
        sha256=sha256,
        num_layers=frozenset(num_layers),
    )


def _key_of_line(
    record: Mapping[str, Any], wanted_words: Collection[str], *, origin: str, folder: Path, how: Mapping[str, Any]
) -> str:
    """Return the key of a line's question; of one that is not asked, whose images need not be here, its place."""
    if KEY in record:
        if not isinstance(key := record[KEY], str):
            raise InputError(f"{origin}: '{KEY}' must be the text that `evaluate --predictions` writes.")
        return key
    if "index" in record and "correct" in record and not {"question", "messages", "conversations"} & record.keys():
        raise InputError(
            f"{origin} does not say which question it answers: an earlier version wrote it. Ask again, with the name "
            "of a new file for `evaluate --predictions`."
        )
    question = {name: value for name, value in record.items() if name not in (*ANSWER_COLUMNS, "choices", "options")}
    sample = sample_from(question, origin, folder, text_only=True, **how)
    return question_key(sample) if _words(sample) in wanted_words else origin


def _refuse_unfit(
    path: str,
    samples: Sequence[Sample],
    answers: Sequence[Sequence[tuple[str, bool]]],
    *,
    num_answered: int,
    num_runs: int,
) -> None:
    """Raise InputError, with the numbers, unless every question has one answer that says something."""
    texts = [[text for text, _ in some] for some in answers]
    groups = {
        "without an answer": [sample for sample, some in zip(samples, texts, strict=True) if not some],
        "with different answers": [sample for sample, some in zip(samples, texts, strict=True) if len(some) > 1],
        "with an empty answer": [sample for sample, some in zip(samples, texts, strict=True) if some == [""]],
    }
    wrong = {what: some for what, some in groups.items() if some}
    if not wrong:
        return
    counts = ", ".join(f"{len(some)} {what} (the first is {some[0].origin})" for what, some in wrong.items())
    several = f" It holds {num_runs} runs of `evaluate`: keep that of the original model." if num_runs > 1 else ""
    raise InputError(
        f"{path} answers {num_answered} questions, and leaves of the {len(samples)} calibration questions {counts}."
        f"{several} Each needs one answer, to the same words about the same image file; leave out a question to which "
        "the model says nothing."
    )
