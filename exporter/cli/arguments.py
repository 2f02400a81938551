"""Arguments that several subcommands share. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError
from ..methods import LOCALIZERS
from ..recipe import DEFAULT_LOCALIZER, DEFAULT_SAMPLES

LARGEST = 10**12  # of a whole number behind a flag: more is a slip of the hand, and overflows further in
MODEL, DATA = "examples/digits/model", "examples/digits/data"


def add_subcommand(
    subcommands: Any, name: str, summary: str, example: str, shared: bool = False
) -> argparse.ArgumentParser:
    """Declare a subcommand.

    Args:
        shared: several processes can do it.
    """
    many = f"\n\nseveral processes, a share of questions each:\n  torchrun --nproc-per-node 2 -m exporter {name} ..."
    subcommand: argparse.ArgumentParser = subcommands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  lvlm-exporter {example}{many if shared else ''}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return subcommand


def calibration_arguments(
    subcommand: argparse.ArgumentParser, required: bool, samples: int = DEFAULT_SAMPLES, answers: bool = False
) -> None:
    """Declare the questions; with `answers` also those that the model gave elsewhere."""
    subcommand.add_argument(
        "--calibration",
        required=required,
        metavar="FILE",
        help="images with questions: a JSONL file, a folder of images, or datasets:ID",
    )
    subcommand.add_argument(
        "--samples", type=positive_count, metavar="N", help=f"how many questions are drawn from it ({samples})"
    )
    data_arguments(subcommand, "(train)")
    subcommand.add_argument("--prompt", help="question put to the images of a folder")
    subcommand.add_argument("--seed", type=seed_number, help="seed of every random draw (0)")
    if answers:
        subcommand.add_argument(
            "--answers",
            metavar="FILE.jsonl",
            help="what the model answered to these questions elsewhere (evaluate --predictions), so that it need not "
            "here",
        )


def data_arguments(subcommand: Any, split: str) -> None:
    """Declare how a data source is read, for a parser or a group of one."""
    subcommand.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="name a data set's column for a role: image, question, messages, answer, type, choices, or one that a "
        "metric needs (category, question_id, index, hint, direct_answers, reference, caption)",
    )
    subcommand.add_argument("--split", metavar="S", help=f"split of a data set {split}")
    subcommand.add_argument("--config", metavar="NAME", help="configuration of a data set that has several")
    subcommand.add_argument(
        "--allow-urls", action="store_true", help="fetch images that are given as http(s) addresses"
    )
    subcommand.add_argument(
        "--frames", type=positive_count, metavar="N", help="most frames to take of a video file, evenly spread (8)"
    )


def localizer_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "--localizer", choices=tuple(LOCALIZERS), help=f"how the layers are chosen ({DEFAULT_LOCALIZER})"
    )
    subcommand.add_argument(
        "--localizer-option", action="append", default=[], metavar="NAME=VALUE", help="option of the localizer"
    )
    subcommand.add_argument("--protect", type=_none_or_layers, metavar="0,1", help="layers that must not be removed")


def layer_budget_arguments(subcommand: argparse.ArgumentParser) -> None:
    budget = subcommand.add_mutually_exclusive_group()
    budget.add_argument("--drop-layers", type=whole_number, metavar="N", help="how many layers to remove")
    budget.add_argument("--drop-ratio", type=number_in_range, metavar="R", help="share of the layers to remove: 0.25")
    budget.add_argument(
        "--target-params", type=parameter_count, metavar="P", help="most parameters that may remain: 5.2B"
    )
    budget.add_argument("--layers", type=layer_list, metavar="8,9,10", help="remove exactly these layers")


def bench_arguments(subcommand: argparse.ArgumentParser) -> None:
    budget_arguments(subcommand, "each value of a list is measured; without one, the checkpoint's default")
    prompt = subcommand.add_argument_group("prompts", "random images and words, or those of a task")
    prompt.add_argument(
        "--visual-tokens", type=positive_count, metavar="N", help="visual tokens of a prompt (those of one image)"
    )
    prompt.add_argument(
        "--text-tokens", type=positive_count, metavar="N", help="its other tokens, those of the chat template included"
    )
    prompt.add_argument("--task", metavar="FILE.jsonl", help="take its first lines as prompts")
    data_arguments(prompt, "(the only one)")
    prompt.add_argument(
        "--new-tokens", type=positive_count, default=32, metavar="N", help="tokens to decode for an answer (32)"
    )
    subcommand.add_argument(
        "--batch", type=_batch_sizes, default=(1,), metavar="1,8", help="batch sizes, each measured (1)"
    )
    subcommand.add_argument(
        "--rounds", type=whole_number, default=10, metavar="N", help="how often each model runs, an even number (10)"
    )
    subcommand.add_argument(
        "--in-flight",
        type=_batch_sizes,
        default=(),
        metavar="1,16,32",
        help="numbers of requests in flight, each measured: throughput, waits for the first and for each further token",
    )
    subcommand.add_argument("--attention", metavar="NAME", help="eager, sdpa, flash_attention_2 (the checkpoint's own)")
    subcommand.add_argument("--compile", action="store_true", help="compile the layers' norms and MLPs (torch.compile)")
    subcommand.add_argument(
        "--roofline", action="store_true", default=None, help="say how near the ideal each comes (always on a GPU)"
    )
    subcommand.add_argument("--device", help="cpu, cuda, cuda:1 (the first GPU, else the CPU)")
    subcommand.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (auto: float32 on the CPU)")
    subcommand.add_argument("--seed", type=seed_number, default=0)
    subcommand.add_argument("--no-card", action="store_true", help="leave the checkpoints' records and cards alone")
    json_argument(subcommand)


def route_budget_arguments(subcommand: argparse.ArgumentParser) -> None:
    budget = budget_arguments(subcommand, "each value of a list is evaluated; without one, the model runs whole")
    budget.add_argument(
        "--rule",
        default="router",
        help="what chooses tokens and layers: router, random, fastv, shortgpt, fastv+shortgpt ... (router)",
    )
    budget.add_argument(
        "--drop-at", type=whole_number, metavar="D", help="layer before which tokens leave (the router's; 2 for fastv)"
    )
    budget.add_argument("--calibration", metavar="FILE", help="images with questions, for the rule shortgpt")
    budget.add_argument(
        "--tell-question", action="store_true", help="tell a question-aware serving router the question"
    )


def budget_arguments(subcommand: argparse.ArgumentParser, description: str) -> Any:
    """Declare the budgets of a routed checkpoint; return their group."""
    budget = subcommand.add_argument_group("budgets of routed checkpoints", description)
    budget.add_argument(
        "--keep-visual-tokens", type=token_counts, default=(), metavar="T", help="counts or shares: 144 or 0.5,0.25"
    )
    budget.add_argument("--keep-layers", type=layer_counts, default=(), metavar="L", help="how many layers run: 28,24")
    budget.add_argument(
        "--preset", type=names, default=(), metavar="NAME", help="presets of the checkpoint; off: no budget"
    )
    budget.add_argument(
        "--flops", type=shares, default=(), metavar="F", help="shares of the decoder's FLOPs for a prompt: 0.6,0.4"
    )
    budget.add_argument(
        "--quality", type=shares, default=(), metavar="Q", help="shares of answers that stay as they are: 0.99"
    )
    return budget


def run_arguments(subcommand: argparse.ArgumentParser, batch_size: int = 8) -> None:
    subcommand.add_argument("--device", help="cpu, cuda, cuda:1, auto (the first GPU, else the CPU)")
    subcommand.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (auto: float32 on the CPU)")
    subcommand.add_argument(
        "--memory", type=_memory, metavar="12GB", help="most memory for the model; layers beyond are read from disk"
    )
    subcommand.add_argument(
        "--batch-size", type=positive_count, default=batch_size, metavar="B", help=f"questions at a time ({batch_size})"
    )
    json_argument(subcommand)


def trust_argument(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's Python code even if lvlm-exporter did not ship it",
    )


def json_argument(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    subcommand.add_argument("--quiet", action="store_true", help="no progress bars")


# --- what stands behind a flag ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, like all others, in place of the usage and a sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}. See `{self.prog} --help`.")


def whole_number(text: str) -> int:
    """Return a whole number. What may stand there is checked where it is used: it depends on the model."""
    try:
        number = int(text)
    except ValueError as error:  # no number, or one of thousands of digits
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no whole number") from error
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: at most {LARGEST:,} is needed")
    return number


def positive_count(text: str) -> int:
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1 is needed")
    return number


def seed_number(text: str) -> int:
    """Return a seed that every generator takes: 32 bits, without a sign."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no whole number") from error
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a number from 0 to {2**32 - 1} is needed")
    return number


