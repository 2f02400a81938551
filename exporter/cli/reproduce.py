"""The subcommand `reproduce`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckFailed
from .arguments import json_argument
from .from_flags import progress_bar, write_json

if TYPE_CHECKING:
    from ..publishing.reproduction import Reproduction

SUMMARY = "build a checkpoint again and compare it bit for bit"
EXAMPLE = "reproduce small --out again"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folder", metavar="DIR", help="folder or hub id")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR2", help="folder to make")
    subcommand.add_argument("--model", metavar="MODEL", help="where the source is now (where the record says)")
    subcommand.add_argument(
        "--calibration", metavar="FILE", help="where the calibration data are now (where the record says)"
    )
    json_argument(subcommand)


def run(options: argparse.Namespace) -> int:
    from ..publishing.reproduction import reproduce

    result = reproduce(
        options.folder,
        options.out,
        model=options.model,
        calibration=options.calibration,
        progress=progress_bar(options),
    )
    write_json(options, asdict(result))
    if not result.identical:
        raise CheckFailed(_told(options, result))
    print(f"{options.out} is {options.folder} again, bit for bit")
    return 0


def _told(options: argparse.Namespace, result: Reproduction) -> str:
    """Return how what was made again differs."""
    if result.misrecorded == result.differing:
        return (
            f"{options.out} is {options.folder} again, but the record of {options.folder} has another SHA-256 of "
            f"{', '.join(result.misrecorded)}: the record is damaged, take it from where the checkpoint was made."
        )
    head = f"{options.out} differs from {options.folder} in {', '.join(result.differing)}"
    if result.largest_difference == 0:
        return f"{head}; all weights are equal: another version of lvlm-exporter or transformers writes other files."
    return (
        f"{head}, by at most {result.largest_difference:.1e}: another machine, thread count or torch version rounds "
        "differently."
    )
