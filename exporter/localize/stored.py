"""Scores on disk: what `score --save` keeps, and what another budget makes of them without a forward pass.

The file names what its scores hold for: the SHA-256 of the checkpoint's files, the questions, the localizer with its
options. They are used for nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.choice_types import rounds_of
from ..checkpoints.files import replace_text
from ..checkpoints.record import CheckpointRecord
from ..checkpoints.record_types import CalibrationPart, Dtype, InnerPath, ScoresPart, Sha256
from ..checkpoints.shapes import Misfit, read_json, require_file
from ..checkpoints.typed import Count, Positive, Text, from_data
from ..errors import InputError
from ..methods import LOCALIZERS, localizer_row
from ..recipe import DEFAULT_LOCALIZER, Method, read_method
from .scores import LayerScores, most_redundant

FORMAT = 1


@dataclass(frozen=True)
class ScoredSource:
    """The checkpoint that was scored."""

    name: Text
    revision: Text | None
    files: dict[InnerPath, Sha256]


@dataclass(frozen=True)
class StoredScores:
    """Scores of a checkpoint's layers, with all that they depend on."""

    format: Positive
    source: ScoredSource
    calibration: CalibrationPart
    localizer: Any  # a name, or a mapping with 'name' and the options
    protect: tuple[Count, ...]
    seed: Count
    dtype: Dtype
    scores: ScoresPart

    @property
    def method(self) -> Method:
        return read_method(self.localizer, LOCALIZERS, "localizer")

    @property
    def layer_scores(self) -> LayerScores:
        return LayerScores(self.scores.method, self.scores.values, self.scores.drop, dict(self.scores.details))

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        replace_text(path, json.dumps(asdict(self), indent=2) + "\n")


def load_scores(path: Path | str) -> StoredScores:
    """Read a file of `score --save`. Raises: InputError where it is none, or damaged."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(
            f"there is no file of scores {path}: `lvlm-exporter score MODEL --save {path.name}` makes one."
        )
    require_file(path, "a file of scores")
    try:
        data = read_json(path)
        if not isinstance(data, dict) or "scores" not in data or "localizer" not in data:
            raise InputError(f"{path} holds no scores: `lvlm-exporter score MODEL --save FILE` makes such a file.")
        stored = from_data(StoredScores, data)
        rounds_of(stored.scores.details)
        method = stored.method
    except Misfit as misfit:
        raise InputError(f"{path} is damaged ({misfit}): score again.") from misfit
    if stored.format > FORMAT:
        raise InputError(f"{path} has format {stored.format}, this version reads {FORMAT}: upgrade lvlm-exporter.")
    layers = range(len(stored.scores.values))
    if method.name != stored.scores.method or not layers or not set(stored.scores.drop) <= set(layers):
        raise InputError(f"{path} is damaged ('scores' do not fit each other): score again.")
    return stored


def stored_in(record: CheckpointRecord) -> StoredScores | None:
    """Return the stored scores that a checkpoint was made from; None where the localizer ran."""
    if not record.scores.stored:
        return None
    source = ScoredSource(record.source.name, record.source.revision, record.source.files)
    return StoredScores(
        format=FORMAT,
        source=source,
        calibration=record.calibration,
        localizer=record.recipe["localizer"],
        protect=tuple(record.data["protect"]),
        seed=record.recipe.get("seed", 0),
        dtype=record.run.dtype,
        scores=record.scores,
    )


def check_source(stored: StoredScores, files: dict[str, str], num_layers: int, name: str) -> None:
    """Raise InputError where the scores are another checkpoint's.

    Args:
        files: SHA-256 of the checkpoint's files, by name.
    """
    differing = sorted(
        file for file in {*files, *stored.source.files} if files.get(file) != stored.source.files.get(file)
    )
    if len(stored.scores.values) != num_layers:
        raise InputError(
            f"the scores are of {len(stored.scores.values)} layers of {stored.source.name}, {name} has {num_layers}: "
            "score it again."
        )
    if differing:
        others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise InputError(
            f"the scores are of another checkpoint than {name}: {differing[0]}{others} differs from what was scored "
            f"({stored.source.name}). Score it again."
        )


def check_asked(stored: StoredScores, localizer: Method, fingerprint: str | None) -> None:
    """Raise InputError where a recipe asks for another localizer, or for other questions, than were scored with.

    Args:
        localizer: the recipe's; the default one asks for nothing.
        fingerprint: of the recipe's questions; None: it names none.
    """
    if localizer not in (Method(DEFAULT_LOCALIZER), stored.method):
        raise InputError(
            f"the scores are by {stored.method.to_data()}, the recipe asks for {localizer.to_data()}: take one of them "
            "out, or score again."
        )
    if fingerprint is not None and fingerprint != stored.calibration.fingerprint:
        raise InputError(
            f"the scores were read from other questions than these ({stored.calibration.samples} of "
            f"{stored.calibration.data}, fingerprint {stored.calibration.fingerprint[:12]}, not {fingerprint[:12]}): "
            "name those, or score again."
        )


def chosen_from(stored: StoredScores, count: int, protect: Sequence[int]) -> LayerScores:
    """Return the stored scores with `count` layers to drop: the very choice that was made, or the next by rank.

    Raises: InputError where the method's values say nothing of another number of layers.
    """
    scores = stored.layer_scores
    if count == len(scores.drop) and not set(scores.drop) & set(protect):
        return scores
    row = localizer_row(scores.method)
    if row.of_blocks:
        raise InputError(
            f"{scores.method} scores blocks of as many layers as go, and the stored scores are of {len(scores.drop)}, "
            f"not {count}: score again with --drop-layers {count}."
        )
    if row.nested:
        if count > len(scores.drop) or set(scores.drop[:count]) & set(protect):
            raise InputError(
                f"{scores.method} removes layers one after the other, and the stored scores are of {len(scores.drop)}, "
                f"not {count}, with layers {list(stored.protect)} protected: score again with --drop-layers {count}."
            )
        return replace(scores, drop=scores.drop[:count])
    ranked = most_redundant(scores.values, count, protect)
    if row.from_statistics or row.control:
        return replace(scores, drop=ranked)
    return replace(scores, drop=ranked, details=scores.details | {"ranked": "by value, from scores of another budget"})
