"""Keep a comparison's finished cells in its folder, so that a run that is broken off goes on from them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.shapes import COUNT, DIVERGENCE, SHARE, SIZE, ListOf, MapOf, Misfit
from ..checkpoints.staging import check_target
from ..data.resumable import ResumableLines
from ..errors import InputError
from ..evaluation.scoring import TaskResult

logger = logging.getLogger(__name__)
RESULT = {  # of a task, as a cell keeps it
    "n": COUNT,
    "accuracy": SHARE,
    "interval": ListOf(SHARE, 2),
    "kept": SIZE,
    "by_type": MapOf(SHARE),
    "kl": DIVERGENCE,
    "agreement": SHARE,
}
T = TypeVar("T")


def as_kept(result: TaskResult, original: float) -> dict[str, Any]:
    """Return a task's result as a cell keeps it; `original` is the accuracy of the model that it is compared with."""
    rate, told = result.rate, result.fidelity
    return {
        "n": rate.n,
        "accuracy": rate.accuracy,
        "interval": rate.interval,
        "kept": rate.accuracy / original if original else 0.0,
        "by_type": {name: of_type.accuracy for name, of_type in result.by_type.items()},
        "kl": told.kl if told else 0.0,
        "agreement": told.agreement if told else 0.0,
    }


class CellsFile:
    """Cells of one comparison, or steps of one search, as JSON lines, in the order in which they were finished.

    Args:
        path: inside the run's folder, which is made where there is none.
        asked: what was asked for, as data; a folder that holds another run is refused.
        what: kind of run, for messages.
    Raises: InputError for a folder of another run, and for a file that holds something else.
    """

    def __init__(self, path: Path, depends_on: Any, what: str = "comparison") -> None:
        self.what = what
        self.fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self.path = path
        if not path.exists():
            check_target(path.parent)  # and made with the first cell: what is refused meanwhile leaves no folder
        self.lines = self._lines() if path.exists() else ResumableLines(None)
        if self.lines.fingerprints - {self.fingerprint}:
            raise InputError(f"{path.parent} holds another {what}: name another folder, or remove it.")
        known = self.lines.entries(self.fingerprint)
        self.cells: list[dict[str, Any]] = [known[number]["cell"] for number in sorted(known)]
        self.next = max(known, default=-1) + 1  # not len(known): a line may have been taken out

    def _lines(self) -> ResumableLines:
        return ResumableLines(self.path, {"cell": dict}, f"cell of a {self.what}", checked=True)

    def read(self, parse: Callable[[Any], T]) -> Iterator[T]:
        """Yield what `parse` makes of each cell. Raises InputError where it takes one for damaged, as a Misfit says."""
        for number, cell in enumerate(self.cells, 1):
            try:
                yield parse(cell)
            except Misfit as misfit:
                raise InputError(
                    f"{self.path} is damaged in its cell {number} ({misfit}): take the line out, or name another "
                    "folder and begin anew."
                ) from misfit

    def add(self, cells: list[dict[str, Any]]) -> None:
        """Append cells."""
        if self.lines.path is None and not self.path.exists():
            try:
                self.path.parent.mkdir(exist_ok=True)
                self.path.touch()
                self.lines = self._lines()
            except OSError as error:  # the run goes on all the same
                logger.warning("%s can't be written (%s): cells are not kept.", self.path, error.strerror)
        self.cells += cells
        self.lines.add(self.fingerprint, {self.next + number: {"cell": cell} for number, cell in enumerate(cells)})
        self.next += len(cells)
