"""The figures that `bench` measures, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CheckFailed, InputError
from .in_flight import LoadFigures
from .roofline import Roofline
from .subject import GenerateKwargs
from .workload import Workload

TIMED = ("vision_ms", "prefill_ms", "first_token_ms", "decode_ms", "total_ms")
COUNTED = ("flops", "vision_flops", "decode_flops", "kv_bytes", "weight_bytes", "step_bytes", "peak_bytes")


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a measurement.

    Args:
        batches: numbers of sequences, one after the other.
        new_tokens: decoding steps of each answer, after its first token.
        in_flight: numbers of requests that are always waiting or answered, one after the other; (): not measured.
        rounds: even, so that every model is as often early in a round as late.
    """

    device: str | None = None
    dtype: str = "auto"
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 32
    rounds: int = 10
    attention: str | None = None
    compile: bool = False
    in_flight: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InputError(f"batch sizes {list(self.batches)}: each must be 1 or more.")
        if any(count < 1 for count in self.in_flight):
            raise InputError(f"requests in flight {list(self.in_flight)}: each number must be 1 or more.")
        if self.new_tokens < 1:
            raise InputError(f"new_tokens={self.new_tokens}: at least 1 is needed.")
        if self.rounds < 2 or self.rounds % 2:
            raise InputError(
                f"rounds={self.rounds}: an even number from 2 up is needed, since every second round runs "
                "in the reverse order."
            )

    def to_data(self) -> dict[str, Any]:
        """Return what a record keeps: without requests in flight where none were, as records had it before."""
        data = asdict(self)
        return data if self.in_flight else {name: value for name, value in data.items() if name != "in_flight"}


@dataclass(frozen=True)
class Figures:
    """One model at one batch size. Times are medians over rounds, in milliseconds for the whole batch.

    vision: tower and projector, on pixels that the processor has made. prefill: from image features and token ids to
    the first answer token; in a routed model with its router. first_token: both. decode: one step, one token of each
    sequence. total: the whole answer. The processor's own work, on the CPU and the same for all models, is in none of
    them.
    """

    batch: int
    visual_tokens: int  # of all sequences
    text_tokens: int
    vision_ms: float
    prefill_ms: float
    first_token_ms: float
    decode_ms: float
    total_ms: float
    tokens_per_s: float  # answer tokens of all sequences in `total`
    flops: int | None  # of prefill
    vision_flops: int | None
    decode_flops: int | None
    kv_bytes: int | None
    kv_bytes_formula: int | None
    weight_bytes: int
    step_bytes: int | None
    peak_bytes: int | None  # weights, and what an answer takes beyond them
    ratio_to_reference: dict[str, Any] | None  # own / reference; None for the reference itself


@dataclass(frozen=True)
class ModelBenchmark:
    """One model under one budget."""

    path: str
    budget: GenerateKwargs | None
    runtime: str
    batches: tuple[Figures, ...]
    loads: tuple[LoadFigures, ...] = ()  # with requests in flight

    def to_data(self) -> dict[str, Any]:
        """Return the figures of the first batch size on top, those of all under 'batches'."""
        first = asdict(self.batches[0])
        return {"path": self.path, "budget": self.budget, "runtime": self.runtime} | first | {
            "batches": [asdict(figures) for figures in self.batches],
            "loads": [asdict(figures) for figures in self.loads],
        }  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    workload: Workload
    options: BenchOptions
    hardware: dict[str, Any]
    versions: dict[str, str]
    date: str
    models: tuple[ModelBenchmark, ...]  # the reference first
    roofline: Roofline | None = None  # None: it was not measured

    def check_caches(self) -> None:
        """Raise CheckFailed where a cache is not as large as configuration, prompt and route say."""
        for model in self.models:
            for batch in model.batches:
                if batch.kv_bytes != batch.kv_bytes_formula:
                    raise CheckFailed(
                        f"{model.path}: the cache holds {batch.kv_bytes:,} bytes at batch {batch.batch}, "
                        f"and should hold {batch.kv_bytes_formula:,}."
                    )

    def slower(self) -> list[str]:
        """Say of each model where its throughput is below the reference's, under equal conditions."""
        sentences = []
        for model in self.models[1:]:
            for batch in model.batches:
                ratio = batch.ratio_to_reference
                if ratio is not None and ratio["tokens_per_s"] < 1:
                    low, high = (1 / end for end in reversed(ratio["intervals"]["total_ms"]))
                    sentences.append(slower(model, f"at batch {batch.batch}", ratio["tokens_per_s"], (low, high)))
            for load in model.loads:
                if load.throughput_ratio is not None and load.throughput_ratio < 1 and load.throughput_interval:
                    where = f"with {load.in_flight} in flight"
                    sentences.append(slower(model, where, load.throughput_ratio, load.throughput_interval))
        return sentences

    def to_data(self) -> dict[str, Any]:
        return {
            "workload": self.workload.to_data(),
            "options": asdict(self.options),
            "hardware": self.hardware,
            "versions": self.versions,
            "date": self.date,
            "reference": self.models[0].path,
            "models": [model.to_data() for model in self.models],
            "roofline": None if self.roofline is None else self.roofline.to_data(),
            "slower": self.slower(),
        }


def slower(model: ModelBenchmark, where: str, ratio: float, interval: tuple[float, float]) -> str:
    """Say that a model's throughput is below the full model's, and whether that is beyond the error of measurement."""
    budget = ", ".join(f"{name}={value}" for name, value in (model.budget or {}).items() if value is not None)
    what = f"{model.path} under {budget}" if budget else model.path
    sure = "" if interval[1] < 1 else ", which is within the error of measurement"
    return (
        f"{what} gives fewer tokens a second than the reference {where}: {ratio:.2f} times as many "
        f"({interval[0]:.2f}-{interval[1]:.2f}){sure}."
    )


def plain_data(data: dict[str, Any]) -> dict[str, Any]:
    """Return data as it comes back from JSON: lists for tuples."""
    import json

    return dict(json.loads(json.dumps(data)))
