"""The command line: one file a subcommand, its arguments and its call together."""

from .entry import main, parser

__all__ = ["main", "parser"]
