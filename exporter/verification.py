"""Does a folder stand on its own? Asked in a clean process that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import clean_room
from .checkpoint import read_record
from .errors import CheckFailed
from .source import resolve
from .weight_files import open_weights


@dataclass(frozen=True)
class Verification:
    folder: Path
    problems: tuple[str, ...]
    details: dict[str, Any]

    @property
    def holds(self) -> bool:
        return not self.problems


def verify(folder: Path | str, device: str = "cpu") -> Verification:
    """Load with transformers alone, no key missing or unexpected, cached = uncached, the tokens recorded at export.

    Raises InputError where the folder is not one of ours or its weight files are damaged.
    """
    folder, _ = resolve(str(folder))
    read_record(folder)
    open_weights(folder)
    return Verification(folder, *_in_clean_process(folder, device))


def _in_clean_process(folder: Path, device: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, "-P", clean_room.__file__, str(folder.absolute()), device],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=False,
    )
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        reason = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return (f"loading it in a clean process failed: {reason}",), {}
    report = json.loads(lines[-1])
    return tuple(report.pop("problems")), report


def require(folder: Path, device: str = "cpu") -> Verification:
    """Verify, or raise CheckFailed with the problems."""
    result = verify(folder, device)
    if not result.holds:
        raise CheckFailed(f"{folder.name} does not verify: {'; '.join(result.problems)}.")
    return result
