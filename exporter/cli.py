"""The command line: parse, call, print. One function a verb; heavy imports wait until a verb is known to be called for.

Exit codes: 0 done; 1 a check ran and did not hold; 2 wrong input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import CheckFailed, InputError
from .recipe import (
    DEFAULT_FOLD,
    DEFAULT_LOCALIZER,
    DEFAULT_SAMPLES,
    FOLD_NAMES,
    LOCALIZER_NAMES,
    Recipe,
    RunOptions,
    load_recipe,
    recipe_from_data,
)

MODEL, DATA = "examples/digits/model", "examples/digits/data"


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _interrupted)
    options = parser().parse_args(arguments)
    try:
        return int(options.verb(options) or 0)
    except InputError as error:
        return _complain(str(error), 2)
    except CheckFailed as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was left behind.", 130)
    except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return _complain(f"{error.filename}: {error.strerror}.", 2)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if reason := _out_of_resources(error):
            return _complain(reason, 2)
        raise


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def _complain(message: str, code: int) -> int:
    print(f"lvlm-exporter: {message}", file=sys.stderr)
    return code


def _out_of_resources(error: Exception) -> str | None:
    import errno

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; nothing was kept."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: lower --batch-size, or give --memory so that the model is streamed from disk."
    return None


# --- arguments --------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    from . import __version__

    top = argparse.ArgumentParser(
        prog="lvlm-exporter",
        description="Turn a large vision-language model into a smaller, faster standalone checkpoint.",
    )
    top.add_argument("--version", action="version", version=f"lvlm-exporter {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    score = _verb(
        verbs,
        "score",
        score_verb,
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
        compress_verb,
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
    compress.add_argument("--base-model", metavar="USER/NAME", help="hub id for the card, if MODEL is a folder")
    compress.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")
    _run_arguments(compress)

    verify = _verb(verbs, "verify", verify_verb, "load a checkpoint in a clean process and check it", "verify small")
    verify.add_argument("folder", metavar="DIR", help="folder or hub id")
    verify.add_argument("--device", default="cpu")

    again = _verb(
        verbs,
        "reproduce",
        reproduce_verb,
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
        evaluate_verb,
        "exact match on a task, and fidelity to the original",
        f"evaluate small --reference {MODEL} --task {DATA}/test.jsonl",
    )
    evaluate.add_argument("folders", nargs="+", metavar="DIR", help="checkpoints: folders or hub ids")
    evaluate.add_argument("--task", required=True, metavar="FILE.jsonl", help="questions with answers")
    evaluate.add_argument("--reference", metavar="MODEL", help="the model they were made from")
    evaluate.add_argument("--samples", type=int, metavar="N", help="only N of the questions, drawn with --seed")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    evaluate.add_argument(
        "--predictions", type=Path, metavar="FILE.jsonl", help="keep every answer; a broken-off run goes on from there"
    )
    evaluate.add_argument("--no-card", action="store_true", help="leave the checkpoints' records and cards alone")
    _run_arguments(evaluate, batch_size=32)

    compare = _verb(
        verbs,
        "compare",
        compare_verb,
        "compare localizers, folds and budgets on your model and data",
        "compare examples/digits/compare.yaml --out comparison",
    )
    compare.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for table, picture and JSON")
    _run_arguments(compare, batch_size=32)

    card = _verb(verbs, "card", card_verb, "write the model card of a checkpoint again", "card small")
    card.add_argument("folder", type=Path, metavar="DIR")

    push = _verb(verbs, "push", push_verb, "publish a checkpoint on the hub", "push small USER/NAME --private")
    push.add_argument("folder", type=Path, metavar="DIR")
    push.add_argument("repo_id", metavar="USER/NAME", help="repository; made if it is not there")
    push.add_argument("--private", action="store_true", help="only for you; one that is there must be so already")
    push.add_argument("--revision", metavar="R", help="branch; made from main if it is not there (main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="say what would be published, and stop; needs no token")
    push.add_argument("--device", default="cpu", help="that the checkpoint is verified on first")
    for verb in (verify, again, card, push):
        _json_argument(verb)
    return top


def _verb(verbs: Any, name: str, function: Any, summary: str, example: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  lvlm-exporter {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(verb=function)
    return verb


def _calibration_arguments(verb: argparse.ArgumentParser, required: bool) -> None:
    verb.add_argument(
        "--calibration",
        required=required,
        metavar="FILE",
        help="images with questions: a JSONL file, a folder of images, or datasets:ID",
    )
    verb.add_argument("--samples", type=int, metavar="N", help=f"how many are drawn from it ({DEFAULT_SAMPLES})")
    verb.add_argument(
        "--columns", action="append", default=[], metavar="ROLE=NAME", help="of a data set: image=NAME, question=NAME"
    )
    verb.add_argument("--split", help="of a data set (train)")
    verb.add_argument("--prompt", help="question put to the images of a folder")
    verb.add_argument("--seed", type=int, help="of every random draw (0)")


def _localizer_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--localizer", choices=LOCALIZER_NAMES, help=f"({DEFAULT_LOCALIZER})")
    verb.add_argument("--localizer-option", action="append", default=[], metavar="NAME=VALUE")
    verb.add_argument("--protect", type=_layer_list, metavar="0,1", help="layers that must stay")


def _budget_arguments(verb: argparse.ArgumentParser) -> None:
    budget = verb.add_mutually_exclusive_group()
    budget.add_argument("--drop-layers", type=int, metavar="N", help="how many layers go")
    budget.add_argument("--drop-ratio", type=float, metavar="R", help="share of the layers that goes, 0.25")
    budget.add_argument("--target-params", type=_count, metavar="P", help="parameters that may be left, 5.2B")
    budget.add_argument("--layers", type=_layer_list, metavar="8,9,10", help="exactly these go")


def _run_arguments(verb: argparse.ArgumentParser, batch_size: int = 8) -> None:
    verb.add_argument("--device", help="cpu, cuda, cuda:1, auto (the first GPU, else the CPU)")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (auto: float32 on the CPU)")
    verb.add_argument("--memory", metavar="12GB", help="most that the device may hold; the rest is streamed from disk")
    verb.add_argument("--batch-size", type=int, default=batch_size, metavar="B")
    _json_argument(verb)


def _json_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    verb.add_argument("--quiet", action="store_true", help="no progress bars")


def _layer_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of layers like 8,9,10") from error


def _count(text: str) -> int:
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    try:
        return int(float(text.rstrip("KMBkmb")) * units.get(text[-1:].upper(), 1))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of parameters like 5.2B") from error


def _pairs(values: Sequence[str], flag: str) -> dict[str, Any]:
    import yaml

    pairs = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not equals:
            raise InputError(f"{flag} {value}: NAME=VALUE is needed.")
        pairs[name] = yaml.safe_load(content)
    return pairs


def _recipe(options: argparse.Namespace, budget_needed: bool = True) -> Recipe:
    """The recipe that the flags spell out, or the file's."""
    spelled = {key: getattr(options, key) for key in ("drop_layers", "drop_ratio", "target_params")}
    spelled["layers"] = list(options.layers) if options.layers is not None else None
    spelled = {key: value for key, value in spelled.items() if value is not None}
    if not spelled and not budget_needed:
        spelled = {"drop_layers": 0}
    calibration = {
        "data": options.calibration,
        "samples": options.samples,
        "split": options.split,
        "prompt": options.prompt,
        "columns": _pairs(options.columns, "--columns") or None,
    }
    spelled["calibration"] = {k: v for k, v in calibration.items() if v is not None}
    for kind in ("localizer", "fold"):
        name = getattr(options, kind, None)
        extra = _pairs(getattr(options, f"{kind}_option", []), f"--{kind}-option")
        default = DEFAULT_LOCALIZER if kind == "localizer" else DEFAULT_FOLD
        if name or extra:
            spelled[kind] = {"name": name or default, **extra}
    for key in ("model", "seed", "base_model"):
        if getattr(options, key, None) is not None:
            spelled[key] = getattr(options, key)
    if options.protect is not None:
        spelled["protect"] = list(options.protect)
    if getattr(options, "recipe", None) is not None:
        if extra_flags := [key for key, value in spelled.items() if value]:
            raise InputError(f"--recipe says everything: take out {', '.join(sorted(extra_flags))}, or the recipe.")
        return load_recipe(options.recipe)
    if "model" not in spelled or "data" not in spelled["calibration"]:
        raise InputError("compress needs MODEL and --calibration FILE, or --recipe FILE.yaml.")
    return recipe_from_data(spelled)


