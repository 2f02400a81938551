"""Ask a server of vLLM by the OpenAI client; run by `speed.py` in the environment that has both, through files.

    python ask_server.py JOB.json ANSWERS.json

A job is {"url", "model", "new_tokens", "add_special_tokens", "rounds"}; a round {"in_flight", "requests"}; a request
{"question", "image", "kwargs"}. Written are, for each round, its wall time and each request's tokens, seconds to the
first of them and seconds in all; or the sentence with which the server refuses it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

from openai import APIStatusError, AsyncOpenAI


async def main() -> None:
    job_file, out = (Path(argument) for argument in sys.argv[1:])
    job = json.loads(job_file.read_text())
    client = AsyncOpenAI(base_url=job["url"], api_key="none", max_retries=0, timeout=600)
    answers = []
    for number, one in enumerate(job["rounds"]):
        places = asyncio.Semaphore(one["in_flight"])
        begun = time.perf_counter()
        asked = await asyncio.gather(*(ask(client, job, request, places) for request in one["requests"]))
        answers.append({"wall_s": time.perf_counter() - begun, "answers": asked})
        print(f"round {number + 1} of {len(job['rounds'])}: {answers[-1]['wall_s']:.1f} s", flush=True)
        out.write_text(json.dumps(answers))


async def ask(client: Any, job: Any, request: Any, places: asyncio.Semaphore) -> dict[str, Any]:
    """Return the tokens of one streamed answer, and when they came."""
    picture = base64.b64encode(Path(request["image"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": request["question"]},
    ]
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if job["add_special_tokens"]:  # where the chat template writes no begin token and the tokenizer has one
        extra["add_special_tokens"] = True
    if request.get("kwargs"):
        extra["mm_processor_kwargs"] = request["kwargs"]
    async with places:
        tokens: list[int] = []
        begun, first = time.perf_counter(), 0.0
        try:
            stream = await client.chat.completions.create(
                model=job["model"],
                messages=[{"role": "user", "content": content}],
                max_tokens=job["new_tokens"],
                temperature=0,
                stream=True,
                extra_body=extra,
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    ids = (choice.model_extra or {}).get("token_ids") or []
                    first = first or (time.perf_counter() - begun if ids else 0.0)
                    tokens += ids
        except APIStatusError as error:
            return {"status": error.status_code, "error": error.message}
        return {"tokens": tokens, "first_s": first, "total_s": time.perf_counter() - begun}


if __name__ == "__main__":
    asyncio.run(main())
