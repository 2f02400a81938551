"""The two kinds of folder that this package writes, checkpoints and ONNX graphs, and what can be done with either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..cards import model_card
from ..checkpoints import verification
from ..checkpoints.files import check_written
from ..checkpoints.hub_access import WEIGHT_FILES, resolve
from ..checkpoints.record import RECORD, read_record
from ..checkpoints.verification import Verification
from ..onnx import card as onnx_card
from ..onnx import verification as onnx_verification
from ..onnx.manifest import GRAPH_FILES, is_onnx, read_manifest
from ..onnx.runtime.folder import MANIFEST


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder."""

    record: str  # the file that its card is made from
    weights: tuple[str, ...]  # globs of the files that a later push replaces
    require: Callable[[Path, str, bool], object]  # folder, device, trust_remote_code; raises CheckFailed
    hashes: Callable[[Path], dict[str, str]]  # SHA-256 of each file that makes a folder up, by its record
    card: Callable[[Path, str | None], Path]


CHECKPOINT = FolderKind(
    record=RECORD,
    weights=WEIGHT_FILES,
    require=verification.require,
    hashes=lambda folder: read_record(folder).measured.files,
    card=model_card.card,
)
GRAPHS = FolderKind(
    record=MANIFEST,
    weights=GRAPH_FILES,
    require=onnx_verification.require,
    hashes=lambda folder: read_manifest(folder).sha256,
    card=onnx_card.card,
)


def kind_of(folder: Path) -> FolderKind:
    """Return what kind of folder it is. Raises: InputError for one that is not ours, or has a damaged record."""
    kind = GRAPHS if is_onnx(folder) else CHECKPOINT
    recorded(folder, kind)
    return kind


def recorded(folder: Path, kind: FolderKind) -> dict[str, str]:
    """Return the SHA-256 of each file that makes up a folder, by its record."""
    return kind.hashes(folder)


def verify(folder: Path | str, device: str = "cpu", trust_remote_code: bool = False) -> Verification:
    """Tell whether a folder is still as it was made.

    Every file must have the SHA-256 that the record holds, and none may be added. A checkpoint is then loaded in a
    clean process by transformers alone: no key is missing or unexpected, decoding with and without the cache agrees,
    and the tokens recorded at export come out again.
    The graphs of an ONNX folder are those that were compared with torch, and its processor loads.

    Args:
        folder: on disk, or a name on the hub.
        device: on which a checkpoint runs.
        trust_remote_code: run the folder's Python code even if this package did not ship it.
    Raises: InputError where the folder is not one of ours or its record is damaged.
    """
    place, _ = resolve(str(folder), whole=True)
    if is_onnx(place):
        return onnx_verification.verify(place, trust_remote_code)
    return verification.verify(place, device, trust_remote_code)


def card(folder: Path | str, name: str | None = None) -> Path:
    """Render a folder's README.md, and the pictures of a checkpoint, from what was recorded of it.

    Args:
        name: hub id under which it is or will be loaded; the folder's name where there is none.
    Raises: InputError where the folder is not one of ours.
    """
    folder = Path(folder)
    check_written(folder)
    return (GRAPHS if is_onnx(folder) else CHECKPOINT).card(folder, name)
