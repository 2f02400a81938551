"""The tables that `bench` prints."""

from __future__ import annotations

from typing import Any

from ..cards.tables import table
from .in_flight import answer_range

BENCHMARK_HEADER = ("model", "batch", "image ms", "prefill ms", "first token ms", "decode ms", "tokens/s", "GFLOPs",
                    "KV MB", "peak MB")  # fmt: skip
RATIO_HEADER = ("model / reference", "batch", "prefill", "95 %", "decode", "95 %", "FLOPs", "KV", "FLOPs a step",
                "bytes a step", "peak", "of ideal: prefill", "decode")  # fmt: skip


def benchmark_rows(done: Any) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return rows of figures of every model at every batch size, and of ratios to the reference, which is the first."""
    rows: list[tuple[Any, ...]] = []
    ratios: list[tuple[Any, ...]] = []
    runtimes = {model.runtime for model in done.models}
    for model in done.models:
        name = benchmark_name(model) + (f" [{model.runtime}]" if len(runtimes) > 1 else "")
        for figures in model.batches:
            times = (
                figures.vision_ms,
                figures.prefill_ms,
                figures.first_token_ms,
                figures.decode_ms,
                figures.tokens_per_s,
            )
            sizes = (_in(1e9, figures.flops), _in(1e6, figures.kv_bytes, 3), _in(1e6, figures.peak_bytes, 1))
            rows.append((name, figures.batch, *(f"{value:.1f}" for value in times), *sizes))
            if figures.ratio_to_reference is not None:
                ratios.append((name, figures.batch, *_ratio_cells(figures.ratio_to_reference)))
    return rows, ratios


def benchmark_table(done: Any) -> str:
    """Return figures of every model at every batch size, then ratios, and how it was measured."""
    rows, ratios = benchmark_rows(done)
    runtimes = {model.runtime for model in done.models}
    where = ", ".join(f"{value}" if key == "device" else f"{key} {value}" for key, value in done.hardware.items())
    text = table(BENCHMARK_HEADER, rows) + ("\n\n" + table(RATIO_HEADER, ratios) if ratios else "")
    if done.roofline is not None:
        text += "\n\n" + roofline_table(done)
    if done.models[0].loads:
        text += f"\n\n{loads_table(done)}"
    figures, options = done.models[0].batches[0], done.options
    return (
        f"{text}\n\n{where}; {'; '.join(sorted(runtimes))}; "
        f"prompts of {figures.visual_tokens // figures.batch} visual and "
        f"{figures.text_tokens // figures.batch} other tokens,\n{options.new_tokens} decoding steps, medians of "
        f"{options.rounds} rounds in turn. First token: image (tower, projector) and prefill (router, decoder, head);\n"
        "the processor's work is in none." + "".join(f"\n{sentence}" for sentence in done.slower())
    )


LOADS_HEADER = ("model", "in flight", "tokens/s", "/ reference", "95 %", "first token ms p50", "p95", "token ms p50",
                "p95")  # fmt: skip


def loads_rows(done: Any) -> list[tuple[Any, ...]]:
    """Return a row of every model with every number of requests in flight."""
    rows: list[tuple[Any, ...]] = []
    for model in done.models:
        for load in model.loads:
            interval = load.throughput_interval
            times = (load.first_token_p50_ms, load.first_token_p95_ms, load.token_p50_ms, load.token_p95_ms)
            rows.append(
                (
                    benchmark_name(model),
                    load.in_flight,
                    f"{load.tokens_per_s:.1f}",
                    _in(1, load.throughput_ratio, 3),
                    "" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
                    *(f"{value:.1f}" for value in times),
                )
            )
    return rows


def loads_note(done: Any) -> str:
    """Return how requests in flight were answered."""
    return (
        f"{done.models[0].loads[0].batching}; answers of {answer_range(done.options.new_tokens)} tokens, "
        "each answered request followed by the next at once. First token: from when the request is sent, its wait "
        "included; token: between two of an answer"
    )


def loads_table(done: Any) -> str:
    return f"{table(LOADS_HEADER, loads_rows(done))}\n{loads_note(done)}"


ROOFLINE_HEADER = ("model", "batch", "prefill, of the ideal", "decode, of the ideal")


def roofline_table(done: Any) -> str:
    """Return which share of the ideal speed each model reaches, and what the ideal is computed from."""
    rows = []
    for model in done.models:
        for figures in model.batches:
            shares = [_in(1, share, 2) for share in done.roofline.shares(figures)]
            rows.append((benchmark_name(model), figures.batch, *shares))
    roofline = done.roofline
    return (
        f"{table(ROOFLINE_HEADER, rows)}\n"
        f"ideal: the FLOPs at {roofline.flops_per_s / 1e12:.3g} TFLOP/s (the best matrix product in {roofline.dtype})\n"
        f"or the bytes at {roofline.bytes_per_s / 1e9:.3g} GB/s (the best copy), whichever takes longer"
    )


def benchmark_name(model: Any) -> str:
    """Return 'folder (keep_visual_tokens=144)'."""
    budget = ", ".join(f"{k}={v}" for k, v in (model.budget or {}).items() if v is not None)
    return f"{model.path} ({budget})" if budget else str(model.path)


def _ratio_cells(ratio: dict[str, Any]) -> list[str]:
    cells = []
    for name in ("prefill_ms", "decode_ms"):
        low, high = ratio["intervals"][name]
        cells += [f"{ratio[name]:.3f}", f"{low:.3f}-{high:.3f}"]
    cells += [_in(1, ratio[name], 3) for name in ("flops", "kv_bytes", "decode_flops", "step_bytes", "peak_bytes")]
    return cells + [_in(1, ratio["achieved"][name], 2) for name in ("prefill", "decode")]


def _in(unit: float, value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"