def _run_options(options: argparse.Namespace) -> RunOptions:
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: at least 1 is needed.")
    return RunOptions(options.device, options.dtype, options.memory, options.batch_size)


def _progress(options: argparse.Namespace) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()
    if options.quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()

    def bar(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
        from tqdm import tqdm

        return tqdm(items, what, total, disable=True if options.quiet else None, leave=False)

    return bar


def _write_json(options: argparse.Namespace, data: dict[str, Any]) -> None:
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=2, default=str) + "\n")


# --- verbs ------------------------------------------------------------------------------------------------------------


def score_verb(options: argparse.Namespace) -> None:
    recipe, run = _recipe(options, budget_needed=False), _run_options(options)
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {options.plot}: a .png, .svg or .pdf file is needed.")
    from . import pipeline, report

    job, scores = pipeline.score(recipe, run, _progress(options))
    print(report.scores_table(scores, job.source.parameters_per_layer, job.protect))
    if options.plot:
        report.plot_scores(scores, options.plot, job.protect)
        print(f"drawn: {options.plot}")
    _write_json(options, asdict(scores) | {"protect": job.protect, "num_layers": job.source.num_layers})


def compress_verb(options: argparse.Namespace) -> None:
    recipe, run = _recipe(options), _run_options(options)
    from . import checkpoint, pipeline

    if options.dry_run:
        dry_run(options, recipe, run)
        return
    folder = pipeline.compress(recipe, options.out, run, _progress(options))
    record = checkpoint.read_record(folder)
    plan, measured, source = record["plan"], record["measured"], record["source"]
    print(
        f"dropped layers {', '.join(map(str, plan['drop'])) or 'none'} of {plan['num_layers']}; "
        f"{source['parameters']:,} -> {measured['parameters']:,} parameters, "
        f"{source['bytes'] / 1e6:,.1f} -> {measured['bytes'] / 1e6:,.1f} MB, {measured['seconds']:.0f} s"
    )
    print(f"verified in a clean process. Checkpoint: {folder}, card: {folder / 'README.md'}")
    _write_json(options, {"path": str(folder), **{k: record[k] for k in ("plan", "measured", "scores", "fold")}})


