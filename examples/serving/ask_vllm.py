"""Ask vLLM; run by `against_vllm.py` in the environment that has it, through files.

    python ask_vllm.py JOB.json ANSWERS.json

A job is a list of engines: {"folder", "options" of vllm.LLM, "new_tokens", "rounds"}. A round is a list of
requests that are put at once: {"prompt", "images": [files], "videos": [files of frames], "kwargs":
mm_processor_kwargs}. Written are, for each engine, the rounds' answers, {"prompt": ids, "tokens": ids} or {"error":
sentence}; or {"start": sentence} where the engine does not start.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

NEW_TOKENS = 12


def main() -> None:
    job, out = (Path(argument) for argument in sys.argv[1:])
    inspect_here()
    answers = []
    for engine in json.loads(job.read_text()):
        answers.append(ask(engine))
        print(engine["name"], answers[-1].get("start", "asked"), flush=True)
        gc.collect()
        out.write_text(json.dumps(answers))


def inspect_here() -> None:
    """Have vLLM look at its classes in this process: one of its own for each spares a GPU, which is not here."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def ask(engine: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "seed": 0, **engine["options"]}
    try:
        model = LLM(engine["folder"], disable_log_stats=True, **options)
    except Exception as error:
        return {"start": sentence_of(error)}
    new_tokens = engine.get("new_tokens", NEW_TOKENS)
    return {"rounds": [put(model, requests, new_tokens) for requests in engine["rounds"]]}


def put(model: Any, requests: list[dict[str, Any]], new_tokens: int) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    try:
        greedily = SamplingParams(temperature=0, max_tokens=new_tokens)
        outputs = model.generate([prompt_of(request) for request in requests], greedily, use_tqdm=False)
    except Exception as error:
        return [{"error": sentence_of(error)}]
    return [
        {"prompt": list(o.prompt_token_ids), "tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens or 0}
        for o in outputs
    ]


def prompt_of(request: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    prompt: dict[str, Any] = {"prompt": request["prompt"], "multi_modal_data": {}}
    if request.get("images"):
        prompt["multi_modal_data"]["image"] = [Image.open(file).convert("RGB") for file in request["images"]]
    if request.get("videos"):
        import numpy as np

        prompt["multi_modal_data"]["video"] = [with_times(np.load(file)) for file in request["videos"]]
    if request.get("kwargs"):
        prompt["mm_processor_kwargs"] = request["kwargs"]
    return prompt


def with_times(frames: Any) -> tuple[Any, dict[str, Any]]:
    """Return frames [F, H, W, 3] with what vLLM asks of a video beside them: two frames a second, none left out."""
    number = len(frames)
    times = {"fps": 2.0, "duration": number / 2, "total_num_frames": number, "frames_indices": list(range(number))}
    return frames, {**times, "video_backend": "opencv", "do_sample_frames": False}


def sentence_of(error: BaseException) -> str:
    """Return the sentence of the first cause; what is no ValueError of ours comes with its traceback on stderr."""
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
