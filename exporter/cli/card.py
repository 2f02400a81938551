"""The subcommand `card`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import json_argument
from .from_flags import write_json

SUMMARY = "write the model card of a checkpoint again"
EXAMPLE = "card small"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folder", type=Path, metavar="DIR")
    json_argument(subcommand)


def run(options: argparse.Namespace) -> None:
    from ..publishing.folder_kinds import card

    path = card(options.folder)
    write_json(options, {"path": str(path)})
    print(path)
