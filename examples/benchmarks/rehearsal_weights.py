"""The rehearsal with weights: random ones of a real checkpoint's shapes, and what a compression of them takes.

See `rehearsal.py`, which is what is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

import exporter
from exporter.checkpoints.source import open_source
from exporter.compression.estimate import Estimate, Rates, estimate, flops_per_second
from exporter.compression.job import prepare
from exporter.models.loading import PartSizes
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Method, Recipe, RunOptions

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))
from hollow import QUESTION, published, with_layers, write_random
from stage_meter import measured_stages

PICTURE = (336, 336)  # width and height
ASKED = ("what is to be seen", "which colour is it", "is it day or night", "how many are there")
MEASURED_BYTES = 1 << 30  # of a shard, that the disk's rate is read off
Told = dict[str, Any]


def with_weights(options: argparse.Namespace, work: Path) -> str:
    """Make a checkpoint and questions, compress it in a process of its own, and return what that took as a table."""
    folder, questions = options.checkpoint or work / "model", work / "questions.jsonl"
    begin = time.perf_counter()
    if not folder.exists():
        row = published(options.model)
        row["config"]["dtype"] = row["config"]["text_config"]["dtype"] = options.dtype
        write_random(row if options.layers is None else with_layers(row, options.layers), folder)
    made = time.perf_counter() - begin
    write_questions(questions, options.questions)
    command = [sys.executable, __file__, json.dumps({**vars(options), "folder": folder, "work": work}, default=str)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    told = {**json.loads(said.splitlines()[-1]), "made": made}
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=2))
    return table(told)


def write_questions(path: Path, number: int) -> None:
    """Write questions about pictures of random points, each of its own, without answers."""
    random = numpy.random.default_rng(0)
    lines = []
    for index in range(number):
        name = f"{index:04d}.png"
        Image.fromarray(random.integers(0, 256, (*PICTURE[::-1], 3), dtype=numpy.uint8)).save(path.parent / name)
        lines.append(json.dumps({"image": name, "question": f"{QUESTION} {ASKED[index % len(ASKED)]}?"}))
    path.write_text("".join(f"{line}\n" for line in lines))


def compressed(told: Told) -> Told:
    """Compress as the options say, and return what was told before and what it took. The result is removed."""
    folder, work = Path(told["folder"]), Path(told["work"])
    questions, localizer = str(work / "questions.jsonl"), Method(told["localizer"])
    data = CalibrationData(questions, samples=told["questions"], answer_tokens=told["answer_tokens"])
    recipe = Recipe(str(folder), data, LayerBudget(drop_layers=told["drop_layers"]), localizer=localizer)
    run = RunOptions("cpu", told["dtype"], memory=told["memory"], batch_size=told["batch_size"])
    job = prepare(recipe, run)
    rates = Rates(flops_per_second(job), read_rate(folder))
    guess = estimate(job, rates)
    sizes = PartSizes.of(open_source(str(folder)), job.dtype.itemsize)
    del job
    begin, cpu = time.perf_counter(), time.process_time()
    with measured_stages() as meter:
        small = exporter.compress(recipe, work / "small", run)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    record = json.loads((small / "compression.json").read_text())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_of_others": meter.peak_of_others,
        "layer": max(sizes.layers),
        "beside": sizes.beside,
        "rates": dataclasses.asdict(rates),
        "guess": dataclasses.asdict(guess),
        "stages": {name: dataclasses.asdict(taken) for name, taken in meter.stages.items()},
        "source": record["source"]["bytes"],
        "measured": record["measured"],
        "plan": record["plan"],
        "fold": record["fold"]["name"],
        "verification": record["verification"],
        "answer_tokens": record["calibration"]["answer_tokens"],
        "questions": record["calibration"]["samples"],
        "memory": told["memory"],
    }


def read_rate(folder: Path) -> float:
    """Return the bytes a second that a shard is read with, where the system keeps it or from the disk."""
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with shard.open("rb", buffering=0) as file:
        begin, read = time.perf_counter(), 0
        while read < MEASURED_BYTES and (part := file.read(64 << 20)):
            read += len(part)
    return read / (time.perf_counter() - begin)


def table(told: Told) -> str:
    """Return what was told before and what was measured, as Markdown."""
    guess, checkpoint = Estimate(**told["guess"]), told["source"]
    allowed = 3 * told["layer"] + told["beside"]
    lines = [
        f"{checkpoint / 1e9:.2f} GB made in {told['made']:.0f} s; {told['measured']['bytes'] / 1e9:.2f} GB without "
        f"layers {', '.join(map(str, told['plan']['drop']))} of {told['plan']['num_layers']}, fold '{told['fold']}'; "
        f"{told['questions']} questions, {told['answer_tokens']} tokens of answers",
        f"rates measured before: {told['rates']['flops_per_second'] / 1e9:,.0f} GFLOPS, "
        f"{told['rates']['bytes_per_second'] / 1e9:.2f} GB/s",
        f"peak memory {told['peak'] / 1e9:.2f} GB with --memory {told['memory']} (3 layers and what is no layer: "
        f"{allowed / 1e9:.2f} GB); of the process that verifies {told['peak_of_others'] / 1e9:.2f} GB; "
        f"told {guess.memory_bytes / 1e9:.2f} GB",
        f"weights read {told['measured']['bytes_read'] / checkpoint:.2f} times the checkpoint; "
        f"told {(guess.bytes_to_read or 0) / checkpoint:.2f}",
        f"time {told['seconds']:,.0f} s, of the processor {told['cpu_seconds']:,.0f} s; told {guess.seconds:,.0f} s",
        f"verification: {told['verification']['reason'] or 'loaded'}",
        "",
        "| stage | time, s | of the processor | told | weights read ÷ checkpoint | peak memory, GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, taken in told["stages"].items():
        lines.append(
            f"| {name} | {taken['seconds']:,.1f} | {taken['cpu_seconds']:,.1f} | {before_of(name, guess)} "
            f"| {taken['bytes_read'] / checkpoint:.2f} | {taken['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def before_of(stage: str, guess: Estimate) -> str:
    """Return the seconds that were told of a stage before; what is written and hashed is told as one."""
    seconds = guess.stages.get("copy" if stage == "write" else stage)
    return "-" if seconds is None else f"{seconds:,.1f}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(compressed(json.loads(sys.argv[1]))))
