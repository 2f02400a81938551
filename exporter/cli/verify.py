"""The subcommand `verify`."""

from __future__ import annotations

import argparse

from ..errors import CheckFailed
from .arguments import json_argument, trust_argument
from .from_flags import write_json

SUMMARY = "load a checkpoint in a clean process and check it"
EXAMPLE = "verify small"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folder", metavar="DIR", help="folder or hub id")
    subcommand.add_argument("--device", default="cpu")
    trust_argument(subcommand)
    json_argument(subcommand)


def run(options: argparse.Namespace) -> int:
    from ..onnx.manifest import is_onnx
    from ..publishing.folder_kinds import verify

    result = verify(options.folder, options.device, options.trust_remote_code)
    write_json(
        options, {"path": str(result.folder), "holds": result.holds, "problems": result.problems, **result.details}
    )
    if not result.holds:
        raise CheckFailed(f"{options.folder} does not verify: {'; '.join(result.problems)}.")
    details = result.details
    if is_onnx(result.folder):
        print(
            f"{options.folder} verifies: its {details['graphs']} graph files are those that were compared with torch "
            f"(best token equal in {details['equal_tokens']} of {details['tokens']} cases, largest difference "
            f"{details['max_difference']:.1e})"
        )
        return 0
    if reason := details.get("structure_only"):
        print(
            f"{options.folder} verifies in its structure: every file as recorded, {details['class']} with "
            f"{details['layers']} layers, every key in its place; it was not loaded: {reason}"
        )
        return 0
    print(
        f"{options.folder} verifies: {details['class']} with {details['layers']} layers loads in a clean process, "
        f"every key in its place; {len(details['tokens'])} reference tokens as at export; cached = uncached within "
        f"{details['cache_difference']:.1e}"
    )
    return 0
