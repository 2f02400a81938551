"""Files that a command is asked to write its results to: checked before the work starts, and never the end of a result.

What can't be written at the end is printed all the same, and the exit code says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoints.files import replace_text
from ..errors import InputError

FLAGS = ("json", "plot", "predictions", "save")  # options that name a file for results
INPUTS = ("task", "calibration", "recipe", "scores")  # files that no result may take the place of
PROBE = bytes(1 << 16)  # room that a result needs at least


def check_outputs(options: argparse.Namespace) -> None:
    """Raise InputError where a file for results can't be written, or would take the place of another one."""
    paths = {flag: path for flag in FLAGS if (path := getattr(options, flag, None)) is not None}
    taken = {os.path.realpath(value): name for name in INPUTS if (value := getattr(options, name, None)) is not None}
    for flag, path in paths.items():
        real = os.path.realpath(path)
        if real in taken:
            raise InputError(f"--{flag} {path} is the file of --{taken[real]} too: name another one.")
        taken[real] = flag
        check_output(f"--{flag} {path}", Path(real))


def check_output(what: str, path: Path) -> None:
    """Raise InputError where a file can't be written, by writing beside it. Devices and pipes are left alone."""
    if path.is_dir():
        raise InputError(f"{what} is a folder: name a file.")
    if not path.parent.is_dir():
        raise InputError(f"{what}: {path.parent} is no folder: make it first, or name another file.")
    if path.exists() and not path.is_file():
        return
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{what} is there already and not writable: name another file.")
    if path.exists() and not os.access(path.parent, os.W_OK):
        return  # it can be written where it is
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{what} can't be written ({error.strerror}): name another file.") from error


def save(path: Path, write: Callable[[Path], object], result: str | None = None) -> bool:
    """Write a result, whatever happens: what can't be written is said, and `result` is printed in its place.

    Returns: False where it was not written.
    """
    try:
        write(path)
    except OSError as error:
        print(f"lvlm-exporter: {path} can't be written ({error.strerror or error}).", file=sys.stderr)
        if result is not None:
            print(result)
        return False
    return True


def save_json(path: Path, data: dict[str, Any]) -> bool:
    """Write data as JSON, or print it where it can't be written. Returns: False for the latter."""
    text = json.dumps(data, indent=2, default=str) + "\n"
    return save(path, lambda path: _write(path, text), text)


def _write(path: Path, text: str) -> None:
    """Write in one step where that can be: a file from an earlier run is not cut short by a disk that is full."""
    real = Path(os.path.realpath(path))
    if (real.exists() and not real.is_file()) or not os.access(real.parent, os.W_OK):
        real.write_text(text)
        return
    replace_text(real, text)
