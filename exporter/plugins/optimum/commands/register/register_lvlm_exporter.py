"""Our subcommands in optimum-cli, found by its plugin namespace: no folder above this file has an __init__.py.

optimum-cli lvlm SUBCOMMAND ...            every subcommand of lvlm-exporter
optimum-cli export lvlm-onnx DIR --out D2  lvlm-exporter onnx, where optimum's users look for an export
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class LvlmCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo("lvlm", "Make large vision-language models smaller and faster (lvlm-exporter).")
    SUBCOMMAND: tuple[str, ...] = ()  # what the command line of ours begins with

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER, help="as lvlm-exporter takes them; see lvlm-exporter --help")

    def run(self) -> None:
        from exporter.cli import main

        sys.exit(main([*self.SUBCOMMAND, *self.args.arguments]))


class LvlmOnnxCommand(LvlmCommand):
    COMMAND = CommandInfo("lvlm-onnx", "Export a vision-language model to ONNX, validated against torch.")
    SUBCOMMAND = ("onnx",)


REGISTER_COMMANDS = [LvlmCommand, (LvlmOnnxCommand, ExportCommand)]
