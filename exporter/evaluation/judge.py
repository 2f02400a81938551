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

from .. import ranks
from ..checkpoints.source import file_hashes
from ..clean_room import greedy_answers
from ..data.batches import Batch, make_batch
from ..data.chats import text_of
from ..data.given import ENDED, KEY, LAYERS, question_key
from ..data.resumable import Entry, ResumableLines, files_key
from ..data.samples import Sample
from ..data.task import Task
from ..errors import InputError
from ..modeling.routed_route import Route
from ..models.answers import end_ids, with_answers
from ..routing.pictures import image_grids
from .loaded import Loaded
from .metrics.metric import Metric, grouped
from .metrics.table import DEFAULT_METRIC, METRICS
from .results import ModelResult
from .scoring import Fidelity, TaskResult

Said = dict[int, tuple[Tensor, Tensor]]  # sample index -> [A] tokens up to and with the end, [A, D] states


@dataclass
class Reference:
    """The reference's answers and the states behind them: with its head they give its distributions exactly.

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

    @staticmethod
    def spoken(loaded: Loaded, batch: Batch, answers: Tensor, indices: Sequence[int]) -> Said:
        """Return what the reference has said in a batch, and the states behind it."""
        answered_batch = with_answers(loaded.model, batch, answers)
        lengths = answered_batch.predicts.sum(1).tolist()
        states = torch.split(loaded.answer_states(answered_batch).float().cpu(), lengths)
        tokens = torch.split(answered_batch.targets.cpu(), lengths)
        return {
            index: (some.clone(), state.clone()) for index, some, state in zip(indices, tokens, states, strict=True)
        }

    def take(self, spoken: Said) -> None:
        """Keep what the reference has said in a batch."""
        for index, (tokens, states) in spoken.items():
            self.answers[index], self.states[index] = tokens, states

    def compare(self, loaded: Loaded, batch: Batch, indices: Sequence[int], route: Route | None = None) -> list[Entry]:
        """Return for each sample the summed KL(reference || model), tokens that both rank first, and its tokens."""
        answers = [self.answers[i] for i in indices]
        lengths = [len(tokens) for tokens in answers]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True).to(batch.is_visual.device)  # [B, A]
        real = torch.arange(padded.shape[1])[None] < torch.tensor(lengths)[:, None]
        answered_batch = with_answers(loaded.model, batch, padded, real.to(padded.device))
        all_log_q = loaded.answer_logits(answered_batch, route).float().cpu().log_softmax(-1)
        entries = []
        for index, log_q in zip(indices, torch.split(all_log_q, lengths), strict=True):
            log_p = F.linear(self.states[index], self.head, self.bias).log_softmax(-1)  # [A, vocabulary]
            kl = float((log_p.exp() * (log_p - log_q)).sum())
            same = int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            entries.append({"kl": max(kl, 0.0), "same": same, "tokens": len(log_q)})
        return entries


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
    show: frozenset[int] = frozenset()  # questions of which a report shows the visual tokens that stay

    def compare_with(self, reference: Reference) -> None:
        if self.loaded.processor.tokenizer.get_vocab() == reference.vocabulary:
            self.against = reference
        else:
            self.no_kl_because = "its tokenizer is not the reference's"

    def run(self, kept: ResumableLines, progress: Callable[..., Iterable[Any]]) -> ModelResult:
        begin = time.monotonic()
        if ranks.world() > 1:
            ranks.same(self._like_the_others())
        fingerprint = run_fingerprint(self, str(self.loaded.model.device))
        entries = ranks.from_first(lambda: kept.entries(fingerprint))
        todo = [i for i in range(len(self.task.samples)) if self._is_open(i, entries.get(i))]
        samples = self.task.samples
        todo.sort(key=lambda i: (samples[i].pixels, len(text_of(samples[i].messages[-1]))))  # less padding
        kinds = [[i for i in todo if samples[i].kind == kind] for kind in sorted({samples[i].kind for i in todo})]
        size = self.batch_size
        batches = [kind[i : i + size] for kind in kinds for i in range(0, len(kind), size)]  # kinds apart
        name = Path(self.loaded.path).name + (f" ({self.loaded.request})" if self.loaded.request else "")
        mine = ranks.share(batches)
        for fresh, spoken in ranks.in_order(map(self._said, progress(mine, f"evaluate {name}", len(mine)))):
            entries |= fresh
            if self.remember is not None:
                self.remember.take(spoken)
            kept.add(fingerprint, fresh)
        return self._result(entries, time.monotonic() - begin)

    def _like_the_others(self) -> dict[str, object]:
        """Return what processes that share the questions must agree on, by names for a message."""
        loaded, task = self.loaded, self.task
        return {
            "the task": [task.fingerprint, task.answers_fingerprint, task.metric],
            "the source": file_hashes(loaded.source),
            "the budget": None if loaded.request is None else [loaded.request.to_data(), loaded.influence_key],
            "the reference": None if self.against is None else sorted(self.against.answers),
            "dtype, batch size, seed or length of answers": [
                str(loaded.model.dtype),
                self.batch_size,
                loaded.seed,
                self.max_new_tokens,
            ],
        }

    def _said(self, indices: Sequence[int]) -> tuple[dict[int, Entry], Said]:
        """Return the entries of a batch, and what a reference says in it: nothing where this is none."""
        spoken: Said = {}
        return dict(zip(indices, self._batch(indices, spoken), strict=True)), spoken

    def _is_open(self, index: int, entry: Entry | None) -> bool:
        if entry is not None and index in self.show and self.loaded.request is not None and "kept" not in entry:
            return True
        return entry is None or self.remember is not None or (self.against is not None and "kl" not in entry)

    def _batch(self, indices: Sequence[int], spoken: Said) -> list[Entry]:
        loaded, samples = self.loaded, [self.task.samples[i] for i in indices]
        batch = make_batch(samples, loaded.processor, loaded.model.config).to(loaded.model.device)
        route = loaded.route(batch)
        serving = loaded.serving_arguments(batch)
        answers = greedy_answers(loaded.model, batch.inputs, self.max_new_tokens, route=route, **serving)
        texts = loaded.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        metric, ends = METRICS[self.task.metric], end_ids(loaded.model)
        entries = [
            {
                "answer": text.strip(),
                "correct": metric.value(sample, text) >= HALF,
                "task": self.task.fingerprint[:16],
                KEY: question_key(sample),
                ENDED: not ends.isdisjoint(tokens),
                LAYERS: loaded.source.num_layers,
            }
            for text, sample, tokens in zip(texts, samples, answers.tolist(), strict=True)
        ]
        if route is not None:
            for number in [number for number, index in enumerate(indices) if index in self.show]:
                entries[number]["kept"] = first_grid(route, number)
        if self.remember is not None:
            spoken |= Reference.spoken(loaded, batch, answers, indices)
        if self.against is not None:
            compared = self.against.compare(loaded, batch, indices, route)
            entries = [entry | more for entry, more in zip(entries, compared, strict=True)]
        return entries

    def _result(self, entries: dict[int, Entry], seconds: float) -> ModelResult:
        ordered = [entries[i] for i in range(len(self.task.samples))]
        answers = tuple(entry["answer"] for entry in ordered)
        metric, samples = METRICS[self.task.metric], self.task.samples
        values = [metric.value(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        trials, firsts = trials_of(metric, samples, values)
        told = [entry for entry in ordered if "tokens" in entry]
        fidelity = Fidelity.of(*(sum(entry[name] for entry in told) for name in ("kl", "same", "tokens")))
        result = TaskResult.of([sample.type for sample in firsts], trials, fidelity)
        flops_share, decoder_flops_share = self.loaded.flops_shares()
        return ModelResult(
            path=self.loaded.path,
            budget=None if self.loaded.request is None else self.loaded.request.to_data(),
            n=result.rate.n,
            accuracy=result.rate.accuracy,
            interval=result.rate.interval,
            by_type=result.by_type,
            kl=fidelity.kl if fidelity else None,
            agreement=fidelity.agreement if fidelity else None,
            tokens=fidelity.tokens if fidelity else 0,
            no_kl_because=self.no_kl_because,
            parameters=self.loaded.source.weights.num_parameters,
            bytes=self.loaded.source.weights.num_bytes,
            seconds=seconds,
            flops_share=flops_share,
            decoder_flops_share=decoder_flops_share,
            correct=tuple(value >= HALF for value in values),
            answers=answers,
            metric=self.task.metric,
            figures=metric.figures(samples, answers),
            trials=tuple(trials),
            kept={i: entry["kept"] for i, entry in entries.items() if entry.get("kept") and i in self.show},
        )


def first_grid(route: Route, sequence: int) -> list[str]:
    """Return the visual tokens of a question's first image as rows of '1', one that stays, and '0'; [] for none."""
    grids = next(iter(image_grids(route, sequence)), []) if bool(route.visual[sequence].any()) else []
    return ["".join("1" if stays else "0" for stays in line) for line in grids[0].kept.tolist()] if grids else []


