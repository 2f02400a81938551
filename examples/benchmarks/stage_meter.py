"""What each stage of a compression takes: time, processor time, bytes of weights read, peak memory."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from exporter.compression.job import CompressionJob
from exporter.models.residency import Ranges, ranges_of

STAGES = {  # where the stages of a compression are called, by the names that they are told by
    "hash the source": "exporter.pipeline.fingerprint_of",
    "answers": "exporter.models.questions.Questions._answer",
    "localize": "exporter.compression.steps.localize",
    "fold": "exporter.compression.steps.fold_gaps",
    "reference": "exporter.compression.steps._reference",
    "write": "exporter.pipeline.write_checkpoint",
    "hash the result": "exporter.pipeline.measure",
    "card": "exporter.pipeline.card",
    "verify": "exporter.pipeline.require",
}
EVERY_S = 0.05  # memory is looked at


@dataclass
class Taken:
    """What a stage took, without the stages that it called."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process, and of those that it waited for
    bytes_read: int = 0  # of weights, as the product counts them
    peak_bytes: int = 0  # resident in this process


@dataclass(frozen=True)
class Reading:
    """What was used until now."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_read: int = 0

    def __sub__(self, other: Reading) -> Reading:
        return Reading(
            self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds, self.bytes_read - other.bytes_read
        )

    def __add__(self, other: Reading) -> Reading:
        return self - (Reading() - other)


class StageMeter:
    """Measures stages, which may call each other."""

    def __init__(self) -> None:
        self.stages: dict[str, Taken] = {}
        self.peak_of_others = 0  # bytes resident in any process that this one started
        self.ranges: Ranges | None = None  # whose bytes are counted
        self.over = threading.Event()
        self._running: list[str] = []
        self._called = [Reading()]  # by the stages that run, each: what those it called took

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs in a block as a stage."""
        taken, begin = self.stages.setdefault(name, Taken()), self._now()
        self._running.append(name)
        self._called.append(Reading())
        try:
            yield
        finally:
            whole = self._now() - begin
            own = whole - self._called.pop()
            self._called[-1] += whole
            self._running.pop()
            taken.seconds += own.seconds
            taken.cpu_seconds += own.cpu_seconds
            taken.bytes_read += own.bytes_read

    def _now(self) -> Reading:
        waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = time.process_time() + waited_for.ru_utime + waited_for.ru_stime
        return Reading(time.perf_counter(), cpu, 0 if self.ranges is None else self.ranges.bytes_read)

    def watch(self) -> None:
        """Look at memory until it is over. A started process has its own peak only once it runs its program."""
        while not self.over.wait(EVERY_S):
            for name in self._running[-1:]:
                self.stages[name].peak_bytes = max(self.stages[name].peak_bytes, memory_of(os.getpid(), "VmRSS"))
            for process in descendants(os.getpid()):
                if program_of(process) != program_of(os.getpid()):
                    self.peak_of_others = max(self.peak_of_others, memory_of(process, "VmHWM"))


@contextlib.contextmanager
def measured_stages() -> Iterator[StageMeter]:
    """Measure the stages of a compression that runs within a block."""
    meter = StageMeter()
    load = CompressionJob.load_model

    def loading(job: CompressionJob) -> Any:
        with meter.stage("load"):
            loaded = load(job)
            meter.ranges = ranges_of(loaded[0])
            return loaded

    def measured(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            with meter.stage(name):
                return original(*args, **keywords)

        return run

    watch = threading.Thread(target=meter.watch, name="memory", daemon=True)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(CompressionJob, "load_model", loading))
        for name, place in STAGES.items():
            patches.enter_context(mock.patch(place, measured(name, pkgutil.resolve_name(place))))
        watch.start()
        try:
            yield meter
        finally:
            meter.over.set()
            watch.join()


def descendants(process: int) -> Iterator[int]:
    """Yield the processes that one has started, and those that they have."""
    with contextlib.suppress(OSError):  # it may end meanwhile
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                yield child
                yield from descendants(child)


def program_of(process: int) -> bytes:
    """Return the command line of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def memory_of(process: int, name: str) -> int:
    """Return the bytes that a line of a process's status tells, VmRSS or VmHWM; 0 where it has ended."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0
