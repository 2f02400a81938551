"""Define the parts of compression.json and onnx.json: their annotations say what must be in the files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from .shapes import INNER_PATH, SHA256, Kind, one_of
from .typed import OR_MISSING, Count, Flag, Length, Number, Positive, Text, named

DTYPES = ("float32", "bfloat16", "float16")
TENSOR = Kind('"layer N\'s NAME"', lambda value: isinstance(value, str) and value.count("'s ") == 1)
Dtype = Annotated[str, one_of(*DTYPES)]
InnerPath = Annotated[str, INNER_PATH]
Sha256 = Annotated[str, SHA256]


@dataclass(frozen=True)
class RunPart:
    """The options that a recipe was run with."""

    device: Text
    dtype: Dtype
    batch_size: Positive
    memory: Text | None


@dataclass(frozen=True)
class SourcePart:
    """The checkpoint that was compressed."""

    name: Text
    revision: Text | None
    model_type: Text
    base_model: Text | None
    license: dict[Text, Text]
    parameters: Positive
    bytes: Count
    kv_bytes_per_token: Count
    files: dict[InnerPath, Sha256]
    unexpected_keys: tuple[Text, ...] = ()  # of its weights, that transformers ignores


@dataclass(frozen=True)
class CalibrationPart:
    """The questions that layers were chosen by."""

    data: Text
    samples: Count
    fingerprint: Text
    tokens: dict[Text, Count]  # visual and text, of the pass that read most


@dataclass(frozen=True)
class ScoresPart:
    """The localizer's value of each layer."""

    method: Text
    values: tuple[Number, ...]
    drop: tuple[Count, ...]
    details: dict[Text, Any]
    stored: Flag = False  # read from a file of `score --save`


@dataclass(frozen=True)
class PlanPart:
    """Which layers went."""

    num_layers: Positive
    drop: tuple[Count, ...]
    keep: tuple[Count, ...]


@dataclass(frozen=True)
class FoldPart:
    """The weights that were folded into the layers that stayed."""

    name: Text
    reason: Text
    tensors: tuple[Annotated[str, TENSOR], ...]


@dataclass(frozen=True)
class ReferenceAnswer:
    """A model's greedy answer to the reference question, and how sure it was of each token."""

    tokens: tuple[Count, ...]
    margins: tuple[Number, ...]


@dataclass(frozen=True)
class ReferencePart(ReferenceAnswer):
    """The answer that `verify` compares with, and the precision that it was given in."""

    dtype: Dtype


@dataclass(frozen=True)
class VerificationPart:
    """How a checkpoint was verified when it was made."""

    loaded: Flag  # and run; else only its structure was compared
    reason: Text = ""  # why it was not loaded


@dataclass(frozen=True)
class MeasuredPart:
    """The size of the written checkpoint, and its files."""

    parameters: Count
    bytes: Count
    seconds: Number
    kv_bytes_per_token: Count
    files: dict[InnerPath, Sha256]


@dataclass(frozen=True)
class VersionsPart:
    """The software that made the checkpoint."""

    exporter: Text
    transformers: Text
    torch: Text


# --- measurements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TypeFigures:
    """Exact match on the questions of one type."""

    n: Count
    accuracy: Number


@dataclass(frozen=True)
class BudgetUsed:
    """The budget that a routed model was evaluated under."""

    preset: Text | None
    keep_visual_tokens: Number | None
    keep_layers: Count | None
    rule: Text
    drop_at: Count | None
    flops: Annotated[Number | None, OR_MISSING] = None
    quality: Annotated[Number | None, OR_MISSING] = None


@dataclass(frozen=True)
class ReferenceFigures:
    """The reference's figures on the same task."""

    n: Count
    accuracy: Number
    interval: Annotated[tuple[Number, ...], Length(2)]
    by_type: dict[Text, TypeFigures]
    kl: Number | None = None
    agreement: Number | None = None


@dataclass(frozen=True)
class EvaluationEntry:
    """The checkpoint's figures on a task."""

    task: Text
    fingerprint: Text
    n: Count
    accuracy: Number
    interval: Annotated[tuple[Number, ...], Length(2)]
    by_type: dict[Text, TypeFigures]
    kl: Number | None
    agreement: Number | None
    reference: ReferenceFigures | None
    budget: BudgetUsed | None = None
    flops_share: Number | None = None
    decoder_flops_share: Number | None = None
    reference_name: Text | None = None
    metric: Text | None = None  # None: exact match
    figures: dict[Text, Number] = field(default_factory=dict)  # what the metric tells beside its mean


@dataclass(frozen=True)
class CostRatios:
    """Figures as shares of the reference's, and how much of the possible speed-up was reached."""

    achieved: dict[Text, Number | None]
    prefill_ms: Number | None = None
    first_token_ms: Number | None = None
    decode_ms: Number | None = None
    flops: Number | None = None
    kv_bytes: Number | None = None
    peak_bytes: Number | None = None


