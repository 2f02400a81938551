"""The command line: parse, call, print. One function a verb; heavy imports wait until a verb is known to be called for.

Exit codes: 0 done; 1 a check ran and did not hold; 2 wrong input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from . import arguments as command_line
from .errors import CheckFailed, InputError
from .outputs import check_outputs, save, save_json
from .recipe import (
    DEFAULT_FOLD,
    DEFAULT_LOCALIZER,
    ROUTER_SAMPLES,
    Recipe,
    RouterRecipe,
    RunOptions,
    load_recipe,
    recipe_from_data,
    router_from_data,
)


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        options = parser().parse_args(arguments)
        check_outputs(options)
        code = int(options.verb(options) or 0)
        return code or (2 if getattr(options, "unsaved", False) else 0)
    except InputError as error:
        return _complain(str(error), 2)
    except CheckFailed as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted; nothing was left behind.", 130)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if reason := _reason(error):
            return _complain(reason, 2)
        raise


def parser() -> argparse.ArgumentParser:
    return command_line.build(VERBS)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def _complain(message: str, code: int) -> int:
    print(f"lvlm-exporter: {message}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str | None:
    import errno

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; nothing was kept."
    if isinstance(error, ValueError) and "features and image tokens do not match" in str(error):
        return f"processor and config.json do not fit each other, copy both from the base model: {error}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: lower --batch-size, or give --memory so that the model is streamed from disk."
    return None


# --- from arguments to what the library takes ------------------------------------------------------------------------


def _pairs(values: Sequence[str], flag: str) -> dict[str, Any]:
    import yaml

    pairs = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not equals:
            raise InputError(f"{flag} {value}: NAME=VALUE is needed.")
        try:
            pairs[name] = yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise InputError(f"{flag} {value}: what follows the equals sign is no YAML value.") from error
    return pairs


def _recipe(options: argparse.Namespace, budget_needed: bool = True) -> Recipe:
    """The recipe that the flags spell out, or the file's."""
    spelled = {key: getattr(options, key) for key in ("drop_layers", "drop_ratio", "target_params")}
    spelled["layers"] = list(options.layers) if options.layers is not None else None
    spelled = {key: value for key, value in spelled.items() if value is not None}
    if not spelled and not budget_needed:
        spelled = {"drop_layers": 0}
    spelled["calibration"] = _calibration(options)
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
    if getattr(options, "router", False):
        spelled["router"] = True
    if getattr(options, "recipe", None) is not None:
        if extra_flags := [key for key, value in spelled.items() if value]:
            raise InputError(f"--recipe says everything: take out {', '.join(sorted(extra_flags))}, or the recipe.")
        return load_recipe(options.recipe)
    if "model" not in spelled or "data" not in spelled["calibration"]:
        raise InputError("compress needs MODEL and --calibration FILE, or --recipe FILE.yaml.")
    return recipe_from_data(spelled)


