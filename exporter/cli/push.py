"""The subcommand `push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import json_argument, trust_argument
from .exit_codes import complain
from .from_flags import progress_bar, write_json

SUMMARY = "publish a checkpoint on the hub"
EXAMPLE = "push small USER/NAME --private"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folder", type=Path, metavar="DIR", help="checkpoint or ONNX folder")
    subcommand.add_argument("repo_id", metavar="USER/NAME", help="repository, which is made where there is none")
    subcommand.add_argument(
        "--private", action="store_true", help="make the repository private; one that exists must be private already"
    )
    subcommand.add_argument(
        "--revision", metavar="R", help="branch, which is made from main where there is none (main)"
    )
    subcommand.add_argument("--create-pr", action="store_true", help="open a pull request, and leave the branch alone")
    subcommand.add_argument("--message", help="message of the commit")
    subcommand.add_argument("--dry-run", action="store_true", help="only say what would be published; needs no token")
    subcommand.add_argument("--device", default="cpu", help="device on which the checkpoint is verified first (cpu)")
    trust_argument(subcommand)
    json_argument(subcommand)


def run(options: argparse.Namespace) -> int:
    import logging

    from ..publishing.push import describe, push

    progress_bar(options)
    # huggingface_hub warns of every retry, with the storage's signed addresses, which are as good as passwords.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    names = ("private", "revision", "create_pr", "dry_run", "message", "device", "trust_remote_code")
    try:
        done = push(options.folder, options.repo_id, **{name: getattr(options, name) for name in names})
    except KeyboardInterrupt:
        return complain("interrupted; nothing was committed. The same command goes on from there.", 130)
    write_json(options, done.to_data())
    print(describe(done))
    return 0
