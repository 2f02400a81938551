"""Speed and memory of a checkpoint, measured in turn with the model that it was made from.

Every round runs every model once, in one order and in the next round in the other; ratios are taken between rounds that
lie side by side. What is compared with a ratio of times is counted, not timed: operations and bytes.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cards import model_card
from ..cards.card_file import results_first
from ..cards.model_card import model_name
from ..checkpoints import record as compression_record
from ..checkpoints.record import RECORD, check_updatable, read_record
from ..data.batches import Batch
from ..models.loading import compute_dtype, pick_device
from ..onnx.card import card
from ..onnx.manifest import is_onnx, read_manifest, write_record
from ..version import versions
from .figures import COUNTED, TIMED, Benchmark, BenchOptions, Figures, ModelBenchmark, plain_data
from .in_flight import LoadFigures, answer_lengths, measure_load
from .open_targets import Runtimes, onnx_device, onnx_versions, open_subjects
from .roofline import measure_roofline
from .subject import Cost, GenerateKwargs, Setup, Subject
from .timing import Spread, garbage_between_runs, interleaved, paired, peak_bytes
from .workload import Workload

SETTLE_S = 0.2  # between runs of different runtimes: each one's threads wait in busy loops for a while after a run


def bench(
    paths: str | Path | Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    budgets: Sequence[GenerateKwargs] = (),
    workload: Workload = Workload(),
    options: BenchOptions = BenchOptions(),
    update_cards: bool = True,
    roofline: bool | None = None,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> Benchmark:
    """Measure time, memory and FLOPs of checkpoints and ONNX folders, in turn with a reference in one process.

    Args:
        reference: the model that the others are compared with, without a budget; None: the first of the paths.
        budgets: of routed checkpoints, such as {"keep_visual_tokens": 144, "keep_layers": 28} or {"preset": "fast"};
            without any, they run under their own default. Plain checkpoints have none.
        update_cards: put the figures into the record and the card of checkpoints that are ours.
        roofline: measure what the device can do, and say how near each model comes; None: on a GPU.
    Raises: InputError for a budget without a routed checkpoint, or one that a router can't keep to.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    names = [str(path) for path in (*paths, *([reference] if reference else []))]
    device = pick_device(options.device or onnx_device(names))
    roofline = device.startswith("cuda") if roofline is None else roofline
    for path in paths if update_cards else ():
        check_updatable(Path(path))
    runtimes = Runtimes.of(Setup(device, options.dtype, options.attention, options.compile), options.new_tokens)
    subjects = open_subjects(runtimes, [str(path) for path in paths], reference, budgets)
    prompts = [[workload.batch(s.processor, s.config, sequences) for s in subjects] for sequences in options.batches]
    waiting = [[workload.batch(s.processor, s.config, sequences) for s in subjects] for sequences in options.in_flight]
    models = measure(
        subjects, prompts, options=options, device=device, compile_all=runtimes.torch.compile, progress=progress
    )
    loads = measure_loads(subjects, waiting, options=options, device=device, seed=workload.seed, progress=progress)
    done = Benchmark(
        workload=workload,
        options=options,
        hardware=hardware(device),
        versions=versions() | onnx_versions(subjects),
        date=datetime.date.today().isoformat(),
        models=tuple(replace(model, loads=of_model) for model, of_model in zip(models, loads, strict=True)),
        roofline=measure_roofline(device, compute_dtype(options.dtype, subjects[0].config, device))
        if roofline
        else None,
    )
    if update_cards:
        for model in done.models:
            with results_first(Path(model.path)):
                record_benchmark(Path(model.path), done, model)
    return done


