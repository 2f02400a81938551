"""What a conversion makes of a source, as data: the tensors under new names, and the files beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.own_types import OwnType
from ..checkpoints.pickled import StoredTensors
from ..checkpoints.safetensors_ranges import TensorRange


@dataclass(frozen=True)
class Original:
    """A checkpoint in its authors' own format, opened."""

    name: str  # as the user wrote it
    revision: str | None
    folder: Path
    raw: dict[str, Any]  # its config.json
    stored: StoredTensors
    tower: tuple[str, Path, StoredTensors] | None = None  # the vision tower that was named beside it


@dataclass(frozen=True)
class Converted:
    """A checkpoint in a format that this package reads, to be written."""

    title: str  # of the format that it was in
    config: dict[str, Any]
    shards: tuple[tuple[TensorRange, ...], ...]
    json_files: dict[str, dict[str, Any]]  # beside config.json
    texts: dict[str, str]
    tokenizer: Any  # None: its files are among the others
    copied: tuple[Path, ...] = ()  # files that go along as they are
    our_type: OwnType | None = None  # our modeling file, which goes along
    notes: tuple[str, ...] = field(default=())  # what a user should know of it, a sentence each
