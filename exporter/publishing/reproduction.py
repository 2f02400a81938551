"""Making a compressed checkpoint again from its record, and comparing it bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.files import file_hash
from ..checkpoints.hub_access import resolve
from ..checkpoints.record import CheckpointRecord, read_record
from ..checkpoints.record_types import QuestionsPart
from ..checkpoints.source import open_source
from ..checkpoints.staging import check_target
from ..checkpoints.weight_files import open_weights
from ..compression.job import load_for
from ..conversion.convert import convert, open_original
from ..conversion.record import source_hashes
from ..errors import InputError
from ..localize.stored import stored_in
from ..pipeline import compress
from ..progress import silent
from ..recipe import Recipe, RunOptions, recipe_from_data


@dataclass(frozen=True)
class Reproduction:
    folder: Path
    identical: bool
    differing: tuple[str, ...]  # files that differ; only weights where the record is of a version that hashed no others
    largest_difference: float  # over all tensors, absolute
    misrecorded: tuple[str, ...] = ()  # of those, files that were made again as they are: the record's hash is wrong


def reproduce(
    folder: Path | str,
    out: Path | str,
    *,
    model: str | Path | None = None,
    calibration: str | Path | None = None,
    progress: Callable[..., object] = silent,
) -> Reproduction:
    """Run a checkpoint's recipe again on the source it was made from.

    Args:
        model, calibration: where source and data lie now, if they have moved since.
    Raises: InputError where the source or the data are not what they were.
    """
    folder, _ = resolve(str(folder))
    record = read_record(folder)
    check_target(Path(out))
    if record.conversion is not None:
        return _compared(folder, _convert_again(record, out, model, progress), record)
    recipe, healed = recipe_from_data(record.recipe), None
    if recipe.heal is not None:  # what it learnt is kept, so that nothing has to be learnt again
        healed = folder if record.heal and record.heal.kept else None
        recipe = recipe if healed else dataclasses.replace(recipe, heal=None)
    if model is not None:
        recipe = dataclasses.replace(recipe, model=str(model))
    elif record.source.revision:
        recipe = dataclasses.replace(recipe, revision=record.source.revision)
    if calibration is not None:
        recipe = dataclasses.replace(recipe, calibration=dataclasses.replace(recipe.calibration, data=str(calibration)))
    _check_source(recipe.model, recipe.revision, record.source.files)
    if recipe.calibration.data:
        _check_data(recipe, record.calibration)
    run = record.run
    options = RunOptions(run.device, run.dtype, run.memory, run.batch_size)
    remade = compress(recipe, out, options=options, progress=progress, healed=healed, scores=stored_in(record))  # type: ignore[arg-type]
    return _compared(folder, remade, record)


def _compared(folder: Path, remade: Path, record: CheckpointRecord) -> Reproduction:
    """Compare what was made again with what the record says of every file."""
    fresh = read_record(remade).measured.files
    before = {name: digest.lower() for name, digest in record.measured.files.items()}
    differing = tuple(name for name, digest in before.items() if fresh.get(name) != digest)
    misrecorded = tuple(name for name in differing if name in fresh and fresh[name] == _hash_of(folder / name))
    largest = _largest_difference(folder, remade) if differing else 0.0
    return Reproduction(remade, not differing, differing=differing, largest_difference=largest, misrecorded=misrecorded)


def _convert_again(
    record: CheckpointRecord, out: Path | str, model: str | Path | None, progress: Callable[..., object]
) -> Path:
    """Convert a converted checkpoint's source once more. Raises InputError where it is not what it was."""
    conversion, source = record.conversion, record.source
    assert conversion is not None
    name = str(model) if model is not None else str(record.recipe["model"])
    if model is None and source.revision:
        name = f"{name.split('@')[0]}@{source.revision}"
    original = open_original(name, conversion.vision_tower, conversion.allow_pickle)
    _refuse_changes(name, source_hashes(original), source.files)
    return convert(
        name, out, vision_tower=conversion.vision_tower, allow_pickle=conversion.allow_pickle,
        base_model=source.base_model, device=record.run.device, dtype=record.run.dtype, progress=progress,  # type: ignore[arg-type]
    )  # fmt: skip


def _check_source(name: str, revision: str | None, expected: dict[str, str]) -> None:
    folder = open_source(name, revision).folder
    _refuse_changes(name, {file: _hash_of(folder / file) for file in expected}, expected)


def _refuse_changes(name: str, hashes: Mapping[str, str | None], expected: dict[str, str]) -> None:
    """Raise InputError where files of a source have another SHA-256 than its record says."""
    changed = sorted(file for file, digest in expected.items() if hashes.get(file) != digest.lower())
    if changed:
        others = " and others" if len(changed) > 3 else ""
        raise InputError(
            f"{name} is not the source that the checkpoint was made from: {', '.join(changed[:3])}{others} "
            f"{'differs' if len(changed) == 1 else 'differ'}. Name the right one with --model."
        )


def _hash_of(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None


def _check_data(recipe: Recipe, expected: QuestionsPart) -> None:
    calibration = load_for(recipe)
    if calibration.fingerprint != expected.fingerprint:
        raise InputError(
            f"{recipe.calibration.data} does not hold the questions and images that the checkpoint was made from. Name "
            "the right file with --calibration."
        )
    elsewhere = calibration.answers
    if elsewhere is not None and expected.answers is not None and elsewhere.sha256 != expected.answers.sha256:
        raise InputError(
            f"{elsewhere.path} does not hold the answers that the checkpoint was made by: put that file there."
        )


def _largest_difference(first: Path, second: Path) -> float:
    first_weights, second_weights = open_weights(first), open_weights(second)
    if first_weights.entries.keys() != second_weights.entries.keys():
        return float("inf")
    return max(
        float((first_weights.read(name).double() - second_weights.read(name).double()).abs().max())
        for name in first_weights.entries
    )
