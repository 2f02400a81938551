"""The original's answers, computed once and kept on disk, with the likeliest tokens at each step.

The original is asked and let go before the smaller model is loaded: the two are never in memory together. A file of
equal records, one for each answer token, is read through a memory map, so that memory does not grow with the number of
questions. A run that is broken off goes on with the questions that are not answered yet.

Shapes: A answer tokens, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..clean_room.reference import greedy
from ..data.batches import Batch, make_batch
from ..data.resumable import ResumableLines
from ..data.samples import Sample
from ..models.answers import with_answers
from ..progress import Progress

ANSWERS, PLACES = "answers.bin", "answers.jsonl"


@dataclass(frozen=True)
class TeacherTargets:
    """The distributions to learn at the tokens of a few answers."""

    tokens: tuple[Tensor, ...]  # [A] of each question, up to and with the end token
    ids: Tensor  # [A of all, K] the likeliest tokens
    log_p: Tensor  # [A of all, K] their log-probabilities

    def part(self, places: range) -> TeacherTargets:
        """Return those of the answers at some places, which follow each other."""
        begin = sum(map(len, self.tokens[: places.start]))
        tokens = self.tokens[places.start : places.stop]
        rows = slice(begin, begin + sum(map(len, tokens)))
        return TeacherTargets(tokens, self.ids[rows], self.log_p[rows])

    def to(self, device: Any) -> TeacherTargets:
        return TeacherTargets(self.tokens, self.ids.to(device), self.log_p.to(device))


def record_type(top: int) -> np.dtype:
    """Return the layout of one answer token on disk: 8 bytes for each of the likeliest tokens, and 4."""
    return np.dtype([("token", "<i4"), ("ids", "<i4", (top,)), ("log_p", "<f4", (top,))])


class AnswerStore:
    """The original's answers to numbered questions, on disk; of several processes the first has them, and tells.

    Args:
        folder: where the two files lie.
        fingerprint: of everything that the answers depend on; those of another one are not used.
        top: K.
    """

    def __init__(self, folder: Path, fingerprint: str, top: int) -> None:
        self.path, self.fingerprint, self.type = folder / ANSWERS, fingerprint, record_type(top)
        self._spans: dict[int, tuple[int, int]] = {}
        if ranks.is_first():
            self._open(folder)

    def _open(self, folder: Path) -> None:
        self._lines = ResumableLines(folder / PLACES, {"start": int, "length": int}, "span of an answer")
        self._spans = {
            number: (entry["start"], entry["length"]) for number, entry in self._lines.entries(self.fingerprint).items()
        }
        size = self.path.stat().st_size if self.path.exists() else 0
        whole = size // self.type.itemsize
        if any(start + length > whole for start, length in self._spans.values()):
            self._spans = {}  # the two files are not of one run
        if size != whole * self.type.itemsize:
            os.truncate(self.path, whole * self.type.itemsize)

    def missing(self, number: int) -> list[int]:
        """Return which of the first `number` questions have no answer here."""
        return ranks.from_first(lambda: [index for index in range(number) if index not in self._spans])

    def add(self, indices: Sequence[int], answers: Sequence[Tensor], ids: Tensor, log_p: Tensor) -> None:
        """Append answers [A] each, with the likeliest tokens [A of all, K] and their log-probabilities."""
        if not ranks.is_first():
            return
        lengths = [len(answer) for answer in answers]
        records = np.empty(sum(lengths), self.type)
        records["token"] = torch.cat(list(answers)).cpu().numpy()
        records["ids"], records["log_p"] = ids.cpu().numpy(), log_p.float().cpu().numpy()
        with self.path.open("ab") as file:
            start = file.tell() // self.type.itemsize
            file.write(records.tobytes())
        spans: dict[int, dict[str, Any]] = {}
        for index, length in zip(indices, lengths, strict=True):
            spans[index] = {"start": start, "length": length}
            self._spans[index] = (start, length)
            start += length
        self._lines.add(self.fingerprint, spans)

    def targets(self, indices: Sequence[int]) -> TeacherTargets:
        """Read what the original says to some of the questions."""
        return ranks.from_first(lambda: self._read(indices))

    def _read(self, indices: Sequence[int]) -> TeacherTargets:
        kept = np.memmap(self.path, self.type, "r")
        parts = [kept[start : start + length] for start, length in (self._spans[index] for index in indices)]
        tokens = tuple(torch.from_numpy(part["token"].astype(np.int64)) for part in parts)
        joined = np.concatenate(parts)
        return TeacherTargets(
            tokens, torch.from_numpy(joined["ids"].astype(np.int64)), torch.from_numpy(joined["log_p"].copy())
        )

    @property
    def tokens(self) -> int:
        """Return how many answer tokens there are."""
        return ranks.from_first(lambda: sum(length for _, length in self._spans.values()))


def store_answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    store: AnswerStore,
    batch_size: int,
    answer_tokens: int,
    progress: Progress,
) -> None:
    """Let the original answer every question that the store has no answer to, greedily; processes share the batches."""
    missing = sorted(store.missing(len(samples)), key=lambda index: samples[index].pixels)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    top = store.type["ids"].shape[0]

    def answers_to(indices: list[int]) -> tuple[list[int], list[Tensor], Tensor, Tensor]:
        batch = make_batch([samples[index] for index in indices], processor, model.config)
        return indices, *teacher_outputs(model, batch, answer_tokens, top)

    mine = ranks.share(batches)
    for answers in ranks.in_order(map(answers_to, progress(mine, "ask the original", len(mine)))):
        store.add(*answers)


def teacher_outputs(model: Any, batch: Batch, answer_tokens: int, top: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Let a model answer. Return answers [A] each, up to and with their end tokens, and the likeliest tokens there.

    The distributions are those that the answers come from: they cost no pass of their own.
    Returns: answers; ids and log-probabilities, [A of all, K] each.
    """
    batch, seen = batch.to(model.device), LikeliestTokens(top)
    with torch.inference_mode(), greedy(model, max_new_tokens=answer_tokens) as settings:
        generated = model.generate(**batch.inputs, generation_config=settings, logits_processor=[seen])
    length = batch.inputs["input_ids"].shape[1]
    answered = with_answers(model, batch, generated[:, length:])
    real = answered.predicts[:, length - 1 : -1].cpu()  # [B, A of the longest]
    answers = list(torch.split(answered.targets.cpu(), real.sum(1).tolist()))
    ids, log_p = (torch.stack(steps, 1)[real] for steps in (seen.ids, seen.log_p))
    return answers, ids, log_p


class LikeliestTokens:
    """A logits processor that changes nothing and keeps the likeliest tokens of every step.

    `generate` itself would keep whole distributions, which are large.
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self.ids: list[Tensor] = []  # [B, K] each
        self.log_p: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        likeliest = scores.float().log_softmax(-1).topk(self.top)
        self.ids.append(likeliest.indices.cpu())
        self.log_p.append(likeliest.values.cpu())
        return scores
