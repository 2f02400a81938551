"""Runs a script of this package in a process of its own that can't import it, and that ends when this process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


class CleanProcessFailed(Exception):  # noqa: N818 - reported as a check that did not hold, or raised on
    """The process ended without a report; the message is the last line that it said."""


def report_of(script: Path | str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the JSON object that a script prints in its last line.

    Raises: CleanProcessFailed.
    """
    reading, writing = os.pipe()
    try:
        ran = subprocess.run(
            [sys.executable, "-P", "-c", WATCHED, str(script), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **ALONE, **(environment or {})},
            cwd="/",
            check=False,
            stdin=reading,
        )
    finally:
        os.close(reading)
        os.close(writing)
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        raise CleanProcessFailed((ran.stderr.strip().splitlines() or ["no output"])[-1])
    report: dict[str, Any] = json.loads(lines[-1])
    return report
