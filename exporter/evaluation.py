"""How good is a checkpoint: exact match of greedy answers on a task, and fidelity to the model it was made from.

Shapes: B samples, S prompt tokens, A answer tokens, N answer tokens of a batch, D hidden size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checkpoint
from .calibration import Batch, Sample, load_calibration, make_batch
from .clean_room import load_processor
from .errors import InputError
from .fidelity import AnsweredBatch, with_answers
from .recipe import RunOptions
from .scoring import PairedTest, Rate, is_right, mcnemar
from .source import Source, compute_dtype, load_model, open_source, pick_device

SPARE_TOKENS = 8  # beyond the longest right answer, so that one that goes on too long is seen to be wrong
Row = dict[str, Any]  # what is known of one answer: answer, correct, and where there is a reference: kl, same, tokens


@dataclass(frozen=True)
class ModelResult:
    """One model on one task."""

    path: str
    budget: dict[str, Any] | None
    n: int
    accuracy: float
    interval: tuple[float, float]
    by_type: dict[str, Rate]
    kl: float | None  # mean KL(reference || model) per answer token of the reference, nats
    agreement: float | None  # share of those tokens that the model ranks first too
    tokens: int  # answer tokens that kl and agreement are means over
    no_kl_because: str | None
    parameters: int
    bytes: int
    seconds: float  # of answering, without loading
    correct: tuple[bool, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    task: str
    fingerprint: str
    models: tuple[ModelResult, ...]
    reference: str | None
    pairs: tuple[PairedTest, ...]

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


# --- the verb ---------------------------------------------------------------------------------------------------------


def evaluate(
    paths: Sequence[str | Path],
    task: str | Path,
    *,
    reference: str | Path | None = None,
    options: RunOptions = RunOptions(batch_size=32),
    samples: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    predictions: Path | None = None,
    update_cards: bool = True,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> Evaluation:
    """Exact match of every checkpoint on a task, and its fidelity to the reference.

    Args:
        reference: the model that the checkpoints were made from; it is evaluated too, and first.
        samples: how many of the task's questions, seeded; None: all.
        predictions: JSONL file that keeps every answer; a run that is broken off and repeated goes on from it.
        update_cards: put the figures into the record and the card of checkpoints that are ours.
    Raises: InputError for a task without answers, images that can't be read, folders that are no checkpoints.
    """
    questions = load_task(str(task), samples, seed)
    ledger = Ledger(predictions, questions.fingerprint)
    names = [str(path) for path in ([] if reference is None else [reference]) + list(paths)]
    for name in names:
        open_source(name)  # all that is wrong with any of them, before hours are spent on the first
    says: Reference | None = None
    results = []
    for name in dict.fromkeys(names):
        loaded = load(name, options)
        judge = Judge(loaded, questions, options.batch_size, max_new_tokens or questions.longest(loaded.processor))
        if reference is not None and name == str(reference):
            says = judge.remember = Reference.of(loaded)
        elif says is not None:
            judge.compare_with(says)
        results.append(judge.run(ledger, progress))
        del loaded, judge
    pairs = [
        PairedTest(a.path, b.path, *mcnemar(a.correct, b.correct))
        for i, a in enumerate(results)
        for b in results[i + 1 :]
    ]
    done = Evaluation(
        Path(str(task)).name,
        questions.fingerprint,
        tuple(results),
        None if reference is None else str(reference),
        tuple(pairs),
    )
    if update_cards:
        for path in paths:
            record_evaluation(Path(path), done)
    return done


@dataclass(frozen=True)
class Task:
    """Questions with answers."""

    samples: tuple[Sample, ...]
    fingerprint: str

    def longest(self, processor: Any) -> int:
        """Tokens that an answer may take."""
        encode = processor.tokenizer.encode
        lengths = [len(encode(a, add_special_tokens=False)) for sample in self.samples for a in sample.answers]
        return max(lengths) + SPARE_TOKENS


def load_task(task: str, samples: int | None, seed: int) -> Task:
    data = load_calibration(task, samples=samples, seed=seed)
    unlabelled = [sample for sample in data.samples if not sample.answers]
    if unlabelled:
        raise InputError(
            f"{unlabelled[0].origin} has no 'answer' ({len(unlabelled)} of {len(data.samples)} have none): a task "
            "needs one on every line."
        )
    return Task(data.samples, data.fingerprint)


# --- one model --------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A checkpoint ready to answer."""

    path: str
    source: Source
    model: Any
    processor: Any

    def answer_states(self, one: AnsweredBatch) -> Tensor:
        """Last hidden states at the positions that predict answer tokens, [N, D]."""
        with torch.inference_mode():
            return self.model.base_model(**one.batch.inputs, use_cache=False).last_hidden_state[one.predicts]


