"""Measure what a first token of vLLM is made of; run by `speed.py --parts` in the environment that has vLLM.

    python first_token.py JOB.json ANSWERS.json

A job is {"folder", "prompt", "images", "presets", "turns"}. vLLM runs in this process on one thread, and answers one
request with one token at a time, under the presets in turn. Written are, for each preset, the tokens of its prompt and
the median milliseconds of processor time, which other work on the machine does not lengthen, of each part.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from ask_vllm import inspect_here, prompt_of

WARMING = 2  # first requests of each preset, which are left out


def main() -> None:
    import torch

    job_file, out = (Path(argument) for argument in sys.argv[1:])
    job = json.loads(job_file.read_text())
    torch.set_num_threads(1)
    inspect_here()
    out.write_text(json.dumps(measured(job)))


def measured(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the parts of each preset's first token, by name; "tokens" are those of the prompt."""
    from vllm import LLM, SamplingParams

    model = LLM(job["folder"], dtype="float32", enforce_eager=True, max_model_len=1024, disable_log_stats=True)
    spent = watched(model)
    one = SamplingParams(temperature=0, max_tokens=1)
    files = cycle(job["images"])
    found: dict[str, list[dict[str, float]]] = {preset: [] for preset in job["presets"]}
    for turn in range(job["turns"] + WARMING):
        for preset in job["presets"] if turn % 2 == 0 else reversed(job["presets"]):
            prompt = prompt_of({"prompt": job["prompt"], "images": [next(files)], "kwargs": {"preset": preset}})
            spent.clear()
            begun = time.process_time()
            (output,) = model.generate([prompt], one, use_tqdm=False)
            parts = {name: 1000 * seconds for name, seconds in spent.items()}
            total = 1000 * (time.process_time() - begun)
            found[preset].append({"total": total, **parts, "tokens": len(output.prompt_token_ids)})
    return {
        preset: {name: statistics.median(one[name] for one in these[WARMING:]) for name in these[-1]}
        for preset, these in found.items()
    }


def watched(model: Any) -> dict[str, float]:
    """Return where the seconds of the parts of a request are added up."""
    from exporter.plugins.vllm.processor import ServedProcessor

    worker = model.llm_engine.engine_core.engine_core.model_executor.driver_worker
    network = type(getattr(worker, "worker", worker).model_runner.model)
    spent: dict[str, float] = {}
    for owner, function, part in (
        (ServedProcessor, "apply", "processor"),
        (network, "embed_multimodal", "pictures"),
        (network, "shortened", "router"),
        (network, "forward", "decoder"),
    ):
        setattr(owner, function, timed(getattr(owner, function), part, spent))
    return spent


def timed(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        begun = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] = spent.get(part, 0.0) + time.process_time() - begun

    return call


if __name__ == "__main__":
    main()