@dataclass(frozen=True)
class BatchTimes:
    """The times of a batch."""

    batch: Positive
    visual_tokens: Count
    text_tokens: Count
    prefill_ms: Number
    decode_ms: Number


@dataclass(frozen=True)
class BatchFigures(BatchTimes):
    """The times of a batch, and their ratios to the reference's."""

    ratio_to_reference: CostRatios


@dataclass(frozen=True)
class HardwarePart:
    """The hardware of a benchmark."""

    device: Text
    threads: Count | None = None


@dataclass(frozen=True)
class WorkloadPart:
    """The prompts of a benchmark."""

    task: Text | None


@dataclass(frozen=True)
class BenchOptionsPart:
    """The settings of a benchmark."""

    new_tokens: Count
    rounds: Count


@dataclass(frozen=True)
class BenchmarkVersions:
    """The software of a benchmark."""

    transformers: Text
    torch: Text


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


@dataclass(frozen=True)
class BenchmarkEntry(BenchmarkHead):
    """A checkpoint's times beside its reference's."""

    batches: tuple[BatchFigures, ...]
    reference: tuple[BatchTimes, ...]
    reference_is_this_model: Flag


# --- a router ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PresetBudget:
    """The budget behind a preset's name."""

    keep_visual_tokens: Number = 1.0  # all
    keep_layers: Count = 0  # not given: all
    flops: Number = 1.0  # not given: as many as those take
    quality: Number = 1.0  # not given: no promise


@dataclass(frozen=True)
class RouterSettingsPart:
    """A router's settings: the layer before which visual tokens leave, and the layers that may be skipped."""

    drop_at: Count
    candidates: tuple[Count, ...]
    presets: dict[Text, PresetBudget]
    default: Text


@dataclass(frozen=True)
class RouterPart:
    """A checkpoint's router, and how it was trained."""

    settings: RouterSettingsPart
    parameters: Count
    questions: Count
    held_out: Count
    curve: tuple[dict[Text, Number], ...]
    reference: ReferenceAnswer
    seconds: Number = 0.0  # of training
    replaces_another: Flag = False  # the source had one


@dataclass(frozen=True)
class HealedHeldOut:
    """The divergence of a model from its original on held-out questions."""

    kl: Number
    interval: Annotated[tuple[Number, ...], Length(2)]
    questions: Count
    pictures: Count
    same_answers: Number


@dataclass(frozen=True)
class HealingTeacher:
    """The original that was learnt from."""

    name: Text
    revision: Text | None


@dataclass(frozen=True)
class AdapterPart:
    """The file of what was learnt."""

    file: InnerPath
    sha256: Sha256


@dataclass(frozen=True)
class HealPart:
    """The healing of a checkpoint."""

    kept: Flag
    steps: Count
    steps_run: Count
    steps_kept: Count
    parameters: Count
    questions: Count
    pairs: Count
    answer_tokens: Count
    fingerprint: Text
    teacher: HealingTeacher
    curve: tuple[dict[Text, Number], ...]
    before: HealedHeldOut
    after: Annotated[HealedHeldOut | None, OR_MISSING] = None
    adapter: Annotated[AdapterPart | None, OR_MISSING] = None


@dataclass(frozen=True)
class ConversionPart:
    """That the checkpoint is another one in another format."""

    format: Text  # that it was in
    allow_pickle: Flag  # weights were read from pickles
    vision_tower: Text | None  # that was named beside it
    notes: tuple[Text, ...] = ()  # what to know of it


@dataclass(frozen=True)
class RoutePicture:
    """A picture of what the router keeps."""

    file: InnerPath
    question: Text


# --- ONNX -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputDifference:
    """The difference of an output from torch's."""

    max: Number
    mean: Number


@dataclass(frozen=True)
class ComparisonPart:
    """The differences of the graphs from torch."""

    outputs: dict[Text, OutputDifference]
    tokens: Count
    equal_tokens: Count
    left_out: Count = 0


@dataclass(frozen=True)
class OnnxSourcePart:
    """The checkpoint that was exported."""

    name: Text
    revision: Text | None
    base_model: Text | None
    license: dict[Text, Text]


@dataclass(frozen=True)
class OnnxVersions:
    """The software that made the graphs."""

    exporter: Text = field(metadata=named("lvlm-exporter"))
    torch: Text
    transformers: Text
    onnxruntime: Text


@dataclass(frozen=True)
class VisionPart:
    """The layout of images; further entries depend on its kind, and the runner reads them."""

    kind: Text


@dataclass(frozen=True)
class OnnxRouterPart:
    """The budgets that an ONNX folder has names for."""

    presets: dict[Text, Any]
    default: Text


@dataclass(frozen=True)
class OnnxBatchFigures(BatchTimes):
    """The times of a batch, and their ratios to the table's first model."""

    vision_ms: Number
    kv_bytes: Count
    ratio_to_reference: CostRatios | None


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
