"""Verify a checkpoint: load it with transformers alone, and compare its answer with the one recorded at export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .processing import PromptError, load_processor
from .reference import cache_difference, first_difference, reference_answer, reference_inputs

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of logits, relative to the largest


def verify(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Load with transformers alone and compare with what was recorded at export. {"problems": [...], ...}

    A folder with a router is looked at twice: as the plain model that it is without remote code, and routed. A type
    that transformers lacks is none without it: its routed class without a budget is its plain model.
    """
    _quiet()
    record = json.loads((folder / "compression.json").read_text(encoding="utf-8-sig"))
    # A checkpoint that was written without its model has no answer recorded yet: the first one is returned.
    report = verify_once(folder, device, record, record["reference"] or {}, trust=needs_code(folder))
    if "router" in record and not report["problems"]:
        routed = verify_once(folder, device, record, record["router"]["reference"], trust=True, routed=True)
        report["problems"] = [f"routed: {problem}" for problem in routed["problems"]]
        report["routed"] = routed
    if "serving" in record and not report["problems"]:
        served = verify_once(folder, device, record, record["serving"]["reference"], trust=True)
        report["problems"] = [f"served: {problem}" for problem in served["problems"]]
        report["served"] = served
    return report


def verify_once(
    folder: Path, device: str, record: dict[str, Any], reference: dict[str, Any], trust: bool, routed: bool = False
) -> dict[str, Any]:
    """Load, answer the reference question, with and without the cache.

    Args:
        trust: load by the folder's own modeling file; routed: by its router.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    dtype = record["run"]["dtype"]
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=trust
    )
    model.eval().to(device)
    if "preset" in reference:  # the default was set to another one since
        model.set_budget(reference["preset"])
    elif trust and not routed and "router" in record:
        model.set_budget("off")
    if problems := key_problems(report, record) + value_problems(model):
        return {"problems": problems}
    processor = load_processor(folder)
    tolerance = TOLERANCE[dtype]
    try:
        answer = reference_answer(model, processor)
    except PromptError as error:
        return {"problems": [str(error)]}
    tokens, expected = answer["tokens"], reference.get("tokens", answer["tokens"])
    margins = reference.get("margins", answer["margins"])
    if (at := first_difference(tokens, expected, margins, tolerance)) is not None:
        problems.append(f"token {at + 1} of the reference answer is {tokens[at]}, not {expected[at]} as at export")
    routing = {"prompt_length": reference_inputs(processor)["input_ids"].shape[1]} if routed else {}
    difference = cache_difference(model, processor, **routing)
    if not difference <= tolerance:
        problems.append(f"logits with and without the cache differ by {difference:.1e} (at most {tolerance:.0e})")
    return {
        "problems": problems,
        **answer,
        "cache_difference": difference,
        "class": type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
    }


def structure(folder: Path) -> dict[str, Any]:
    """Lay the model out without memory and compare every key and shape: {"problems": [...], ...}. Nothing is run."""
    import torch
    from transformers import AutoModelForImageTextToText

    _quiet()
    record = json.loads((folder / "compression.json").read_text(encoding="utf-8-sig"))
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, record["run"]["dtype"]),
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=needs_code(folder),
    )
    problems = key_problems(report, record)
    load_processor(folder)
    layers = model.config.get_text_config().num_hidden_layers
    if layers != len(record["plan"]["keep"]):
        problems.append(f"config.json says {layers} decoder layers, the record {len(record['plan']['keep'])}")
    return {"problems": problems, "class": type(model).__name__, "layers": layers}


def needs_code(folder: Path) -> bool:
    """Tell whether the type runs by a modeling file of the folder only: then its configuration comes from there."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    return "AutoConfig" in config.get("auto_map", {})


def key_problems(report: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Return what transformers says of keys that are missing, too many or of another shape."""
    problems = []
    tolerated = set(record["source"].get("unexpected_keys", ()))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(set(map(str, report[kind])) - tolerated)
        if names:
            problems.append(f"{len(names)} {kind.replace('_', ' ')}, {names[0]} among them")
    return problems


def value_problems(model: Any) -> list[str]:
    """Return which weights hold NaN or infinite values: an answer need not meet them."""
    wrong = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    return [f"{len(wrong)} tensors hold NaN or infinite values, {wrong[0]} among them"] if wrong else []


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
