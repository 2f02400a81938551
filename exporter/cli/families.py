"""The subcommand `families`."""

from __future__ import annotations

import argparse

from .arguments import json_argument
from .from_flags import progress_bar, write_json

SUMMARY = "print which model types can be compressed, routed and exported, and why others can't"
EXAMPLE = "families llava qwen3_5"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "types", metavar="TYPE", nargs="*", help="model types to try out now, on small random models"
    )
    subcommand.add_argument(
        "--all", action="store_true", help="try out every image-text-to-text type, which takes minutes"
    )
    json_argument(subcommand)


def run(options: argparse.Namespace) -> None:
    from ..survey.table import as_data, listed_findings, markdown, try_types

    tried = options.types or options.all
    findings = try_types(options.types, progress_bar(options)) if tried else listed_findings()
    write_json(options, as_data(findings))
    print(markdown(findings))
