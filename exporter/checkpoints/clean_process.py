"""Runs a check of `exporter/clean_room/` in a process of its own, which ends when this process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import clean_room
from ..errors import shown
from .temporary import temporary_folder

# Runs the script that is named first. A thread waits for the end of the standard input, a pipe whose other end is open
# as long as the process that started this one lives, and then ends it: nobody would read the report.
WATCHED = """
import os, runpy, sys, threading

def follow():
    while os.read(0, 1):
        pass
    os._exit(1)

threading.Thread(target=follow, daemon=True).start()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ALONE = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run_check(check: str, *arguments: str, doing: str, stands_for: object) -> dict[str, Any]:
    """Run a check, `python -P exporter/clean_room CHECK ARGUMENTS…`, and return its report, {"problems": [...], ...}.

    A process that fails is a problem too. Copies that transformers makes of a folder's modeling files go to a place
    that nobody else uses.

    Args:
        doing: what the process is for, as a message names it: "loading it".
        stands_for: what messages name in place of that folder.
    """
    with temporary_folder("modules", stands_for) as modules:
        ran = run_watched(Path(clean_room.__file__).parent, check, *arguments, HF_MODULES_CACHE=str(modules))
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        reason = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return {"problems": [shown(f"{doing} in a clean process failed: {reason}")]}
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def run_watched(script: Path | str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or a folder with one, and wait for it; it is ended where this process is killed meanwhile."""
    reading, writing = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-P", "-c", WATCHED, str(script), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **ALONE, **environment},
            cwd="/",
            check=False,
            stdin=reading,
        )
    finally:
        os.close(reading)
        os.close(writing)
