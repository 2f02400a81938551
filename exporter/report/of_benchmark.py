"""What a report tells of a benchmark: times, their shares of the reference's, and where they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .page import facts
from .parts import Bar, Bars, Part, Point, Report, Scatter, Table


def report_of_benchmark(
    done: Any,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    names: Sequence[str],
    commands: Sequence[str],
    loads: tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str] | None = None,
) -> Report:
    """Return the page of a benchmark.

    Args:
        done: a `Benchmark`.
        header, rows: of its table of figures.
        names: of its models.
        loads: header, rows and note of its table of requests in flight, if there is one.
    """
    parts: list[Part] = [Table("Figures", tuple(header), tuple(tuple(map(str, row)) for row in rows))]
    for place, batch in enumerate(done.options.batches):
        parts += _of_batch(done, names, place, batch)
    if loads is not None:
        parts.append(Table("Requests in flight", *loads))
    where = tuple((str(name), str(value)) for name, value in done.hardware.items())
    return Report(
        "Time, memory and operations",
        tuple(commands),
        parts=tuple(parts),
        facts=(*facts(), *where),
        notes=tuple(done.slower()),
    )


def _of_batch(done: Any, names: Sequence[str], place: int, batch: int) -> list[Part]:
    """Return ratios of times, and throughput beside the first token's time, at one batch size."""
    parts: list[Part] = []
    ratios = [(name, model.batches[place].ratio_to_reference) for name, model in zip(names, done.models, strict=True)]
    for what, step in (("prefill_ms", "prefill"), ("decode_ms", "a decoding step")):
        bars = tuple(
            Bar(name, ratio[what], tuple(ratio["intervals"][what]), f"{ratio[what]:.3f}")
            for name, ratio in ratios
            if ratio is not None
        )
        if bars:
            parts.append(Bars(f"Time of {step} as a share of the reference's, batch {batch}", bars))
    points = tuple(
        Point(name, model.batches[place].first_token_ms, model.batches[place].tokens_per_s)
        for name, model in zip(names, done.models, strict=True)
    )
    title = f"Throughput and time to the first token, batch {batch}"
    parts.append(Scatter(title, "first token (ms)", "answer tokens a second", points))
    return parts
