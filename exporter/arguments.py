"""What the command line understands: every verb with its arguments. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import InputError
from .recipe import (
    DEFAULT_FOLD,
    DEFAULT_LOCALIZER,
    DEFAULT_SAMPLES,
    FOLD_NAMES,
    LOCALIZER_NAMES,
    LOSS_NAMES,
    ROUTER_SAMPLES,
    RouterRecipe,
)

LARGEST = 10**12  # of a whole number behind a flag: more is a slip of the hand, and overflows further in
MODEL, DATA = "examples/digits/model", "examples/digits/data"


def build(functions: Mapping[str, Callable[[argparse.Namespace], int | None]]) -> argparse.ArgumentParser:
    """The parser of all verbs; `functions` has what each verb calls."""
    from . import __version__

    top = Parser(
        prog="lvlm-exporter",
        description="Turn a large vision-language model into a smaller, faster standalone checkpoint.",
    )
    top.add_argument("--version", action="version", version=f"lvlm-exporter {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    score = _verb(
        verbs,
        "score",
        "rank decoder layers by redundancy; writes nothing",
        f"score {MODEL} --calibration {DATA}/calibration.jsonl --plot scores.png",
    )
    score.add_argument("model", metavar="MODEL", help="folder or hub id (hub:USER/NAME@REVISION)")
    _calibration_arguments(score, required=True)
    _localizer_arguments(score)
    _budget_arguments(score)
    score.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scores")
    _run_arguments(score)

    compress = _verb(
        verbs,
        "compress",
        "remove redundant layers and write a standalone checkpoint",
        f"compress {MODEL} --out small --drop-ratio 0.25 --calibration {DATA}/calibration.jsonl",
    )
    compress.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub id (hub:USER/NAME@REVISION)")
    compress.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    compress.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="everything below, from a file")
    _budget_arguments(compress)
    _calibration_arguments(compress, required=False)
    _localizer_arguments(compress)
    compress.add_argument("--fold", choices=FOLD_NAMES, help=f"how dropped layers are made up for ({DEFAULT_FOLD})")
    compress.add_argument("--fold-option", action="append", default=[], metavar="NAME=VALUE")
    compress.add_argument("--router", action="store_true", help="train a router for the result too, see `route`")
    compress.add_argument("--base-model", metavar="USER/NAME", help="hub id for the card, if MODEL is a folder")
    compress.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")
    _run_arguments(compress)

    route = _verb(
        verbs,
        "route",
        "train a router that drops visual tokens and skips layers, question by question",
        f"route {MODEL} --out routed --calibration {DATA}/calibration.jsonl --steps 300",
    )
    route.add_argument("model", metavar="MODEL", help="folder or hub id, pruned or not")
    route.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    _calibration_arguments(route, required=True, samples=ROUTER_SAMPLES)
    route.add_argument("--steps", type=_positive, metavar="N", help=f"of training ({RouterRecipe.steps})")
    route.add_argument("--candidates", type=_whole, metavar="N", help="last layers that may be skipped (half of them)")
    route.add_argument("--drop-at", type=_whole, metavar="D", help="layer before which visual tokens leave (2)")
    route.add_argument("--learning-rate", type=_number, metavar="R", help=f"({RouterRecipe.learning_rate})")
    route.add_argument("--loss", choices=LOSS_NAMES, help="what is learnt from (importance); preference is the paper's")
    route.add_argument("--loss-option", action="append", default=[], metavar="NAME=VALUE")
    _run_arguments(route, batch_size=RouterRecipe.batch_size)

    verify = _verb(verbs, "verify", "load a checkpoint in a clean process and check it", "verify small")
    verify.add_argument("folder", metavar="DIR", help="folder or hub id")
    verify.add_argument("--device", default="cpu")
    _trust_argument(verify)

    again = _verb(
        verbs,
        "reproduce",
        "build a checkpoint again and compare it bit for bit",
        "reproduce small --out again",
    )
    again.add_argument("folder", metavar="DIR", help="folder or hub id")
    again.add_argument("--out", type=Path, required=True, metavar="DIR2")
    again.add_argument("--model", metavar="MODEL", help="where the source lies now")
    again.add_argument("--calibration", metavar="FILE", help="where the calibration data lie now")

    evaluate = _verb(
        verbs,
        "evaluate",
        "exact match on a task, and fidelity to the original",
        f"evaluate small --reference {MODEL} --task {DATA}/test.jsonl",
    )
    evaluate.add_argument("folders", nargs="+", metavar="DIR", help="checkpoints: folders or hub ids")
    evaluate.add_argument("--task", required=True, metavar="FILE.jsonl", help="questions with answers")
    evaluate.add_argument("--reference", metavar="MODEL", help="the model they were made from")
    _route_arguments(evaluate)
    evaluate.add_argument("--samples", type=_positive, metavar="N", help="only N of the questions, drawn with --seed")
    evaluate.add_argument("--seed", type=_seed, default=0)
    _data_arguments(evaluate, "(the only one)")
    evaluate.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer")
    evaluate.add_argument(
        "--predictions", type=Path, metavar="FILE.jsonl", help="keep every answer; a broken-off run goes on from there"
    )
    evaluate.add_argument("--no-card", action="store_true", help="leave the checkpoints' records and cards alone")
    _run_arguments(evaluate, batch_size=32)

    bench = _verb(
        verbs,
        "bench",
        "time, memory and operations, in turn with the original",
        f"bench small --reference {MODEL} --task {DATA}/test.jsonl --batch 1,8",
    )
    bench.add_argument("folders", nargs="+", metavar="DIR", help="checkpoints: folders or hub ids")
    bench.add_argument("--reference", metavar="MODEL", help="what they are compared with, run whole (the first DIR)")
    _bench_arguments(bench)

    compare = _verb(
        verbs,
        "compare",
        "compare localizers, folds and budgets on your model and data",
        "compare examples/digits/compare.yaml --out comparison",
    )
    compare.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for table, picture and JSON")
    _run_arguments(compare, batch_size=32)

    card = _verb(verbs, "card", "write the model card of a checkpoint again", "card small")
    card.add_argument("folder", type=Path, metavar="DIR")

    onnx = _verb(
        verbs,
        "onnx",
        "write a checkpoint as ONNX graphs, validated against torch",
        f"onnx {MODEL} --out digits-onnx --calibration {DATA}/calibration.jsonl",
    )
    onnx.add_argument("folder", metavar="DIR", help="checkpoint: folder or hub id")
    onnx.add_argument("--out", type=Path, required=True, metavar="DIR2", help="folder to make")
    onnx.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what the graphs are fused for (cpu)")
    onnx.add_argument("--dtype", default="auto", help="float32, float16 (auto: float32 for the CPU, float16 for CUDA)")
    onnx.add_argument("--quantize", metavar="int8", help="integer weights in the decoder: int8, int4")
    onnx.add_argument("--opset", type=_positive, metavar="N", help="version of ONNX's operators (20)")
    onnx.add_argument("--calibration", metavar="FILE", help="questions to compare with torch on, beside the usual ones")
    onnx.add_argument("--samples", type=_positive, default=8, metavar="N", help="how many are drawn from it (8)")

    _trust_argument(onnx)

    push = _verb(verbs, "push", "publish a checkpoint on the hub", "push small USER/NAME --private")
    push.add_argument("folder", type=Path, metavar="DIR")
    push.add_argument("repo_id", metavar="USER/NAME", help="repository; made if it is not there")
    push.add_argument("--private", action="store_true", help="only for you; one that is there must be so already")
    push.add_argument("--revision", metavar="R", help="branch; made from main if it is not there (main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="say what would be published, and stop; needs no token")
    push.add_argument("--device", default="cpu", help="that the checkpoint is verified on first")
    _trust_argument(push)
    for verb in (verify, again, card, onnx, push):
        _json_argument(verb)
    for name, verb in verbs.choices.items():
        verb.set_defaults(verb=functions[name])
    return top


def _verb(verbs: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  lvlm-exporter {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return verb


def _calibration_arguments(verb: argparse.ArgumentParser, required: bool, samples: int = DEFAULT_SAMPLES) -> None:
    verb.add_argument(
        "--calibration",
        required=required,
        metavar="FILE",
        help="images with questions: a JSONL file, a folder of images, or datasets:ID",
    )
    verb.add_argument("--samples", type=_positive, metavar="N", help=f"how many are drawn from it ({samples})")
    _data_arguments(verb, "(train)")
    verb.add_argument("--prompt", help="question put to the images of a folder")
    verb.add_argument("--seed", type=_seed, help="of every random draw (0)")


def _data_arguments(verb: Any, split: str) -> None:
    """How a data source is read: of a parser, or of a group of one."""
    verb.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="of a data set: image, question, messages, answer, type, choices",
    )
    verb.add_argument("--split", metavar="S", help=f"of a data set {split}")
    verb.add_argument("--config", metavar="NAME", help="of a data set that has several configurations")
    verb.add_argument("--allow-urls", action="store_true", help="fetch images that stand as http(s) addresses")


def _localizer_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--localizer", choices=LOCALIZER_NAMES, help=f"({DEFAULT_LOCALIZER})")
    verb.add_argument("--localizer-option", action="append", default=[], metavar="NAME=VALUE")
    verb.add_argument("--protect", type=_layer_list, metavar="0,1", help="layers that must stay")


def _budget_arguments(verb: argparse.ArgumentParser) -> None:
    budget = verb.add_mutually_exclusive_group()
    budget.add_argument("--drop-layers", type=_whole, metavar="N", help="how many layers go")
    budget.add_argument("--drop-ratio", type=_number, metavar="R", help="share of the layers that goes, 0.25")
    budget.add_argument("--target-params", type=_count, metavar="P", help="parameters that may be left, 5.2B")
    budget.add_argument("--layers", type=_layer_list, metavar="8,9,10", help="exactly these go")


def _bench_arguments(verb: argparse.ArgumentParser) -> None:
    budget = verb.add_argument_group("budgets of routed checkpoints", "lists are measured one by one; else the default")
    budget.add_argument("--keep-visual-tokens", type=_token_counts, default=(), metavar="T", help="144 or 0.5,0.25")
    budget.add_argument("--keep-layers", type=_layer_counts, default=(), metavar="L", help="28,24")
    budget.add_argument("--preset", type=_names, default=(), metavar="NAME", help="of the checkpoint; off: all of it")
    prompt = verb.add_argument_group("prompts", "random images and words, or those of a task")
    prompt.add_argument("--visual-tokens", type=_positive, metavar="N", help="visual tokens of a prompt (one image's)")
    prompt.add_argument("--text-tokens", type=_positive, metavar="N", help="its other tokens, the template's too")
    prompt.add_argument("--task", metavar="FILE.jsonl", help="its first lines, in place of random prompts")
    _data_arguments(prompt, "(the only one)")
    prompt.add_argument(
        "--new-tokens", type=_positive, default=32, metavar="N", help="decoding steps of an answer (32)"
    )
    verb.add_argument("--batch", type=_row_counts, default=(1,), metavar="1,8", help="rows, one size after the other")
    verb.add_argument("--rounds", type=_whole, default=10, metavar="N", help="runs of each model, even (10)")
    verb.add_argument("--attention", metavar="NAME", help="eager, sdpa, flash_attention_2 (the checkpoint's own)")
    verb.add_argument("--compile", action="store_true", help="torch.compile of the layers' norms and MLPs")
    verb.add_argument("--device", help="cpu, cuda, cuda:1 (the first GPU, else the CPU)")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (auto: float32 on the CPU)")
    verb.add_argument("--seed", type=_seed, default=0)
    verb.add_argument("--no-card", action="store_true", help="leave the checkpoints' records and cards alone")
    _json_argument(verb)


def _route_arguments(verb: argparse.ArgumentParser) -> None:
    budget = verb.add_argument_group("budgets of routed checkpoints", "lists run one after the other")
    budget.add_argument(
        "--keep-visual-tokens", type=_token_counts, default=(), metavar="T", help="counts or shares: 144 or 0.5,0.25"
    )
    budget.add_argument("--keep-layers", type=_layer_counts, default=(), metavar="L", help="how many layers run: 28,24")
    budget.add_argument("--preset", type=_names, default=(), metavar="NAME", help="presets of the checkpoint, or off")
    budget.add_argument(
        "--rule", default="router", help="who chooses: router, random, fastv, shortgpt, fastv+shortgpt ... (router)"
    )
    budget.add_argument(
        "--drop-at", type=_whole, metavar="D", help="layer before which tokens leave (the router's; 2 for fastv)"
    )
    budget.add_argument("--calibration", metavar="FILE", help="images with questions, for the rule shortgpt")


def _run_arguments(verb: argparse.ArgumentParser, batch_size: int = 8) -> None:
    verb.add_argument("--device", help="cpu, cuda, cuda:1, auto (the first GPU, else the CPU)")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (auto: float32 on the CPU)")
    verb.add_argument(
        "--memory", type=_memory, metavar="12GB", help="most that the device may hold; the rest is streamed from disk"
    )
    verb.add_argument("--batch-size", type=_positive, default=batch_size, metavar="B")
    _json_argument(verb)


def _trust_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python of the folder even where it is not a file that lvlm-exporter ships",
    )


def _json_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    verb.add_argument("--quiet", action="store_true", help="no progress bars")


# --- what stands behind a flag ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, like all others, in place of the usage and a sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}. See `{self.prog} --help`.")


def _whole(text: str) -> int:
    """A whole number. What may stand there is checked where it is used: it depends on the model."""
    try:
        number = int(text)
    except ValueError as error:  # no number, or one of thousands of digits
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no whole number") from error
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: at most {LARGEST:,} is needed")
    return number


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1 is needed")
    return number


def _seed(text: str) -> int:
    """A seed that every generator takes: 32 bits, without a sign."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no whole number") from error
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a number from 0 to {2**32 - 1} is needed")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no number") from error
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' is no finite number")
    return number


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", text.strip(), re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no size like 12GB or 800MiB")
    return text.strip()


