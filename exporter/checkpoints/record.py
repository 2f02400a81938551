"""compression.json: what a checkpoint says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import check_written, replace_text
from .shapes import (
    ANYTHING,
    COUNT,
    FLAG,
    HASHES,
    INNER_PATH,
    NUMBER,
    POSITIVE,
    TEXT,
    Kind,
    ListOf,
    MapOf,
    Maybe,
    Misfit,
    check,
    one_of,
    read_json,
    require_file,
)

RECORD = "compression.json"
FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16")
TENSOR = Kind('"layer N\'s NAME"', lambda value: isinstance(value, str) and value.count("'s ") == 1)
LICENCE = MapOf(TEXT)
REFERENCE = {"tokens": ListOf(COUNT), "margins": ListOf(NUMBER)}
RATE = {"n": COUNT, "accuracy": NUMBER}
FIGURES = {
    "n": COUNT,
    "accuracy": NUMBER,
    "interval": ListOf(NUMBER, 2),
    "by_type": MapOf(RATE),
    "kl?": Maybe(NUMBER),
    "agreement?": Maybe(NUMBER),
}
BUDGET = {
    "preset": Maybe(TEXT),
    "keep_visual_tokens": Maybe(NUMBER),
    "keep_layers": Maybe(COUNT),
    "rule": TEXT,
    "drop_at": Maybe(COUNT),
}
EVALUATION = {
    "task": TEXT,
    "fingerprint": TEXT,
    **FIGURES,
    "kl": Maybe(NUMBER),
    "agreement": Maybe(NUMBER),
    "budget?": Maybe(BUDGET),
    "flops_share?": Maybe(NUMBER),
    "decoder_flops_share?": Maybe(NUMBER),
    "reference": Maybe(FIGURES),
}
RATIOS = {
    **{f"{name}?": Maybe(NUMBER) for name in ("prefill_ms", "first_token_ms", "decode_ms", "flops", "kv_bytes")},
    "peak_bytes?": Maybe(NUMBER),
    "achieved": MapOf(Maybe(NUMBER)),
}
TIMES = {"batch": POSITIVE, "visual_tokens": COUNT, "text_tokens": COUNT, "prefill_ms": NUMBER, "decode_ms": NUMBER}
NOT_EMPTY = Kind("a list that is not empty", lambda value: isinstance(value, list) and bool(value))
BENCHMARK_HEAD = {
    "budget": Maybe(MapOf(ANYTHING)),
    "runtime": TEXT,
    "hardware": {"device": TEXT, "threads?": Maybe(COUNT)},
    "workload": {"task": Maybe(TEXT)},
    "options": {"new_tokens": COUNT, "rounds": COUNT},
    "date": TEXT,
    "versions": {"transformers": TEXT, "torch": TEXT},
}  # what was run, and on what
ROUTER = {
    "settings": {
        "drop_at": COUNT,
        "candidates": ListOf(COUNT),
        "presets": MapOf({"keep_visual_tokens?": NUMBER, "keep_layers?": COUNT}),
        "default": TEXT,
    },
    "parameters": COUNT,
    "questions": COUNT,
    "held_out": COUNT,
    "curve": ListOf(MapOf(NUMBER)),
    "reference": REFERENCE,
}
HELD_OUT = {"kl": NUMBER, "interval": ListOf(NUMBER, 2), "questions": COUNT, "pictures": COUNT, "same_answers": NUMBER}
HEALED = {
    "kept": FLAG,
    "steps": COUNT,
    "steps_run": COUNT,
    "steps_kept": COUNT,
    "parameters": COUNT,
    "questions": COUNT,
    "pairs": COUNT,
    "answer_tokens": COUNT,
    "curve": ListOf(MapOf(NUMBER)),
    "before": HELD_OUT,
    "after?": HELD_OUT,
    "adapter?": {"file": INNER_PATH, "sha256": TEXT},
    "teacher": {"name": TEXT, "revision": Maybe(TEXT)},
    "fingerprint": TEXT,
}
CHECKPOINT = {
    "recipe": MapOf(ANYTHING),
    "run": {
        "device": TEXT,
        "dtype": one_of(*DTYPES),
        "batch_size": POSITIVE,
        "memory": Maybe(TEXT),
    },
    "source": {
        "name": TEXT,
        "revision": Maybe(TEXT),
        "model_type": TEXT,
        "base_model": Maybe(TEXT),
        "license": LICENCE,
        "parameters": POSITIVE,
        "bytes": COUNT,
        "kv_bytes_per_token": COUNT,
        "files": HASHES,
        "unexpected_keys?": ListOf(TEXT),
    },
    "calibration": {"data": TEXT, "samples": COUNT, "fingerprint": TEXT, "tokens": MapOf(COUNT)},
    "protect": ListOf(COUNT),
    "scores": {"method": TEXT, "values": ListOf(NUMBER), "drop": ListOf(COUNT), "details": MapOf(ANYTHING)},
    "plan": {"num_layers": POSITIVE, "drop": ListOf(COUNT), "keep": ListOf(COUNT)},
    "fold": {"name": TEXT, "reason": TEXT, "tensors": ListOf(TENSOR)},
    "reference": {**REFERENCE, "dtype": one_of(*DTYPES)},
    "evaluations": ListOf(EVALUATION),
    "versions": {"exporter": TEXT, "transformers": TEXT, "torch": TEXT},
    "measured": {"parameters": COUNT, "bytes": COUNT, "seconds": NUMBER, "kv_bytes_per_token": COUNT, "files": HASHES},
    "heal?": HEALED,
    "router?": ROUTER,
    "routes?": ListOf({"file": INNER_PATH, "question": TEXT}),
    "benchmarks?": ListOf(BENCHMARK_HEAD),
}


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint folder.

    Raises: InputError where there is none, or where any part of it is missing or not what it should be.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}.")
    if not path.exists():
        raise InputError(f"{folder} has no {RECORD}: it is no checkpoint that lvlm-exporter wrote.")
    require_file(path, "a record of lvlm-exporter")
    try:
        record = read_json(path)
        if not isinstance(record, dict) or "recipe" not in record:
            raise InputError(f"{path} is no record of lvlm-exporter: it has no 'recipe'.")
        check_format(record, path)
        check(record, CHECKPOINT)
        _check_together(record)
    except Misfit as misfit:
        raise InputError(f"{path} is damaged ({misfit}): take it from where the checkpoint was made.") from misfit
    return record


def check_format(record: dict[str, Any], path: Path) -> None:
    version = record.get("format", FORMAT)
    check(version, POSITIVE, "format")
    if version > FORMAT:
        raise InputError(
            f"{path} has format {version}, this version of lvlm-exporter reads {FORMAT}: upgrade lvlm-exporter."
        )


def _check_together(record: dict[str, Any]) -> None:
    """Check what one part says against another."""
    layers = record["plan"]["num_layers"]
    if sorted([*record["plan"]["drop"], *record["plan"]["keep"]]) != list(range(layers)) or not record["plan"]["keep"]:
        raise Misfit(f"'plan' does not keep or drop each of its {layers} layers once")
    if len(record["scores"]["values"]) != layers:
        raise Misfit(f"'scores.values' has {len(record['scores']['values'])} numbers for {layers} layers")
    tokens = record["calibration"]["tokens"]
    if tokens and not {"visual", "text"} <= tokens.keys():
        raise Misfit("'calibration.tokens' is without 'visual' or 'text'")
    answers = {"reference": record["reference"]}
    if "router" in record:
        answers["router.reference"] = record["router"]["reference"]
        _check_curve(record["router"]["curve"], "router")
    for name, answer in answers.items():
        if len(answer["tokens"]) != len(answer["margins"]) or not answer["tokens"]:
            raise Misfit(f"'{name}' has {len(answer['tokens'])} tokens and {len(answer['margins'])} margins")
    if (healed := record.get("heal")) and healed["kept"] and not {"after", "adapter"} <= healed.keys():
        raise Misfit("'heal' was kept and has no 'after' or no 'adapter'")
    if "heal" in record:
        _check_curve(record["heal"]["curve"], "heal")
    for index, entry in enumerate(record["evaluations"]):
        _check_evaluation(entry, f"evaluations[{index}]")
    for index, entry in enumerate(record.get("benchmarks", [])):
        _check_benchmark(entry, f"benchmarks[{index}]")


def _check_curve(curve: list[dict[str, float]], part: str) -> None:
    if not curve or any(not {"step", "loss"} <= point.keys() for point in curve):
        raise Misfit(f"'{part}.curve' has a point without 'step' or 'loss', or none at all")


def _check_evaluation(entry: dict[str, Any], where: str) -> None:
    if entry.get("budget") and None in (entry.get("flops_share"), entry.get("decoder_flops_share")):
        raise Misfit(f"'{where}' is under a budget and has no share of FLOPs")
    base = entry["reference"]
    missing = entry["by_type"].keys() - base["by_type"].keys() if base and len(entry["by_type"]) > 1 else ()
    if missing:
        raise Misfit(f"'{where}.reference.by_type' has no {min(missing)!r:.80}")


def _check_benchmark(entry: dict[str, Any], where: str) -> None:
    """Check the figures of each batch; with the first one and the reference's the card tells what was run."""
    for name, shape in (("batches", {**TIMES, "ratio_to_reference": RATIOS}), ("reference", TIMES)):
        check(entry.get(name), NOT_EMPTY, f"{where}.{name}")
        check(entry[name], ListOf(shape), f"{where}.{name}")
    check(entry, {"reference_is_this_model": FLAG}, where)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """compression.json."""
    replace_json(folder / RECORD, record)


def replace_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file in one step, so that a reader never meets half of it."""
    replace_text(path, json.dumps(data, indent=2) + "\n")


def check_updatable(folder: Path) -> None:
    """Raise InputError, before the work, where a folder's record and card could not be told what is measured."""
    if not folder.is_dir():
        return  # a name on the hub: nothing is written there
    if (folder / RECORD).exists():
        read_record(folder)
    check_written(folder)
