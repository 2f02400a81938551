"""Define what was measured of a checkpoint, as its record has it: answers to a task, and times beside a reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from .typed import OR_MISSING, Count, Divergence, Flag, Length, Number, Positive, Share, Size, Text

Interval = Annotated[tuple[Share, ...], Length(2)]


@dataclass(frozen=True)
class TypeFigures:
    """Exact match on the questions of one type."""

    n: Count
    accuracy: Share
    interval: Interval = ()


@dataclass(frozen=True)
class BudgetUsed:
    """The budget that a routed model was evaluated under."""

    preset: Text | None
    keep_visual_tokens: Size | None
    keep_layers: Count | None
    rule: Text
    drop_at: Count | None
    flops: Annotated[Size | None, OR_MISSING] = None
    quality: Annotated[Share | None, OR_MISSING] = None


@dataclass(frozen=True, kw_only=True)
class ReferenceFigures:
    """A model's figures on a task: those of the reference."""

    n: Count
    accuracy: Share
    interval: Interval
    by_type: dict[Text, TypeFigures]
    kl: Divergence | None = None
    agreement: Share | None = None
    tokens: Count = 0  # that kl and agreement are means over
    budget: BudgetUsed | None = None
    flops_share: Size | None = None
    decoder_flops_share: Size | None = None
    answers_kept: Share | None = None  # of those without a budget, under a quality asked for
    metric: Text | None = None  # None: exact match
    metric_title: Text | None = None  # as people read it; None: exact match, or a record of before
    figures: dict[Text, Number] = field(default_factory=dict)  # what the metric tells beside its mean


@dataclass(frozen=True, kw_only=True)
class EvaluationEntry(ReferenceFigures):
    """The checkpoint's figures on a task, beside the reference's."""

    task: Text
    fingerprint: Text
    kl: Divergence | None = field()  # must be there, null or not
    agreement: Share | None = field()
    reference: ReferenceFigures | None
    reference_name: Text | None = None


@dataclass(frozen=True)
class CostRatios:
    """Figures as shares of the reference's, and how much of the possible speed-up was reached."""

    achieved: dict[Text, Size | None]
    vision_ms: Size | None = None
    prefill_ms: Size | None = None
    first_token_ms: Size | None = None
    decode_ms: Size | None = None
    total_ms: Size | None = None
    tokens_per_s: Size | None = None
    flops: Size | None = None
    vision_flops: Size | None = None
    decode_flops: Size | None = None
    kv_bytes: Size | None = None
    weight_bytes: Size | None = None
    step_bytes: Size | None = None
    peak_bytes: Size | None = None
    intervals: dict[Text, Annotated[tuple[Size, ...], Length(2)]] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchTimes:
    """The times of a batch, and what it costs."""

    batch: Positive
    visual_tokens: Count
    text_tokens: Count
    prefill_ms: Size
    decode_ms: Size
    vision_ms: Size | None = None
    first_token_ms: Size | None = None
    total_ms: Size | None = None
    tokens_per_s: Size | None = None
    flops: Count | None = None
    vision_flops: Count | None = None
    decode_flops: Count | None = None
    kv_bytes: Count | None = None
    kv_bytes_formula: Count | None = None
    weight_bytes: Count | None = None
    step_bytes: Count | None = None
    peak_bytes: Count | None = None


@dataclass(frozen=True)
class BatchFigures(BatchTimes):
    """The times of a batch, and their ratios to the reference's."""

    ratio_to_reference: CostRatios = field(kw_only=True)


@dataclass(frozen=True)
class HardwarePart:
    """The hardware of a benchmark."""

    device: Text
    threads: Count | None = None
    cuda: Text | None = None


@dataclass(frozen=True)
class WorkloadPart:
    """The prompts of a benchmark."""

    task: Text | None
    visual_tokens: Positive | None = None
    text_tokens: Positive | None = None
    seed: Count = 0
    columns: dict[Text, Text] | None = None
    split: Text | None = None
    config: Text | None = None
    allow_urls: Flag = False
    frames: Positive | None = None


@dataclass(frozen=True)
class BenchOptionsPart:
    """The settings of a benchmark."""

    new_tokens: Count
    rounds: Count
    device: Text | None = None
    dtype: Text = "auto"
    batches: tuple[Positive, ...] = ()
    attention: Text | None = None
    compile: Flag = False
    in_flight: tuple[Positive, ...] = ()


@dataclass(frozen=True)
class LoadTimes:
    """Throughput and waits with so many requests in flight."""

    in_flight: Positive
    requests: Count
    tokens_per_s: Size
    first_token_p50_ms: Size
    first_token_p95_ms: Size
    token_p50_ms: Size
    token_p95_ms: Size
    batching: Text
    throughput_ratio: Size | None = None
    throughput_interval: Annotated[tuple[Size, ...], Length(2)] | None = None


@dataclass(frozen=True)
class BenchmarkVersions:
    """The software of a benchmark."""

    transformers: Text
    torch: Text
    exporter: Text = ""
    python: Text = ""
    safetensors: Text = ""


@dataclass(frozen=True)
class BenchmarkHead:
    """The conditions of a benchmark."""

    budget: dict[Text, Any] | None
    runtime: Text
    hardware: HardwarePart
    workload: WorkloadPart
    options: BenchOptionsPart
    date: Text
    versions: BenchmarkVersions
    reference_name: Text | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class BenchmarkEntry(BenchmarkHead):
    """A checkpoint's times beside its reference's."""

    batches: tuple[BatchFigures, ...]
    reference: tuple[BatchTimes, ...]
    reference_is_this_model: Flag
    loads: tuple[LoadTimes, ...] = ()
    reference_loads: tuple[LoadTimes, ...] = ()


@dataclass(frozen=True)
class OnnxBatchFigures(BatchTimes):
    """The times of a batch, and their ratios to the table's first model."""

    vision_ms: Size = field(kw_only=True)  # must be there
    kv_bytes: Count = field(kw_only=True)
    ratio_to_reference: CostRatios | None = field(kw_only=True)


@dataclass(frozen=True)
class OnnxModelFigures:
    """One model of an ONNX folder's benchmark."""

    path: Text
    budget: dict[Text, Any] | None
    runtime: Text
    batches: tuple[OnnxBatchFigures, ...]


@dataclass(frozen=True)
class OnnxBenchmark(BenchmarkHead):
    """An ONNX folder's times beside those of all that it was compared with."""

    models: tuple[OnnxModelFigures, ...]