def _calibration(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the questions."""
    said = {
        "data": options.calibration,
        "samples": options.samples,
        "split": options.split,
        "prompt": options.prompt,
        "columns": command_line.columns_of(options.columns) or None,
        "config": options.config,
        "allow_urls": options.allow_urls or None,
    }
    return {k: v for k, v in said.items() if v is not None}


def _router(options: argparse.Namespace) -> RouterRecipe:
    """The router that the flags of `route` spell out."""
    names = ("steps", "candidates", "drop_at", "learning_rate", "seed", "batch_size")
    spelled = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    spelled["calibration"] = {"samples": ROUTER_SAMPLES} | _calibration(options)
    extra = _pairs(options.loss_option, "--loss-option")
    if options.loss or extra:
        spelled["loss"] = {"name": options.loss or RouterRecipe.loss.name, **extra}
    return router_from_data(spelled)


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
    if options.json is not None and not save_json(options.json, data):
        options.unsaved = True


# --- verbs ------------------------------------------------------------------------------------------------------------


def score_verb(options: argparse.Namespace) -> None:
    recipe, run = _recipe(options, budget_needed=False), _run_options(options)
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {options.plot}: a .png, .svg or .pdf file is needed.")
    from . import pipeline, report

    job, scores = pipeline.score(recipe, run, _progress(options))
    _write_json(options, asdict(scores) | {"protect": job.protect, "num_layers": job.source.num_layers})
    print(report.scores_table(scores, job.source.parameters_per_layer, job.protect))
    if options.plot:
        if save(options.plot, lambda path: report.plot_scores(scores, path, job.protect)):
            print(f"drawn: {options.plot}")
        else:
            options.unsaved = True


def compress_verb(options: argparse.Namespace) -> None:
    recipe, run = _recipe(options), _run_options(options)
    from . import checkpoint, pipeline

    if options.dry_run:
        dry_run(options, recipe, run)
        return
    folder = pipeline.compress(recipe, options.out, run, _progress(options))
    record = checkpoint.read_record(folder)
    plan, measured, source = record["plan"], record["measured"], record["source"]
    _write_json(options, {"path": str(folder), **{k: record[k] for k in ("plan", "measured", "scores", "fold")}})
    print(
        f"dropped layers {', '.join(map(str, plan['drop'])) or 'none'} of {plan['num_layers']}; "
        f"{source['parameters']:,} -> {measured['parameters']:,} parameters, "
        f"{source['bytes'] / 1e6:,.1f} -> {measured['bytes'] / 1e6:,.1f} MB, {measured['seconds']:.0f} s"
    )
    print(f"verified in a clean process. Checkpoint: {folder}, card: {folder / 'README.md'}")


def dry_run(options: argparse.Namespace, recipe: Recipe, run: RunOptions) -> None:
    from . import checkpoint, pipeline
    from .estimate import estimate
    from .plan import may_break_period

    checkpoint.check_target(options.out)
    job = pipeline.prepare(recipe, run, _progress(options))
    guess = estimate(job)
    checkpoint.check_space(options.out, guess.bytes_after)
    _write_json(options, asdict(guess))
    print(f"would drop {guess.drop} of {guess.layers} layers by {recipe.localizer.name}, fold by {job.fold.name}")
    print(
        f"parameters {guess.parameters:,} -> {guess.parameters_after:,}, weights {guess.bytes / 1e6:,.1f} -> "
        f"{guess.bytes_after / 1e6:,.1f} MB"
    )
    if broken := may_break_period(job.source.config, guess.drop, recipe.budget.layers):
        print(f"lvlm-exporter: {options.out.name}: {broken}", file=sys.stderr)
    print(
        f"about {guess.seconds:.0f} s and {guess.memory_bytes / 1e9:.2f} GB on {job.device} for {guess.tokens:,} tokens"
        f", as much as {guess.forward_passes:.1f} forward passes over them"
    )


def route_verb(options: argparse.Namespace) -> None:
    router, run = _router(options), _run_options(options)
    from . import checkpoint, pipeline

    try:
        folder = pipeline.route(options.model, router, options.out, run, _progress(options))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from the last saved step.") from None
    record = checkpoint.read_record(folder)
    made = record["router"]
    _write_json(options, {"path": str(folder), **{k: made[k] for k in made if k != "reference"}})
    print(
        f"trained a router of {made['parameters']:,} parameters on {made['questions']} questions in "
        f"{made['seconds']:.0f} s, {made['held_out']} held out"
        + f"; {options.model} had one, which stays behind"
        * made["replaces_another"]
    )
    probes = {k: v for step in made["curve"] for k, v in step.items() if k.startswith("KL")}
    print("\n".join(f"  {name}: {value:.4f}" for name, value in probes.items()))
    print(f"verified in a clean process. Checkpoint: {folder}, card: {folder / 'README.md'}")


def verify_verb(options: argparse.Namespace) -> int:
    from .kinds import verify
    from .onnx.manifest import is_onnx

    result = verify(options.folder, options.device, options.trust_remote_code)
    _write_json(
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
    from .budgets import Wanted
    from .evaluation import evaluate

    wanted = Wanted(options.keep_visual_tokens, options.keep_layers, options.preset, options.rule, options.drop_at)
    done = evaluate(
        options.folders,
        options.task,
        reference=options.reference,
        budgets=wanted,
        calibration=options.calibration,
        options=run,
        samples=options.samples,
        seed=options.seed,
        **command_line.data_of(options),
        max_new_tokens=options.max_new_tokens,
        predictions=options.predictions,
        update_cards=not options.no_card,
        progress=_progress(options),
    )
    _write_json(options, done.to_data())
    print(report.evaluation_table(done))


def bench_verb(options: argparse.Namespace) -> int:
    from . import report
    from .benchmark import BenchOptions, bench
    from .workload import Workload

    how = ("device", "dtype", "new_tokens", "rounds", "attention", "compile")
    done = bench(
        options.folders,
        reference=options.reference,
        budgets=_budgets(options),
        workload=Workload(
            options.task, options.visual_tokens, options.text_tokens, options.seed, **command_line.data_of(options)
        ),
        options=BenchOptions(batches=options.batch, **{name: getattr(options, name) for name in how}),
        update_cards=not options.no_card,
        progress=_progress(options),
    )
    _write_json(options, done.to_data())
    print(report.benchmark_table(done))
    done.check_caches()
    return 0


def _budgets(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each preset that is named, and each number of tokens with each number of layers."""
    budgets: list[dict[str, Any]] = [{"preset": name} for name in options.preset]
    if options.keep_visual_tokens or options.keep_layers:
        for tokens in options.keep_visual_tokens or (None,):
            for layers in options.keep_layers or (None,):
                budgets.append({"keep_visual_tokens": tokens, "keep_layers": layers})
    return budgets


def compare_verb(options: argparse.Namespace) -> None:
    run = _run_options(options)
    from . import report
    from .comparison import compare, grid_from_data
    from .recipe import from_yaml
    from .route_comparison import RouteTables, compare_routes, table_text, tables_from_data
    from .zoo_comparison import compare_zoo, zoo_from_data, zoo_text

    def parse(data: Any) -> Any:
        if isinstance(data, dict) and "models" in data:
            return zoo_from_data(data)
        return tables_from_data(data) if isinstance(data, dict) and "rows" in data else grid_from_data(data)

    wanted = from_yaml(options.recipe, parse)
    done: Any
    if isinstance(wanted, tuple):
        tables = compare_zoo(wanted, options.out, run, _progress(options))
        print(zoo_text(tables))
        print(f"written: {options.out / 'table.md'}, {options.out / 'results.json'}, and a folder for each model")
        _write_json(options, {name: [asdict(row) for row in rows] for name, rows in tables.items()})
        return
    if isinstance(wanted, RouteTables):
        done = compare_routes(wanted, options.out, run, _progress(options))
        text = table_text(done)
    else:
        done = compare(wanted, options.out, run, _progress(options))
        text = report.comparison_table(done)
    _write_json(options, done.to_data())
    print(text)
    print(f"written: {options.out / 'table.md'}, {options.out / 'accuracy.png'}, {options.out / 'results.json'}")


def card_verb(options: argparse.Namespace) -> None:
    from .kinds import card

    path = card(options.folder)
    _write_json(options, {"path": str(path)})
    print(path)


def onnx_verb(options: argparse.Namespace) -> None:
    from .onnx import ExportOptions, export
    from .onnx.manifest import read_manifest
    from .onnx.report import differences_table

    _progress(options)
    names = ("device", "dtype", "quantize", "opset", "calibration", "samples", "trust_remote_code")
    folder = export(options.folder, options.out, ExportOptions(**{name: getattr(options, name) for name in names}))
    manifest = read_manifest(folder)
    _write_json(options, {"path": str(folder), **manifest})
    print(differences_table(manifest))
    print(f"validated in a clean process. ONNX folder: {folder}")


def push_verb(options: argparse.Namespace) -> int:
    import logging

    from .hub import describe, push

    _progress(options)
    # huggingface_hub warns of every retry, with the storage's signed addresses, which are as good as passwords.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    names = ("private", "revision", "create_pr", "dry_run", "message", "device", "trust_remote_code")
    try:
        done = push(options.folder, options.repo_id, **{name: getattr(options, name) for name in names})
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was committed. The same command goes on from there.", 130)
    _write_json(options, done.to_data())
    print(describe(done))
    return 0


VERBS = {
    "score": score_verb,
    "compress": compress_verb,
    "route": route_verb,
    "verify": verify_verb,
    "reproduce": reproduce_verb,
    "evaluate": evaluate_verb,
    "bench": bench_verb,
    "compare": compare_verb,
    "card": card_verb,
    "onnx": onnx_verb,
    "push": push_verb,
}