def load(path: str, options: RunOptions) -> Loaded:
    device = pick_device(options.device)
    source = open_source(path)
    model, _ = load_model(source, device, compute_dtype(options.dtype, source.config, device), options.memory)
    return Loaded(path, source, model, load_processor(source.folder))


@dataclass
class Reference:
    """What the reference said and the states behind it: with its head they give its distributions exactly.

    Keeping [A, D] states and one head takes a fraction of what distributions over the vocabulary would.
    """

    vocabulary: dict[str, int]
    head: Tensor  # [vocabulary, D]
    bias: Tensor  # [vocabulary]
    answers: dict[int, Tensor] = field(default_factory=dict)  # sample index -> [A] tokens up to and with the end
    states: dict[int, Tensor] = field(default_factory=dict)  # sample index -> [A, D]

    @classmethod
    def of(cls, loaded: Loaded) -> Reference:
        head = loaded.model.get_output_embeddings()
        probe = torch.eye(head.in_features, dtype=loaded.model.dtype, device=loaded.model.device)
        with torch.inference_mode():  # by what it puts out, since its own tensors may lie on disk
            bias = head(torch.zeros_like(probe[:1])).float().cpu()[0]
            weight = head(probe).float().cpu().T - bias[:, None]
        return cls(loaded.processor.tokenizer.get_vocab(), weight, bias)

    def add(self, loaded: Loaded, batch: Batch, answers: Tensor, indices: Sequence[int]) -> None:
        one = with_answers(loaded.model, batch, answers)
        lengths = one.predicts.sum(1).tolist()
        states = loaded.answer_states(one).split(lengths)
        for index, tokens, state in zip(indices, one.targets.split(lengths), states, strict=True):
            self.answers[index], self.states[index] = tokens.cpu(), state.float().cpu()

    def compare(self, loaded: Loaded, batch: Batch, indices: Sequence[int]) -> list[Row]:
        """For each sample: summed KL(reference || model), answer tokens that both rank first, answer tokens."""
        said = [self.answers[i] for i in indices]
        lengths = [len(tokens) for tokens in said]
        padded = torch.nn.utils.rnn.pad_sequence(said, batch_first=True).to(batch.is_visual.device)  # [B, A]
        real = torch.arange(padded.shape[1])[None] < torch.tensor(lengths)[:, None]
        one = with_answers(loaded.model, batch, padded, real.to(padded.device))
        with torch.inference_mode():
            own = loaded.model.get_output_embeddings()(loaded.answer_states(one)).float().cpu().log_softmax(-1)
        rows = []
        for index, log_q in zip(indices, own.split(lengths), strict=True):
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

    def run(self, ledger: Ledger, progress: Callable[..., Iterable[Any]]) -> ModelResult:
        begin = time.monotonic()
        rows = ledger.rows(self.loaded.source)
        todo = [i for i in range(len(self.task.samples)) if self._is_open(rows.get(i))]
        samples = self.task.samples
        todo.sort(key=lambda i: (len(samples[i].messages[-1]["content"]), str(samples[i].images)))  # less padding
        batches = [todo[i : i + self.batch_size] for i in range(0, len(todo), self.batch_size)]
        for indices in progress(batches, f"evaluate {Path(self.loaded.path).name}", len(batches)):
            fresh = dict(zip(indices, self._batch(indices), strict=True))
            rows |= fresh
            ledger.write(self.loaded.source, fresh)
        return self._result(rows, time.monotonic() - begin)

    def _is_open(self, row: Row | None) -> bool:
        return row is None or self.remember is not None or (self.against is not None and "kl" not in row)

    def _batch(self, indices: Sequence[int]) -> list[Row]:
        loaded, samples = self.loaded, [self.task.samples[i] for i in indices]
        batch = make_batch(samples, loaded.processor, loaded.model.config).to(loaded.model.device)
        answers = greedy_answers(loaded.model, batch, self.max_new_tokens)
        said = loaded.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        rows = [
            {"answer": text.strip(), "correct": is_right(text, sample.answers, sample.choices)}
            for text, sample in zip(said, samples, strict=True)
        ]
        if self.remember is not None:
            self.remember.add(loaded, batch, answers, indices)
        if self.against is not None:
            compared = self.against.compare(loaded, batch, indices)
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
        return ModelResult(
            path=self.loaded.path,
            budget=None,
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
            correct=correct,
            answers=tuple(row["answer"] for row in ordered),
        )


