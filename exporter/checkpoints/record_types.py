"""Define the parts of compression.json and onnx.json: their annotations say what must be in the files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from .shapes import INNER_PATH, SHA256, Kind, one_of
from .typed import OR_MISSING, Count, Divergence, Flag, Length, Number, Positive, Share, Size, Text, named

DTYPES = ("float32", "bfloat16", "float16")
OUTPUT_NAME = re.compile(
    r"vision: image_features|embeddings: inputs_embeds|decoder \((prompt|step)\): logits"
    r"|decoder: present\.\d+\.(key|value)"
)
OUTPUT = Kind(
    '"PART: OUTPUT" of the graphs',
    lambda value: isinstance(value, str) and bool(OUTPUT_NAME.fullmatch(value)),
)
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
class GivenAnswersPart:
    """The file of answers that the original gave to the questions elsewhere."""

    file: Text
    sha256: Sha256


@dataclass(frozen=True)
class QuestionsPart(CalibrationPart):
    """The questions of a checkpoint's record, and how they were used."""

    of: Count = 0  # that there were to choose from
    answer_tokens: Count = 0  # of the model's own answers, where a method reads them
    pictures: Count = 0
    held_out: Count = 0  # that sets of layers were judged on
    answers: GivenAnswersPart | None = None  # None: the original answered when it was run


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
    broken_period: Text | None = None  # a warning


@dataclass(frozen=True)
class ReferenceAnswer:
    """A model's greedy answer to the reference question, and how sure it was of each token."""

    tokens: tuple[Count, ...]
    margins: tuple[Size, ...]
    question: Text = ""


@dataclass(frozen=True)
class ReferencePart(ReferenceAnswer):
    """The answer that `verify` compares with, and the precision that it was given in."""

    dtype: Dtype = field(kw_only=True)


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
    seconds: Size
    kv_bytes_per_token: Count
    files: dict[InnerPath, Sha256]
    bytes_read: Count | None = None  # of the source's weights, where layers were left on disk (--memory)


@dataclass(frozen=True)
class VersionsPart:
    """The software that made the checkpoint."""

    exporter: Text
    transformers: Text
    torch: Text
    python: Text = ""
    safetensors: Text = ""


# --- a router ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PresetBudget:
    """The budget behind a preset's name."""

    keep_visual_tokens: Size = 1.0  # all
    keep_layers: Count = 0  # not given: all
    flops: Size = 1.0  # not given: as many as those take
    quality: Share = 1.0  # not given: no promise


@dataclass(frozen=True)
class RouterSettingsPart:
    """A router's settings: the layer before which visual tokens leave, and the layers that may be skipped."""

    drop_at: Count
    candidates: tuple[Count, ...]
    presets: dict[Text, PresetBudget]
    default: Text
    read_at: Count = 2
    bottleneck: Positive = 1
    num_heads: Positive = 1
    image_floor: Share = 0.0
    format: Positive = 1
    trained_for: dict[Text, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterPart:
    """A checkpoint's router, and how it was trained."""

    settings: RouterSettingsPart
    parameters: Count
    questions: Count
    held_out: Count
    curve: tuple[dict[Text, Number], ...]
    reference: ReferenceAnswer
    measured: tuple[dict[Text, Any], ...] = ()  # of budgets, on held-out questions
    fingerprint: Text = ""  # of the questions
    seconds: Size = 0.0  # of training
    replaces_another: Flag = False  # the source had one


@dataclass(frozen=True)
class ServingPreset:
    """What a preset of a serving router does to held-out questions."""

    preset: Text
    keep_visual_tokens: Size
    told_the_question: Flag
    kl: Divergence
    answers_kept: Share
    questions: Count


@dataclass(frozen=True)
class ServingReference(ReferenceAnswer):
    """A served model's answer to the reference question."""

    preset: Text = field(kw_only=True)  # under which it was given


@dataclass(frozen=True)
class ServingPart:
    """A checkpoint's serving router, and how it was trained."""

    settings: dict[Text, Any]
    parameters: Count
    questions: Count
    held_out: Count
    curve: tuple[dict[Text, Number], ...]
    reference: ServingReference
    measured: tuple[ServingPreset, ...] = ()
    fingerprint: Text = ""  # of the questions
    step: Count = 0  # whose weights are kept
    seconds: Size = 0.0  # of training
    replaces_another: Flag = False  # the source had one


@dataclass(frozen=True)
class HealedHeldOut:
    """The divergence of a model from its original on held-out questions."""

    kl: Divergence
    interval: Annotated[tuple[Number, ...], Length(2)] | None  # None: of one picture there is none
    questions: Count
    pictures: Count
    same_answers: Share


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

    max: Size
    mean: Size
    scale: Size = 0.0  # the largest magnitude


@dataclass(frozen=True)
class ComparisonPart:
    """The differences of the graphs from torch."""

    outputs: dict[Annotated[str, OUTPUT], OutputDifference]
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
    onnx: Text = ""
    onnxscript: Text = ""


@dataclass(frozen=True)
class OnnxClientPart:
    """The library that a folder is laid out for: which version ran the layout, and which was there at the export."""

    name: Text
    version: Text
    installed: Text | None
    limits: tuple[Text, ...]  # why its own processor can't put questions to the model, a clause each


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
class OnnxServingPart:
    """The budget of a serving router that an ONNX folder's vision graph has: "off" where it is the plain model."""

    preset: Annotated[Text | None, OR_MISSING] = None  # None: the budget was given as a count or a share
    keep_visual_tokens: Annotated[Number | None, OR_MISSING] = None
    rows: Annotated[Count | None, OR_MISSING] = None  # of a picture in the whole model
    stays: Annotated[Count | None, OR_MISSING] = None  # that the graph gives out
