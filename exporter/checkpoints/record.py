"""compression.json: what a checkpoint says of itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..clean_room import REFERENCE_QUESTION
from ..errors import InputError
from .choice_types import FoldPart, rounds_of
from .files import check_written, replace_text
from .measurement_types import BenchmarkEntry, EvaluationEntry
from .record_types import (
    ConversionPart,
    HealPart,
    MeasuredPart,
    PlanPart,
    QuestionsPart,
    ReferenceAnswer,
    ReferencePart,
    RoutePicture,
    RouterPart,
    RunPart,
    ScoresPart,
    ServingPart,
    SourcePart,
    VerificationPart,
    VersionsPart,
)
from .shapes import (
    COUNT,
    FLAG,
    NUMBER,
    POSITIVE,
    TEXT,
    ListOf,
    Maybe,
    Misfit,
    TextOr,
    check,
    read_json,
    require_file,
)
from .typed import OR_MISSING, Count, Text, from_data, named

RECORD = "compression.json"
FORMAT = 1
PLACE = TextOr(
    {"data": TEXT, "samples?": Maybe(COUNT), "split?": TEXT, "prompt?": TEXT, "config?": Maybe(TEXT),
     "answer_tokens?": POSITIVE, "answers?": Maybe(TEXT), "allow_urls?": FLAG,
     "frames?": Maybe(POSITIVE)}
)  # fmt: skip
METHOD = TextOr({"name": TEXT})
# Laxer than a recipe that is run: a later version's has other keys and methods, and `reproduce` reads it strictly.
RECIPE = {
    "model": TEXT, "revision?": Maybe(TEXT), "calibration?": PLACE, "localizer?": METHOD, "fold?": METHOD,
    "drop_layers?": COUNT, "drop_ratio?": NUMBER, "target_params?": COUNT, "layers?": ListOf(COUNT),
    "protect?": ListOf(COUNT), "keep_period?": FLAG, "seed?": COUNT, "base_model?": Maybe(TEXT),
    "heal?": {"calibration?": PLACE, "teacher?": Maybe(TEXT)}, "router?": {"calibration?": PLACE, "loss?": METHOD},
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint's record. Its parts are typed; `to_data` is what the file holds, with what no part names."""

    recipe: dict[Text, Any]
    run: RunPart
    source: SourcePart
    calibration: QuestionsPart
    protect: tuple[Count, ...]
    scores: ScoresPart
    plan: PlanPart
    fold: FoldPart
    reference: ReferencePart | None  # None: written without its model, and never loaded
    evaluations: tuple[EvaluationEntry, ...]
    versions: VersionsPart
    measured: MeasuredPart
    verification: Annotated[VerificationPart | None, OR_MISSING] = None
    heal: Annotated[HealPart | None, OR_MISSING] = None
    conversion: Annotated[ConversionPart | None, OR_MISSING] = None
    router: Annotated[RouterPart | None, OR_MISSING] = None
    serving: Annotated[ServingPart | None, OR_MISSING] = None
    routes: tuple[RoutePicture, ...] = ()
    benchmarks: tuple[BenchmarkEntry, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata=named(None))

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> CheckpointRecord:
        """Read a record's JSON. Raises: Misfit where any part of it is missing or not what it should be."""
        read = from_data(cls, data)
        object.__setattr__(read, "data", data)
        _check_together(read)
        return read

    def to_data(self) -> dict[str, Any]:
        """Return a copy of the JSON, to be changed and written."""
        return copy.deepcopy(dict(self.data))


