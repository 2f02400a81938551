"""The flag `--report DIR`: what was measured as one page, DIR/report.html, beside what is printed."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.files import replace_text
from ..errors import InputError
from .outputs import save

if TYPE_CHECKING:
    from ..report.parts import Report

SHOWN = 120  # questions whose answers a report shows


def report_argument(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "--report", type=Path, metavar="DIR", help="write the results as a web page, DIR/report.html"
    )


def check_report(options: argparse.Namespace) -> None:
    """Make the folder of a report. Raises InputError where it can't be."""
    folder = options.report
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--report {folder} is a file: name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--report {folder} can't be made ({error.strerror}): name another folder.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--report {folder} is not writable: name another folder.")


def write_report(options: argparse.Namespace, make: Callable[[tuple[str, ...]], Report]) -> None:
    """Write the page that `make` makes of the commands; a page that can't be written is said, and costs no result."""
    if options.report is None:
        return
    from ..report.page import NAME, render

    command = shlex.join(["lvlm-exporter", *sys.argv[1:]])
    page = render(make((command,)))
    if save(options.report / NAME, lambda path: replace_text(path, page)):
        print(f"report: {options.report / NAME}")
    else:
        options.unsaved = True
