"""One model under one budget, judged on a task."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import Batch, make_batch
from ..data.chats import text_of
from ..data.resumable import ResumableLines, files_key
from ..data.task import Task, greedy_answers
from ..modeling.routed_route import Route
from ..models.answers import with_answers
from .ledger import Row
from .loaded import Loaded
from .results import ModelResult
from .scoring import Rate, is_right


@dataclass
class Reference:
    """What the reference said and the states behind it: with its head they give its distributions exactly.

    Keeping [A, D] states and one head takes a fraction of what distributions over the vocabulary would.
    """

    vocabulary: dict[str, int]
    head: Tensor  # [vocabulary, D]
    bias: Tensor  # [vocabulary]
    key: str = ""  # of the folder's files
    answers: dict[int, Tensor] = field(default_factory=dict)  # sample index -> [A] tokens up to and with the end
    states: dict[int, Tensor] = field(default_factory=dict)  # sample index -> [A, D]

    @classmethod
    def of(cls, loaded: Loaded, key: str = "") -> Reference:
        head = loaded.model.get_output_embeddings()
        probe = torch.eye(head.in_features, dtype=loaded.model.dtype, device=loaded.model.device)
        with torch.inference_mode():  # by what it puts out, since its own tensors may lie on disk
            bias = head(torch.zeros_like(probe[:1])).float().cpu()[0]
            weight = head(probe).float().cpu().T - bias[:, None]
        return cls(loaded.processor.tokenizer.get_vocab(), weight, bias)

    def add(self, loaded: Loaded, batch: Batch, answers: Tensor, indices: Sequence[int]) -> None:
        answered_batch = with_answers(loaded.model, batch, answers)
        lengths = answered_batch.predicts.sum(1).tolist()
        states = torch.split(loaded.answer_states(answered_batch), lengths)
        for index, tokens, state in zip(indices, torch.split(answered_batch.targets, lengths), states, strict=True):
            self.answers[index], self.states[index] = tokens.cpu(), state.float().cpu()

    def compare(self, loaded: Loaded, batch: Batch, indices: Sequence[int], route: Route | None = None) -> list[Row]:
        """For each sample: summed KL(reference || model), answer tokens that both rank first, answer tokens."""
        answers = [self.answers[i] for i in indices]
        lengths = [len(tokens) for tokens in answers]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True).to(batch.is_visual.device)  # [B, A]
        real = torch.arange(padded.shape[1])[None] < torch.tensor(lengths)[:, None]
        answered_batch = with_answers(loaded.model, batch, padded, real.to(padded.device))
        all_log_q = loaded.answer_logits(answered_batch, route).float().cpu().log_softmax(-1)
        rows = []
        for index, log_q in zip(indices, torch.split(all_log_q, lengths), strict=True):
            log_p = F.linear(self.states[index], self.head, self.bias).log_softmax(-1)  # [A, vocabulary]
            kl = float((log_p.exp() * (log_p - log_q)).sum())
            same = int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            rows.append({"kl": max(kl, 0.0), "same": same, "tokens": len(log_q)})
        return rows


@dataclass
class Judge:
    """One model on one task."""

    loaded: Loaded
    task: Task
    batch_size: int
    max_new_tokens: int
    remember: Reference | None = None  # this model is the reference: keep what it says
    against: Reference | None = None  # compare this model with what the reference said
    no_kl_because: str | None = None

    def compare_with(self, reference: Reference) -> None:
        if self.loaded.processor.tokenizer.get_vocab() == reference.vocabulary:
            self.against = reference
        else:
            self.no_kl_because = "its tokenizer is not the reference's"

    def run(self, kept: ResumableLines, progress: Callable[..., Iterable[Any]]) -> ModelResult:
        begin = time.monotonic()
        fingerprint = run_fingerprint(self, str(self.loaded.model.device))
        rows = kept.rows(fingerprint)
        todo = [i for i in range(len(self.task.samples)) if self._is_open(rows.get(i))]
        samples = self.task.samples
        todo.sort(key=lambda i: (samples[i].pixels, len(text_of(samples[i].messages[-1]))))  # less padding
        batches = [todo[i : i + self.batch_size] for i in range(0, len(todo), self.batch_size)]
        name = Path(self.loaded.path).name + (f" ({self.loaded.ask})" if self.loaded.ask else "")
        for indices in progress(batches, f"evaluate {name}", len(batches)):
            fresh = dict(zip(indices, self._batch(indices), strict=True))
            rows |= fresh
            kept.add(fingerprint, fresh)
        return self._result(rows, time.monotonic() - begin)

    def _is_open(self, row: Row | None) -> bool:
        return row is None or self.remember is not None or (self.against is not None and "kl" not in row)

    def _batch(self, indices: Sequence[int]) -> list[Row]:
        loaded, samples = self.loaded, [self.task.samples[i] for i in indices]
        batch = make_batch(samples, loaded.processor, loaded.model.config).to(loaded.model.device)
        route = loaded.route(batch)
        answers = greedy_answers(loaded.model, batch, self.max_new_tokens, route)
        texts = loaded.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        rows = [
            {"answer": text.strip(), "correct": is_right(text, sample.answers, sample.choices)}
            for text, sample in zip(texts, samples, strict=True)
        ]
        if self.remember is not None:
            self.remember.add(loaded, batch, answers, indices)
        if self.against is not None:
            compared = self.against.compare(loaded, batch, indices, route)
            rows = [row | more for row, more in zip(rows, compared, strict=True)]
        return rows

    def _result(self, rows: dict[int, Row], seconds: float) -> ModelResult:
        ordered = [rows[i] for i in range(len(self.task.samples))]
        correct = tuple(row["correct"] for row in ordered)
        types: dict[str, list[bool]] = {}
        for sample, right in zip(self.task.samples, correct, strict=True):
            types.setdefault(sample.type or "all", []).append(right)
        tokens = sum(row.get("tokens", 0) for row in ordered)
        overall = Rate.of(correct)
        flops_share, decoder_flops_share = self.loaded.flops_shares()
        return ModelResult(
            path=self.loaded.path,
            budget=None if self.loaded.ask is None else self.loaded.ask.to_data(),
            n=overall.n,
            accuracy=overall.accuracy,
            interval=overall.interval,
            by_type={name: Rate.of(right) for name, right in sorted(types.items())},
            kl=sum(row["kl"] for row in ordered) / tokens if tokens else None,
            agreement=sum(row["same"] for row in ordered) / tokens if tokens else None,
            tokens=tokens,
            no_kl_because=self.no_kl_because,
            parameters=self.loaded.source.weights.num_parameters,
            bytes=self.loaded.source.weights.num_bytes,
            seconds=seconds,
            flops_share=flops_share,
            decoder_flops_share=decoder_flops_share,
            correct=correct,
            answers=tuple(row["answer"] for row in ordered),
        )


ROW_FIELDS = {"answer": str, "correct": bool}  # of a line of --predictions, beside what a reference adds


def run_fingerprint(judge: Judge, device: str) -> str:
    """Return SHA-256 over everything that a row depends on: weights, prompt, answers, budget, precision, reference."""
    import transformers

    loaded = judge.loaded
    parts = {
        "task": [judge.task.fingerprint, judge.task.answers_fingerprint],
        "model": files_key(loaded.source),
        "budget": None if loaded.ask is None else [loaded.ask.to_data(), loaded.seed, loaded.influence_key],
        "run": [str(loaded.model.dtype), device, judge.max_new_tokens],
        "reference": judge.remember is not None or (judge.against.key if judge.against else None),
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
