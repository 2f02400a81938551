"""How good is a checkpoint: exact match of greedy answers on a task, and fidelity to the model it was made from.

Shapes: B samples, S prompt tokens, A answer tokens, N answer tokens of a batch, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checkpoint
from .budgets import Ask, Flops, Wanted, few_prompts, flops_of
from .calibration import Batch, by_size, check_prompt, load_calibration, make_batch, make_batches
from .card_file import results_first
from .chats import text_of
from .clean_room import load_processor
from .errors import InputError
from .fidelity import AnsweredBatch, with_answers
from .modeling.modeling_routed import Budget, Route
from .recipe import DEFAULT_SAMPLES, RunOptions
from .resumable import ResumableLines, files_key
from .route_pictures import show_routes
from .routing import load_routed
from .rules import block_influences, make_route
from .scoring import PairedTest, Rate, describe, is_right, mcnemar
from .source import Source, compute_dtype, load_model, open_source, pick_device
from .task import Task, greedy_answers, load_task

logger = logging.getLogger(__name__)
Row = dict[str, Any]  # what is known of one answer: answer, correct, and where there is a reference: kl, same, tokens


@dataclass(frozen=True)
class ModelResult:
    """One model on one task."""

    path: str
    budget: dict[str, Any] | None  # of a routed model: `Ask.to_data`; None: the model as it is
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
    flops_share: float | None  # of the unrouted model's prompts, all of it, and below its decoder alone
    decoder_flops_share: float | None
    correct: tuple[bool, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)

    @property
    def label(self) -> str:
        return self.path if self.budget is None else f"{self.path} ({describe(self.budget)})"


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
    paths: str | Path | Sequence[str | Path],
    task: str | Path,
    *,
    reference: str | Path | None = None,
    budgets: Wanted = Wanted(),
    calibration: str | Path | None = None,
    options: RunOptions = RunOptions(batch_size=32),
    samples: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    allow_urls: bool = False,
    max_new_tokens: int | None = None,
    predictions: str | Path | None = None,
    update_cards: bool = True,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> Evaluation:
    """Exact match of every checkpoint on a task, and its fidelity to the reference.

    Args:
        reference: the model that the checkpoints were made from; it is evaluated too, and first, as it is.
        budgets: under which routed checkpoints run, one after the other; none: as plain models.
        calibration: questions for rules that measure layers.
        samples: how many of the task's questions, seeded; None: all.
        columns, split, config, allow_urls: of the task, as `load_calibration` takes them.
        predictions: JSONL file that keeps every answer; a run that is broken off and repeated goes on from it.
        update_cards: put the figures into the record and the card of checkpoints that are ours.
    Raises: InputError for a task without answers, images that can't be read, folders that are no checkpoints.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    calibration = None if calibration is None else str(calibration)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: at least 1 is needed.")
    questions = load_task(str(task), samples, seed, columns=columns, split=split, config=config, allow_urls=allow_urls)
    kept = ResumableLines(None if predictions is None else Path(predictions), ROW_FIELDS, "answer of an evaluation")
    names = [str(path) for path in ([] if reference is None else [reference]) + list(paths)]
    asked: dict[str, list[Ask | None]] = {name: [] for name in names}
    if reference is not None:
        open_source(names[0])
        asked[names[0]].append(None)
    for name in map(str, paths):  # all that is wrong with any of them, before hours are spent on the first
        asked[name] += [ask for ask in budgets.of(open_source(name)) if ask not in asked[name]]
        if update_cards:
            checkpoint.check_updatable(Path(name))
    says: Reference | None = None
    results = []
    for name, asks in asked.items():
        loaded = load(name, options, asks, questions, calibration)
        for ask in asks:
            longest = max_new_tokens or questions.longest(loaded.processor)
            judge = Judge(replace(loaded, ask=ask, seed=seed), questions, options.batch_size, longest)
            if reference is not None and name == str(reference) and ask is None:
                says = judge.remember = Reference.of(loaded, files_key(loaded.source))
            elif says is not None:
                judge.compare_with(says)
            results.append(judge.run(kept, progress))
        if update_cards and (budget := tightest(asks, results[-len(asks) :])):
            with results_first(loaded.source.folder):
                show_routes(loaded.source.folder, loaded.model, loaded.processor, questions.samples, budget)
        del loaded, judge
    pairs = [
        PairedTest(a.label, b.label, *mcnemar(a.correct, b.correct))
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
            with results_first(Path(path)):
                record_evaluation(Path(path), done)
    return done


def tightest(asks: Sequence[Ask | None], results: Sequence[ModelResult]) -> Budget | None:
    """The budget under which a router chose and least ran: its routes have the most to show."""
    chosen = [
        (result.decoder_flops_share or 1.0, ask.budget)
        for ask, result in zip(asks, results, strict=True)
        if ask is not None and ask.natural
    ]
    return min(chosen, key=lambda pair: pair[0])[1] if chosen else None


# --- one model --------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A checkpoint ready to answer, under a budget if it is routed."""

    path: str
    source: Source
    model: Any
    processor: Any
    prompts: Sequence[Batch] = ()  # a few, to count what they cost
    unrouted: Flops = field(default_factory=Flops)  # what they cost without a budget
    influence: Tensor | None = None  # of layers, for the rule that needs it
    seed: int = 0
    ask: Ask | None = None

    @property
    def influence_key(self) -> list[float] | None:
        """The influence of layers, as a fingerprint takes it."""
        return None if self.influence is None else self.influence.tolist()

    def route(self, batch: Batch) -> Route | None:
        """The route of questions, None for the model as it is."""
        if self.ask is None:
            return None
        return make_route(self.model, batch, self.ask.budget, self.ask.rule, seed=self.seed, influence=self.influence)

    def answer_logits(self, one: AnsweredBatch, route: Route | None) -> Tensor:
        """At the positions that predict answer tokens, [N, vocabulary]; `route` is that of the questions."""
        with torch.inference_mode():
            if route is None:
                return self.model.get_output_embeddings()(self.answer_states(one))
            last = one.predicts.shape[1] - route.keep.shape[1] + 1  # the prompt's last token and the answer
            made = self.model(**one.batch.inputs, route=route, use_cache=False, logits_to_keep=last)
            return made.logits[one.predicts[:, -last:]]

    def flops_shares(self) -> tuple[float, float] | tuple[None, None]:
        """FLOPs of prompts as shares of those of the unrouted model: all of it, its decoder."""
        if self.ask is None:
            return None, None
        own = flops_of(self.model, self.prompts, self.ask, seed=self.seed, influence=self.influence)
        return own.total / self.unrouted.total, own.decoder / self.unrouted.decoder

    def answer_states(self, one: AnsweredBatch) -> Tensor:
        """Last hidden states at the positions that predict answer tokens, [N, D]."""
        with torch.inference_mode():
            return self.model.base_model(**one.batch.inputs, use_cache=False).last_hidden_state[one.predicts]


def load(
    path: str,
    options: RunOptions,
    asks: Sequence[Ask | None] = (None,),
    task: Task | None = None,
    calibration: str | None = None,
) -> Loaded:
    """The stock model; the routed one if it is asked to run under a budget."""
    device = pick_device(options.device)
    source = open_source(path)
    dtype = compute_dtype(options.dtype, source.config, device)
    processor = load_processor(source.folder)
    if task is not None:
        check_prompt(task.samples, processor, source.config)
    if not any(asks):
        return Loaded(path, source, load_model(source, device, dtype, options.memory)[0], processor)
    model = load_routed(source, device, dtype, options.memory)
    loaded = Loaded(path, source, model, processor)
    if task is not None:
        loaded.prompts = few_prompts(task.samples, processor, model.config)
        loaded.unrouted = flops_of(model, loaded.prompts, None)
    if any(ask is not None and ask.rule.layers == "shortgpt" for ask in asks):
        if calibration is None:
            raise InputError("the rule 'shortgpt' measures layers on questions: give --calibration FILE.")
        loaded.influence = influence_of(loaded, calibration, options.batch_size)
    return loaded


def influence_of(loaded: Loaded, calibration: str, batch_size: int) -> Tensor:
    """Block influence of the layers, [L], on a few calibration questions."""
    chosen = by_size(load_calibration(calibration, samples=DEFAULT_SAMPLES).samples)
    return block_influences(loaded.model, make_batches(chosen, loaded.processor, loaded.model.config, batch_size))


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
        one = with_answers(loaded.model, batch, answers)
        lengths = one.predicts.sum(1).tolist()
        states = loaded.answer_states(one).split(lengths)
        for index, tokens, state in zip(indices, one.targets.split(lengths), states, strict=True):
            self.answers[index], self.states[index] = tokens.cpu(), state.float().cpu()

    def compare(self, loaded: Loaded, batch: Batch, indices: Sequence[int], route: Route | None = None) -> list[Row]:
        """For each sample: summed KL(reference || model), answer tokens that both rank first, answer tokens."""
        said = [self.answers[i] for i in indices]
        lengths = [len(tokens) for tokens in said]
        padded = torch.nn.utils.rnn.pad_sequence(said, batch_first=True).to(batch.is_visual.device)  # [B, A]
        real = torch.arange(padded.shape[1])[None] < torch.tensor(lengths)[:, None]
        one = with_answers(loaded.model, batch, padded, real.to(padded.device))
        own = loaded.answer_logits(one, route).float().cpu().log_softmax(-1)
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
        said = loaded.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        rows = [
            {"answer": text.strip(), "correct": is_right(text, sample.answers, sample.choices)}
            for text, sample in zip(said, samples, strict=True)
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


# --- files ------------------------------------------------------------------------------------------------------------


ROW_FIELDS = {"answer": str, "correct": bool}  # of a line of --predictions, beside what a reference adds


def run_fingerprint(judge: Judge, device: str) -> str:
    """SHA-256 over everything that a row depends on: weights, prompt, answers, budget, precision, reference."""
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


def record_evaluation(folder: Path, done: Evaluation) -> bool:
    """Put a checkpoint's figures into its record and its card, replacing those of the same task and budget.

    Returns: False for a folder that is not ours.
    """
    if not (folder / checkpoint.RECORD).exists():
        return False
    from .model_card import card, model_name

    record = checkpoint.read_record(folder)
    base = next((model for model in done.models if model.path == done.reference and model.budget is None), None)
    head = {"task": done.task, "fingerprint": done.fingerprint}
    name = None if done.reference is None else model_name(done.reference)
    tail = {"reference": None if base is None else figures(base), "reference_name": name}
    entries = [head | figures(model) | tail for model in done.models if Path(model.path) == folder]
    new = [(done.fingerprint, entry["budget"]) for entry in entries]
    others = [
        e
        for e in record["evaluations"]
        if (e["fingerprint"], e.get("budget")) not in new or e.get("reference_name", name) not in (None, name)
    ]
    checkpoint.write_record(folder, record | {"evaluations": [*others, *entries]})
    card(folder)
    return True


def figures(result: ModelResult) -> dict[str, Any]:
    """What a card tells of a result: not the path, not the answers."""
    data = asdict(result)
    keys = ("budget", "n", "accuracy", "interval", "by_type", "kl", "agreement", "tokens", "flops_share",
            "decoder_flops_share")  # fmt: skip
    return {key: data[key] for key in keys}