def read_record(folder: Path) -> CheckpointRecord:
    """Return the record of a checkpoint folder.

    Raises: InputError where there is none, or where any part of it is missing or not what it should be.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}.")
    if not path.exists():
        raise InputError(f"{folder} has no {RECORD}: it is no checkpoint that lvlm-exporter wrote.")
    require_file(path, "a record of lvlm-exporter")
    try:
        data = read_json(path)
        if not isinstance(data, dict) or "recipe" not in data:
            raise InputError(f"{path} is no record of lvlm-exporter: it has no 'recipe'.")
        check_format(data, path)
        return CheckpointRecord.from_data(data)
    except Misfit as misfit:
        raise InputError(f"{path} is damaged ({misfit}): take it from where the checkpoint was made.") from misfit


def is_compressed(folder: Path) -> bool:
    """Tell whether a folder has the record of a compression; a converted checkpoint is as its authors made it."""
    return (folder / RECORD).exists() and read_record(folder).conversion is None


def check_format(data: dict[str, Any], path: Path) -> None:
    """Raise InputError where the record is of a later format than this version reads."""
    version = data.get("format", FORMAT)
    check(version, POSITIVE, "format")
    if version > FORMAT:
        raise InputError(
            f"{path} has format {version}, this version of lvlm-exporter reads {FORMAT}: upgrade lvlm-exporter."
        )


def _check_together(record: CheckpointRecord) -> None:
    """Check what one part says against another."""
    plan = record.plan
    check(record.recipe, RECIPE, "recipe")
    if sorted([*plan.drop, *plan.keep]) != list(range(plan.num_layers)) or not plan.keep:
        raise Misfit(f"'plan' does not keep or drop each of its {plan.num_layers} layers once")
    if len(record.scores.values) != plan.num_layers:
        raise Misfit(f"'scores.values' has {len(record.scores.values)} numbers for {plan.num_layers} layers")
    rounds_of(record.scores.details)
    if record.fold.held_out is not None and record.fold.without is None:
        raise Misfit("'fold' was chosen by held-out questions and has no 'without'")
    tokens = record.calibration.tokens
    if tokens and not {"visual", "text"} <= tokens.keys():
        raise Misfit("'calibration.tokens' is without 'visual' or 'text'")
    answers: dict[str, ReferenceAnswer] = {"reference": record.reference} if record.reference is not None else {}
    if record.router is not None:
        answers["router.reference"] = record.router.reference
        _check_curve(record.router.curve, "router")
    if record.serving is not None:
        answers["serving.reference"] = record.serving.reference
        _check_curve(record.serving.curve, "serving")
    if record.heal is not None:
        _check_curve(record.heal.curve, "heal")
        if record.heal.kept and (record.heal.after is None or record.heal.adapter is None):
            raise Misfit("'heal' was kept and has no 'after' or no 'adapter'")
    for name, answer in answers.items():
        if len(answer.tokens) != len(answer.margins) or not answer.tokens:
            raise Misfit(f"'{name}' has {len(answer.tokens)} tokens and {len(answer.margins)} margins")
    for index, entry in enumerate(record.evaluations):
        _check_evaluation(entry, f"evaluations[{index}]")
    for index, benchmark in enumerate(record.benchmarks):
        for part in ("batches", "reference"):
            if not getattr(benchmark, part):
                raise Misfit(f"'benchmarks[{index}].{part}' is not a list that is not empty")


def _check_curve(curve: tuple[dict[str, float], ...], part: str) -> None:
    if not curve or any(not {"step", "loss"} <= point.keys() for point in curve):
        raise Misfit(f"'{part}.curve' has a point without 'step' or 'loss', or none at all")


def _check_evaluation(entry: EvaluationEntry, where: str) -> None:
    if entry.budget is not None and None in (entry.flops_share, entry.decoder_flops_share):
        raise Misfit(f"'{where}' is under a budget and has no share of FLOPs")
    for place, told in ((where, entry), (f"{where}.reference", entry.reference)):
        for pair in (("kl", "agreement"), ("flops_share", "decoder_flops_share")):
            if told is not None and len({getattr(told, name) is None for name in pair}) == 2:
                raise Misfit(f"'{place}' has one of '{pair[0]}' and '{pair[1]}', which are measured together")
    base = entry.reference
    missing = entry.by_type.keys() - base.by_type.keys() if base and len(entry.by_type) > 1 else ()
    if missing:
        raise Misfit(f"'{where}.reference.by_type' has no {min(missing)!r:.80}")


def reference_part(answer: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the answer that a checkpoint is verified by, as its record has it."""
    return {**answer, "question": REFERENCE_QUESTION, "dtype": dtype}


def write_record(folder: Path, data: dict[str, Any]) -> None:
    """Write compression.json."""
    replace_json(folder / RECORD, data)


def replace_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file in one step, so that a reader never meets half of it."""
    replace_text(path, json.dumps(data, indent=2) + "\n")


def check_updatable(folder: Path) -> None:
    """Raise InputError, before the work, where a folder's record and card could not be told what is measured."""
    if not folder.is_dir():
        return  # a name on the hub: nothing is written there
    if (folder / RECORD).exists():
        read_record(folder)
    check_written(folder)