def dry_run(options: argparse.Namespace, recipe: Recipe, run: RunOptions) -> None:
    from . import checkpoint, pipeline
    from .estimate import estimate

    checkpoint.check_target(options.out)
    job = pipeline.prepare(recipe, run, _progress(options))
    guess = estimate(job)
    checkpoint.check_space(options.out, guess.bytes_after)
    print(f"would drop {guess.drop} of {guess.layers} layers by {recipe.localizer.name}, fold by {job.fold.name}")
    print(
        f"parameters {guess.parameters:,} -> {guess.parameters_after:,}, weights {guess.bytes / 1e6:,.1f} -> "
        f"{guess.bytes_after / 1e6:,.1f} MB"
    )
    print(
        f"about {guess.seconds:.0f} s and {guess.memory_bytes / 1e9:.2f} GB on {job.device} for {guess.tokens:,} tokens"
    )
    _write_json(options, asdict(guess))


def verify_verb(options: argparse.Namespace) -> int:
    from .verification import verify

    result = verify(options.folder, options.device)
    _write_json(
        options, {"path": str(result.folder), "holds": result.holds, "problems": result.problems, **result.details}
    )
    if not result.holds:
        raise CheckFailed(f"{options.folder} does not verify: {'; '.join(result.problems)}.")
    details = result.details
    print(
        f"{options.folder} verifies: {details['class']} with {details['layers']} layers loads in a clean process, "
        f"every key in its place; {len(details['tokens'])} reference tokens as at export; cached = uncached within "
        f"{details['cache_difference']:.1e}"
    )
    return 0


def reproduce_verb(options: argparse.Namespace) -> int:
    from .reproduction import reproduce

    result = reproduce(
        options.folder, options.out, model=options.model, calibration=options.calibration, progress=_progress(options)
    )
    _write_json(options, asdict(result))
    if not result.identical:
        raise CheckFailed(
            f"{options.out} differs from {options.folder} in {', '.join(result.differing)}, by at most "
            f"{result.largest_difference:.1e}: another machine, thread count or torch version rounds differently."
        )
    print(f"{options.out} is {options.folder} again, bit for bit")
    return 0


def evaluate_verb(options: argparse.Namespace) -> None:
    run = _run_options(options)
    from . import report
    from .evaluation import evaluate

    done = evaluate(
        options.folders,
        options.task,
        reference=options.reference,
        options=run,
        samples=options.samples,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        predictions=options.predictions,
        update_cards=not options.no_card,
        progress=_progress(options),
    )
    print(report.evaluation_table(done))
    _write_json(options, done.to_data())


def compare_verb(options: argparse.Namespace) -> None:
    run = _run_options(options)
    from . import report
    from .comparison import compare, load_grid

    done = compare(load_grid(options.recipe), options.out, run, _progress(options))
    print(report.comparison_table(done))
    print(f"written: {options.out / 'table.md'}, {options.out / 'accuracy.png'}, {options.out / 'results.json'}")
    _write_json(options, asdict(done))


def card_verb(options: argparse.Namespace) -> None:
    from .model_card import card

    path = card(options.folder)
    print(path)
    _write_json(options, {"path": str(path)})


def push_verb(options: argparse.Namespace) -> int:
    import logging

    from .hub import describe, push

    _progress(options)
    # huggingface_hub warns of every retry, with the storage's signed addresses, which are as good as passwords.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    names = ("private", "revision", "create_pr", "dry_run", "message", "device")
    try:
        done = push(options.folder, options.repo_id, **{name: getattr(options, name) for name in names})
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was committed. The same command goes on from there.", 130)
    print(describe(done))
    _write_json(options, done.to_data())
    return 0