def measure(
    subjects: Sequence[Subject],
    prompts: Sequence[Sequence[Batch]],
    options: BenchOptions,
    device: str,
    compile_all: Callable[[], None] = lambda: None,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> tuple[ModelBenchmark, ...]:
    """Return all figures of all subjects, the first of which is the reference.

    Args:
        prompts: for each batch size, one for each subject.
        compile_all: called after everything has been counted, since what is compiled can't be looked into.
    """
    timed = [
        [
            TimedModel(s, ready(prompt, s.input_device), options.new_tokens, device)
            for s, prompt in zip(subjects, column, strict=True)
        ]
        for column in prompts
    ]
    costs = [[run.subject.cost(run.prompt, run.new_tokens) for run in column] for column in timed]
    compile_all()
    columns = [_column(*pair, options.rounds, progress) for pair in zip(timed, costs, strict=True)]
    return tuple(
        ModelBenchmark(s.path, s.budget, s.runtime, tuple(column[i] for column in columns))
        for i, s in enumerate(subjects)
    )


@dataclass(frozen=True)
class TimedServer:
    """One subject that answers a batch of requests, token by token."""

    subject: Subject
    prompt: Batch

    def first(self) -> Any:
        return self.subject.prefill(self.prompt, self.subject.encode_images(self.prompt))

    def more(self, state: Any) -> Any:
        return self.subject.decode(state)


def measure_loads(
    subjects: Sequence[Subject],
    prompts: Sequence[Sequence[Batch]],
    options: BenchOptions,
    device: str,
    seed: int,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> list[tuple[LoadFigures, ...]]:
    """Return each subject's figures with so many requests in flight as `options` say, one after the other.

    Args:
        prompts: for each number of requests in flight, one batch for each subject.
    """
    columns = []
    for in_flight, column in zip(options.in_flight, prompts, strict=True):
        servers = [
            TimedServer(subject, ready(prompt, subject.input_device))
            for subject, prompt in zip(subjects, column, strict=True)
        ]
        for server in servers:  # the first pass at a size is slower
            server.more(server.first())
        lengths = answer_lengths(in_flight, options.new_tokens, seed)
        columns.append(
            measure_load(
                servers, lengths, in_flight=in_flight, rounds=options.rounds, now=lambda: now(device), progress=progress
            )
        )
    return [tuple(column[number] for column in columns) for number in range(len(subjects))]


def now(device: str) -> float:
    """Return the seconds of a clock, after all work that the device was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _column(
    timed: Sequence[TimedModel], costs: Sequence[Cost], rounds: int, progress: Callable[..., Iterable[Any]]
) -> list[Figures]:
    """Return the figures of all subjects at one batch size."""
    peaks = [run.peak_beyond(cost.weight_bytes) for run, cost in zip(timed, costs, strict=True)]
    times = time_interleaved(timed, rounds, progress)
    column_figures = [figures(*known) for known in zip(timed, costs, times, peaks, strict=True)]
    return [
        column_figures[0],
        *(compared(f, t, column_figures[0], times[0]) for f, t in zip(column_figures[1:], times[1:], strict=True)),
    ]


def ready(prompt: Batch, device: Any) -> Batch:
    """Put inputs on the device and drop a mask of ones, as `generate` does."""
    inputs = dict(prompt.inputs)
    if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return replace(prompt, inputs=inputs).to(device)


Times = dict[str, list[float]]  # milliseconds of each round, by name


@dataclass(frozen=True)
class TimedModel:
    """One answer of one subject."""

    subject: Subject
    prompt: Batch
    new_tokens: int
    device: str

    def peak_beyond(self, held: int) -> int | None:
        """Return bytes with those that the model holds anyhow, None where that can't be told; warms up as well."""
        self()
        if not self.subject.gives_memory_back:
            return None
        grown = peak_bytes(self, self.device)
        return None if grown is None else grown + held

    def __call__(self) -> dict[str, float]:
        begin = self._now()
        seen = self.subject.encode_images(self.prompt)
        vision = self._now()
        state = self.subject.prefill(self.prompt, seen)
        first = self._now()
        for _ in range(self.new_tokens):
            state = self.subject.decode(state)
        end = self._now()
        return {
            "vision_ms": 1e3 * (vision - begin),
            "prefill_ms": 1e3 * (first - vision),
            "first_token_ms": 1e3 * (first - begin),
            "decode_ms": 1e3 * (end - first) / self.new_tokens,
            "total_ms": 1e3 * (end - begin),
        }

    def _now(self) -> float:
        return now(self.device)


def time_interleaved(timed: Sequence[TimedModel], rounds: int, progress: Callable[..., Iterable[Any]]) -> list[Times]:
    """Return the times of each run, round by round."""
    times: list[Times] = [{name: [] for name in TIMED} for _ in timed]
    what = f"batch of {len(timed[0].prompt.is_visual)}"
    pause = SETTLE_S if len({type(run.subject) for run in timed}) > 1 else 0.0
    with garbage_between_runs() as collect:
        for order in progress(interleaved(len(timed), rounds), what, rounds):
            for i in order:
                for name, value in timed[i]().items():
                    times[i][name].append(value)
                collect()
                time.sleep(pause)
    return times


def figures(run: TimedModel, cost: Cost, times: Times, peak: int | None) -> Figures:
    prompt = run.prompt
    medians: dict[str, Any] = {name: Spread.of(values).median for name, values in times.items()}
    sequences, visual = len(prompt.is_visual), int(prompt.is_visual.sum())
    real = prompt.inputs.get("attention_mask", torch.ones_like(prompt.is_visual))
    return Figures(
        batch=sequences,
        visual_tokens=visual,
        text_tokens=int(real.sum()) - visual,
        **medians,
        tokens_per_s=sequences * (1 + run.new_tokens) / medians["total_ms"] * 1e3,
        **asdict(cost),
        peak_bytes=peak,
        ratio_to_reference=None,
    )


def compared(measured: Figures, times: Times, reference: Figures, reference_times: Times) -> Figures:
    """Return the figures with each as a ratio to the reference's, and the share reached of the ideal speed-up."""
    spreads = {name: paired(times[name], reference_times[name]) for name in TIMED if min(reference_times[name]) > 0}
    ratio: dict[str, Any] = {name: spread.median for name, spread in spreads.items()}
    for name in COUNTED:
        mine, theirs = getattr(measured, name), getattr(reference, name)
        ratio[name] = mine / theirs if mine is not None and theirs else None
    ratio["tokens_per_s"] = 1 / ratio["total_ms"]
    ratio["intervals"] = {name: (spread.low, spread.high) for name, spread in spreads.items()}
    ratio["achieved"] = {
        "prefill": _share(ratio["flops"], spreads["prefill_ms"]),
        "decode": _share(ratio["step_bytes"], spreads["decode_ms"]),
    }
    return replace(measured, ratio_to_reference=ratio)


def _share(ideal: float | None, time: Spread) -> float | None:
    """Divide the measured speed-up by the ideal one, of which both are reciprocals."""
    return None if ideal is None else ideal / time.median


def hardware(device: str) -> dict[str, Any]:
    """Return what the figures depend on beside the software."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {"device": processor_name(), "threads": torch.get_num_threads()}


def processor_name() -> str:
    """Return the CPU's name, as the system gives it."""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def beside_reference(model: ModelBenchmark, base: ModelBenchmark) -> dict[str, Any]:
    """Return what a checkpoint's record keeps of its own figures and of the reference's."""
    entry = {
        "reference_is_this_model": base.path == model.path,
        "batches": [asdict(figures) for figures in model.batches],
        "reference": [asdict(figures) for figures in base.batches],
    }
    if model.loads:
        entry["loads"] = [asdict(figures) for figures in model.loads]
        entry["reference_loads"] = [asdict(figures) for figures in base.loads]
    return entry


def record_benchmark(folder: Path, done: Benchmark, model: ModelBenchmark) -> bool:
    """Put a model's figures into its record and its card, replacing those of the same measurement. False: not ours.

    A checkpoint's has its own figures beside the reference's, an ONNX folder's those of all that it was compared with.
    """
    base = done.models[0]
    if model is base:
        return False
    same: dict[str, Any] = {
        "workload": done.workload.to_data() | {"task": done.workload.task and Path(done.workload.task).name},
        "options": done.options.to_data(),
        "hardware": done.hardware,
        "budget": model.budget,
        "runtime": model.runtime,
        "reference_name": model_name(base.path),
    }
    entry = same | {"date": done.date, "versions": done.versions}
    if is_onnx(folder):
        shown = [other for other in done.models if other is base or other is model or other.path != model.path]
        record, entry["models"] = read_manifest(folder).to_data(), [other.to_data() for other in shown]
    elif model.runtime == base.runtime and (folder / RECORD).exists():
        record = read_record(folder).to_data()
        entry |= beside_reference(model, base)
    else:
        return False
    others = [
        e
        for e in record.get("benchmarks", [])
        if any(e.get(key, value) != value for key, value in plain_data(same).items())
    ]
    record |= {"benchmarks": [*others, plain_data(entry)]}
    if is_onnx(folder):
        write_record(folder, record)
        card(folder)
    else:
        compression_record.write_record(folder, record)
        model_card.card(folder)
    return True
