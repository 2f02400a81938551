"""Keep a comparison's finished cells in its folder, so that a run that is broken off goes on from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..checkpoints.staging import check_target
from ..data.resumable import ResumableLines
from ..errors import InputError


class CellsFile:
    """Cells of one comparison as JSON lines, in the order in which they were finished.

    Args:
        path: inside the comparison's folder, which is made where there is none.
        asked: what was compared, as data; a folder that holds another comparison is refused.
    Raises: InputError for a folder of another comparison, and for a file that holds something else.
    """

    def __init__(self, path: Path, asked: Any) -> None:
        self.fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if not path.exists():
            check_target(path.parent)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        self.lines = ResumableLines(path, {"cell": dict}, "cell of a comparison")
        if self.lines.runs - {self.fingerprint}:
            raise InputError(f"{path.parent} holds another comparison: name another folder, or remove it.")
        known = self.lines.rows(self.fingerprint)
        self.cells: list[dict[str, Any]] = [known[number]["cell"] for number in sorted(known)]

    def add(self, cells: list[dict[str, Any]]) -> None:
        """Append cells."""
        first = len(self.cells)
        self.cells += cells
        self.lines.add(self.fingerprint, {first + number: {"cell": cell} for number, cell in enumerate(cells)})
