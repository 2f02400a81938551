"""The two kinds of folder that this package writes, checkpoints and ONNX graphs, and what can be done with either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import model_card, verification
from .checkpoint import RECORD, read_record
from .onnx import card as onnx_card
from .onnx import verification as onnx_verification
from .onnx.manifest import GRAPH_FILES, MANIFEST, is_onnx, read_manifest
from .source import WEIGHT_FILES
from .verification import Verification


@dataclass(frozen=True)
class Kind:
    """A kind of folder."""

    record: str  # the file that its card is made from
    weights: tuple[str, ...]  # globs of the files that a later push replaces
    require: Callable[[Path, str], object]  # folder and device; raises CheckFailed
    card: Callable[[Path, str | None], Path]


CHECKPOINT = Kind(RECORD, WEIGHT_FILES, verification.require, model_card.card)
GRAPHS = Kind(MANIFEST, GRAPH_FILES, onnx_verification.require, onnx_card.card)


def kind_of(folder: Path) -> Kind:
    """Raises InputError for a folder that is not ours."""
    if is_onnx(folder):
        read_manifest(folder)
        return GRAPHS
    read_record(folder)
    return CHECKPOINT


def verify(folder: Path | str, device: str = "cpu") -> Verification:
    """Is a folder what it says it is?

    A checkpoint is loaded in a clean process, with transformers alone: no key missing or unexpected, cached = uncached,
    the tokens recorded at export. The graphs of an ONNX folder are those that were compared with torch.

    Args:
        folder: on disk; a checkpoint's name on the hub will do too.
        device: that a checkpoint runs on.
    Raises: InputError where the folder is not one of ours or its weight files are damaged.
    """
    return onnx_verification.verify(folder) if is_onnx(folder) else verification.verify(folder, device)


def card(folder: Path | str, name: str | None = None) -> Path:
    """Render a folder's README.md, and the pictures of a checkpoint, from what was recorded of it.

    Args:
        name: hub id under which it is or will be loaded; the folder's name where there is none.
    Raises: InputError where the folder is not one of ours.
    """
    folder = Path(folder)
    return (GRAPHS if is_onnx(folder) else CHECKPOINT).card(folder, name)
