"""The results of an evaluation, and their way into a checkpoint's record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cards.figures import describe
from ..checkpoints.record import RECORD, read_record, write_record
from .scoring import PairedTest, Rate


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


def record_evaluation(folder: Path, done: Evaluation) -> bool:
    """Put a checkpoint's figures into its record and its card, replacing those of the same task and budget.

    Returns: False for a folder that is not ours.
    """
    if not (folder / RECORD).exists():
        return False
    from ..cards.model_card import card, model_name

    record = read_record(folder).to_data()
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
    write_record(folder, record | {"evaluations": [*others, *entries]})
    card(folder)
    return True


def figures(result: ModelResult) -> dict[str, Any]:
    """Return what a card tells of a result: not the path, not the answers."""
    data = asdict(result)
    keys = ("budget", "n", "accuracy", "interval", "by_type", "kl", "agreement", "tokens", "flops_share",
            "decoder_flops_share")  # fmt: skip
    return {key: data[key] for key in keys}