def _whole_numbers(text: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(_whole(part) for part in text.split(",") if part.strip())
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no list of {what}") from error


def _layer_list(text: str) -> tuple[int, ...]:
    return _whole_numbers(text, "layers like 8,9,10")


def _row_counts(text: str) -> tuple[int, ...]:
    return _whole_numbers(text, "numbers of rows like 1,8")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _token_counts(text: str) -> tuple[int | float | None, ...]:
    """'0.5,144,all': shares have a point."""
    try:
        return tuple(None if p == "all" else float(p) if "." in p else int(p) for p in _names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of counts or shares like 144 or 0.5,0.25") from error


def _layer_counts(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part == "all" else int(part) for part in _names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers of layers like 28,24") from error


def _count(text: str) -> int:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    try:
        return int(float(text.rstrip("KMBkmb")) * units.get(text[-1:].upper(), 1))
    except (ValueError, OverflowError) as error:  # NaN and infinity among them
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no number of parameters like 5.2B") from error


# --- from flags to what the library takes -----------------------------------------------------------------------------


def columns_of(values: Sequence[str]) -> dict[str, str]:
    """ROLE=NAME, where a name is text whatever it looks like."""
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
    """How the flags say that a task is read."""
    read = {name: getattr(options, name) for name in ("split", "config", "allow_urls")}
    return {"columns": columns_of(options.columns), **read}