def number_in_range(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no number") from error
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' is no finite number")
    return number


SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.IGNORECASE)


def _memory(text: str) -> str:
    if not SIZE.fullmatch(text.strip()):
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no size like 12GB or 800MiB")
    return text.strip()


def byte_count(text: str) -> int:
    """Return bytes of a size like 12GB or 800MiB."""
    match = SIZE.fullmatch(_memory(text))
    assert match is not None
    unit = 1024 if match[3] else 1000
    return round(float(match[1]) * float(unit ** (1 + "KMGT".index(match[2].upper()))))


def _whole_numbers(text: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(map(whole_number, text.removesuffix(",").split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no list of {what}") from error


def layer_list(text: str) -> tuple[int, ...]:
    return _whole_numbers(text, "layers like 8,9,10")


def _none_or_layers(text: str) -> tuple[int, ...]:
    """Read a list of layers; no text at all protects none, where a family has some that stay by default."""
    return layer_list(text) if text.strip() else ()


def _batch_sizes(text: str) -> tuple[int, ...]:
    return _whole_numbers(text, "numbers of rows like 1,8")


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def token_counts(text: str) -> tuple[int | float | None, ...]:
    """Read '0.5,144,all': shares have a point."""
    try:
        return tuple(None if p == "all" else float(p) if "." in p else int(p) for p in names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of counts or shares like 144 or 0.5,0.25") from error


def token_count(text: str) -> int | float:
    """Read '0.5' or '144': a share has a point."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no count or share like 144 or 0.25") from error


def shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of shares like 0.6,0.4") from error


def layer_counts(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part == "all" else int(part) for part in names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers of layers like 28,24") from error


def parameter_count(text: str) -> int:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    try:
        return int(float(text.rstrip("KMBkmb")) * units.get(text[-1:].upper(), 1))
    except (ValueError, OverflowError) as error:  # NaN and infinity among them
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no number of parameters like 5.2B") from error


# --- from flags to what the library takes -----------------------------------------------------------------------------


def columns_of(values: Sequence[str]) -> dict[str, str]:
    """Read ROLE=NAME, where a name is text whatever it looks like."""
    columns = {}
    for value in values:
        role, equals, name = value.partition("=")
        if not equals or not role.strip() or not name.strip():
            raise InputError(f"--columns {value}: ROLE=NAME is needed, image=photo for one.")
        if role.strip() in columns:
            raise InputError(f"--columns {value}: the column for '{role.strip()}' is named twice.")
        columns[role.strip()] = name.strip()
    return columns


def data_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return how the flags say that a task is read."""
    read = {name: getattr(options, name) for name in ("split", "config", "allow_urls", "frames")}
    return {"columns": columns_of(options.columns), **read}
