"""The subcommand `reproduce`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..errors import CheckFailed
from .arguments import json_argument
from .from_flags import progress_bar, write_json

SUMMARY = "build a checkpoint again and compare it bit for bit"
EXAMPLE = "reproduce small --out again"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folder", metavar="DIR", help="folder or hub id")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR2")
    subcommand.add_argument("--model", metavar="MODEL", help="where the source lies now")
    subcommand.add_argument("--calibration", metavar="FILE", help="where the calibration data lie now")
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
        raise CheckFailed(
            f"{options.out} differs from {options.folder} in {', '.join(result.differing)}, by at most "
            f"{result.largest_difference:.1e}: another machine, thread count or torch version rounds differently."
        )
    print(f"{options.out} is {options.folder} again, bit for bit")
    return 0
