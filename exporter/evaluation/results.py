"""The results of an evaluation, and their way into a checkpoint's record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cards.figures import describe
from ..checkpoints.record import RECORD, read_record, write_record
from ..data.samples import Sample
from ..data.task import Task
from ..data.uses import TaskUses, used_data
from .metrics.judged import Ratings
from .metrics.table import DEFAULT_METRIC, METRICS
from .scoring import PairedTest, Rate, TaskResult


@dataclass(frozen=True)
class ModelResult:
    """One model on one task."""

    path: str
    budget: dict[str, Any] | None  # of a routed model: `BudgetRequest.to_data`; None: the model as it is
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
    metric: str = "exact"
    figures: dict[str, float] = field(default_factory=dict)  # what the metric tells beside its mean
    trials: tuple[float, ...] = field(default=(), repr=False)  # what accuracy is the mean of: questions, or groups
    no_figures_because: str | None = None  # why a judge's ratings are missing
    kept: dict[int, list[str]] = field(default_factory=dict, repr=False)  # tokens of questions that a report shows
    answers_kept: float | None = None  # under a quality asked for: share of the answers that are those without a budget

    def rated(self, ratings: Ratings, task: Task) -> ModelResult:
        """Return the same with what a judge said of the answers."""
        values = ratings.values()
        result = TaskResult.of([sample.type for sample in task.samples], values)
        return replace(
            self,
            accuracy=result.rate.accuracy,
            interval=result.rate.interval,
            by_type=result.by_type,
            correct=tuple(bool(pair) and pair[1] >= pair[0] for pair in ratings.pairs),
            figures=ratings.figures(task.samples),
            trials=values,
            no_figures_because=ratings.silent,
        )

    @property
    def label(self) -> str:
        return self.path if self.budget is None else f"{self.path} ({describe(self.budget)})"


def with_answers_kept(results: Sequence[ModelResult]) -> list[ModelResult]:
    """Return one folder's results with the share of answers that each quality asked for has kept."""
    whole = next((result for result in results if result.budget is None), None)
    if whole is None:
        return list(results)
    kept = []
    for result in results:
        if result.budget is not None and result.budget.get("quality"):
            same = [mine == its for mine, its in zip(result.answers, whole.answers, strict=True)]
            result = replace(result, answers_kept=sum(same) / len(same))
        kept.append(result)
    return kept


@dataclass(frozen=True)
class Shown:
    """Which questions a report shows."""

    numbers: tuple[int, ...]
    samples: tuple[Sample, ...]  # all of the task
    processor: Any  # of the first model

    @classmethod
    def spread(cls, most: int, samples: tuple[Sample, ...], processor: Any = None) -> Shown:
        """Return at most so many questions, evenly spread over the task."""
        count = min(most, len(samples))
        return cls(tuple(number * len(samples) // count for number in range(count)), samples, processor)


@dataclass(frozen=True)
class Evaluation:
    task: str
    fingerprint: str
    models: tuple[ModelResult, ...]
    reference: str | None
    pairs: tuple[PairedTest, ...]
    shown: Shown | None = field(default=None, repr=False)
    uses: TaskUses | None = None  # of a task that is kept for a last test: those before this one

    @property
    def base(self) -> ModelResult | None:
        """Return the result of the reference as it is, None where there is no reference."""
        return next((model for model in self.models if model.path == self.reference and model.budget is None), None)

    @property
    def metric(self) -> str:
        return self.models[0].metric

    @property
    def metric_in_brackets(self) -> str:
        """Return the metric as it stands behind the task's name, nothing for exact match."""
        return "" if self.metric == DEFAULT_METRIC else f" ({METRICS[self.metric].title})"

    def to_data(self) -> dict[str, Any]:
        data = asdict(replace(self, shown=None, uses=None))
        for model in data["models"]:
            del model["kept"]
        del data["shown"], data["uses"]
        return data | {"metric_title": METRICS[self.metric].title} | used_data(self.uses)


def record_evaluation(folder: Path, done: Evaluation) -> bool:
    """Put a checkpoint's figures into its record and its card, replacing those of the same task and budget.

    Returns: False for a folder that is not ours.
    """
    if not (folder / RECORD).exists():
        return False
    from ..cards.model_card import card, model_name

    record = read_record(folder).to_data()
    base = next((model for model in done.models if model.path == done.reference and model.budget is None), None)
    head = {"task": done.task + done.metric_in_brackets, "fingerprint": done.fingerprint}
    name = None if done.reference is None else model_name(done.reference)
    tail = {"reference": None if base is None else figures(base), "reference_name": name}
    entries = [head | figures(model) | tail for model in done.models if Path(model.path) == folder]
    new = [(done.fingerprint, entry["budget"], entry.get("metric")) for entry in entries]
    others = [
        e
        for e in record["evaluations"]
        if (e["fingerprint"], e.get("budget"), e.get("metric")) not in new
        or e.get("reference_name", name) not in (None, name)
    ]
    write_record(folder, record | {"evaluations": [*others, *entries]})
    card(folder)
    return True


def figures(result: ModelResult) -> dict[str, Any]:
    """Return what a card tells of a result: not the path, not the answers."""
    data = asdict(result)
    keys = ("budget", "n", "accuracy", "interval", "by_type", "kl", "agreement", "tokens", "flops_share",
            "decoder_flops_share", "answers_kept")  # fmt: skip
    told = {key: data[key] for key in keys}
    if result.metric == DEFAULT_METRIC:
        return told
    title = METRICS[result.metric].title
    return told | {"metric": result.metric, "metric_title": title, "figures": result.figures}