HALF = 0.5  # what an answer is worth from which it is called right, where values lie between


def trials_of(
    metric: Metric, samples: Sequence[Sample], values: Sequence[float]
) -> tuple[Sequence[float], Sequence[Sample]]:
    """Return what a metric's mean is over, and a question of each: the questions, or groups that count as one."""
    if not metric.as_one:
        return values, samples
    groups = grouped(metric, samples).values()
    return [min(values[n] for n in members) for members in groups], [samples[members[0]] for members in groups]


def check_same_task(kept: ResumableLines, task: Task) -> None:
    """Raise InputError where a file of answers holds those to another task."""
    entries = [entry for run in kept.fingerprints for entry in kept.entries(run).values()]
    if others := sum(entry.get("task", task.fingerprint[:16]) != task.fingerprint[:16] for entry in entries):
        raise InputError(
            f"{kept.path} holds {others} answers to another task (or to other questions of this one): name another "
            "file for --predictions."
        )


ROW_FIELDS = {"answer": str, "correct": bool}  # of a line of --predictions, beside what a reference adds


def run_fingerprint(judge: Judge, device: str) -> str:
    """Return SHA-256 over all that an entry depends on: weights, prompt, answers, budget, precision, reference."""
    import transformers

    loaded = judge.loaded
    parts = {
        "task": [judge.task.fingerprint, judge.task.answers_fingerprint],
        "model": files_key(loaded.source),
        "budget": None if loaded.request is None else [loaded.request.to_data(), loaded.seed, loaded.influence_key],
        "run": [str(loaded.model.dtype), device, judge.max_new_tokens],
        "reference": judge.remember is not None or (judge.against.key if judge.against else None),
        "versions": [torch.__version__, transformers.__version__],
    } | ({} if judge.task.metric == DEFAULT_METRIC else {"metric": judge.task.metric})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