def greedy_answers(model: Any, batch: Batch, max_new_tokens: int) -> Tensor:
    """Greedy answers [B, A], whatever sampling the generation config asks for."""
    made = model.generate(
        **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0
    )
    return made[:, batch.inputs["input_ids"].shape[1] :]


# --- files ------------------------------------------------------------------------------------------------------------


class Ledger:
    """Answers on disk, appended batch by batch, so that a broken-off run loses one batch at most."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.known: dict[str, dict[int, Row]] = {}
        if path is None:
            return
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path.absolute().parent} is no folder: {path.name} can't be written there.")
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            try:
                row = json.loads(line)
                task, model, index = row.pop("task"), row.pop("model"), row.pop("index")
            except (ValueError, KeyError, AttributeError) as error:
                raise InputError(f"{path} line {number} is no answer of an evaluation: name another file.") from error
            if task == fingerprint:
                self.known.setdefault(model, {})[index] = row

    def rows(self, source: Source) -> dict[int, Row]:
        return dict(self.known.get(self._key(source), {}))

    def write(self, source: Source, rows: dict[int, Row]) -> None:
        if self.path is None:
            return
        head = {"task": self.fingerprint, "model": self._key(source)}
        text = "".join(json.dumps(head | {"index": i} | row) + "\n" for i, row in rows.items())
        with self.path.open("a") as file:
            file.write(text)

    @staticmethod
    def _key(source: Source) -> str:
        stats = [shard.path.stat() for shard in source.weights.shards]
        return f"{source.name}:{sum(s.st_size for s in stats)}:{max(s.st_mtime_ns for s in stats)}"


def record_evaluation(folder: Path, done: Evaluation) -> bool:
    """Put a checkpoint's figures into its record and its card, replacing those of the same task. False: not ours."""
    if not (folder / checkpoint.RECORD).exists():
        return False
    from .model_card import card

    record = checkpoint.read_record(folder)
    mine = next(model for model in done.models if Path(model.path) == folder)
    base = next((model for model in done.models if model.path == done.reference), None)
    entry = {"task": done.task, "fingerprint": done.fingerprint} | figures(mine)
    entry["reference"] = None if base is None else figures(base)
    others = [e for e in record["evaluations"] if e["fingerprint"] != done.fingerprint]
    checkpoint.write_record(folder, record | {"evaluations": [*others, entry]})
    card(folder)
    return True


def figures(result: ModelResult) -> dict[str, Any]:
    """What a card tells of a result: not the path, not the answers."""
    data = asdict(result)
    return {key: data[key] for key in ("n", "accuracy", "interval", "by_type", "kl", "agreement", "tokens")}
