"""The command line: parse, call, print. Heavy imports wait until a subcommand is known to be called for.

Exit codes: 0 done; 1 a check ran and did not hold; 2 wrong input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from .. import ranks
from ..errors import CheckFailed, InputError
from ..version import __version__
from . import (
    bench,
    card,
    compare,
    compress,
    convert,
    evaluate,
    families,
    heal,
    onnx,
    push,
    reproduce,
    route,
    score,
    search,
    verify,
)
from .arguments import Parser, add_subcommand
from .exit_codes import complain, reason_of
from .outputs import check_outputs


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, ranks.interrupted)
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        options = parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
        with ranks.joined(options.subcommand, ranks.SHARED, words):
            return _ran(options)
    except InputError as error:
        return complain(str(error), 2)
    except CheckFailed as error:
        return complain(str(error), 1)
    except KeyboardInterrupt as error:
        return complain(str(error) or "interrupted; nothing was left behind.", 130)
    except ranks.PeerLost as error:
        return complain(str(error), 2)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if reason := reason_of(error):
            return complain(reason, 2)
        raise


def _ran(options: argparse.Namespace) -> int:
    """Run the subcommand. Returns: the exit code, that of the first process where there are several."""
    if ranks.is_first():
        check_outputs(options)
    code = int(options.run(options) or 0)
    return ranks.from_first(lambda: code or (2 if getattr(options, "unsaved", False) else 0))


def parser(called: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all subcommands.

    Args:
        called: the subcommand that is called; the others then declare no arguments. None: all declare theirs.
    """
    top = Parser(
        prog="lvlm-exporter",
        description="Turn a large vision-language model into a smaller, faster standalone checkpoint.",
    )
    top.add_argument("--version", action="version", version=f"lvlm-exporter {__version__}")
    subcommands = top.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, module in SUBCOMMANDS.items():
        subcommand = add_subcommand(subcommands, name, module.SUMMARY, module.EXAMPLE, shared=name in ranks.SHARED)
        if called in (None, name):
            module.add_arguments(subcommand)
        subcommand.set_defaults(run=module.run, subcommand=name)
    return top


SUBCOMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        score,
        compress,
        heal,
        route,
        search,
        verify,
        reproduce,
        evaluate,
        bench,
        compare,
        card,
        onnx,
        push,
        families,
        convert,
    )
}
