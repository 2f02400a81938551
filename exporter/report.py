"""Pictures and tables of what was measured. matplotlib draws; nothing here computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .scores import LayerScores

KEPT, DROPPED, PROTECTED = "#3b6ea5", "#d1603d", "#9aa5b1"
PAIRED = 5  # models in a call whose paired tests are all shown; of more, those with the first one
VALUE_NAMES = {
    "tis": "cosine of input and output over important tokens",
    "block_influence": "cosine of input and output over all tokens",
    "angular": "1 - angular distance of the block that begins here",
    "fisher": "- divergence when this layer is removed, to second order",
    "greedy": "- loss when this layer alone is removed",
}


def figure(width: float = 7.5, height: float = 3.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def save(drawn: Any, path: Path) -> None:
    """Write and close; without the metadata that would make equal pictures unequal files."""
    from matplotlib import pyplot

    drawn.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(drawn)


def plot_scores(scores: LayerScores, path: Path, protect: Sequence[int] = ()) -> None:
    """One bar a layer: high is redundant; dropped layers in their own colour."""
    drawn, axes = figure()
    layers = range(len(scores.values))
    colors = [DROPPED if i in scores.drop else PROTECTED if i in protect else KEPT for i in layers]
    measured = scores.details.get("chosen", scores.method)  # best_of shows the values of the proposal that won
    values = [math.nan if measured == "angular" and value == 0 else value for value in scores.values]  # no block fits
    axes.bar(layers, values, color=colors, width=0.8)
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known), max(known)
    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(_wrapped(VALUE_NAMES.get(measured, "redundancy")))
    step = max(1, len(layers) // 32)
    axes.set_xticks(list(layers)[::step])
    shown = [("kept", KEPT), ("dropped", DROPPED)] + [("protected", PROTECTED)] * bool(protect)
    handles = [axes.bar(0, 0, color=color) for _, color in shown]
    axes.legend(
        handles, [name for name, _ in shown], frameon=False, ncols=len(shown), loc="lower right", bbox_to_anchor=(1, 1)
    )
    axes.set_title(
        "redundancy by " + (measured if measured == scores.method else f"{scores.method}: {measured}"),
        loc="left",
        fontsize="medium",
    )
    save(drawn, path)


def plot_training(curve: Sequence[dict[str, float]], path: Path) -> None:
    """A router's loss, smoothed over a twentieth of the steps, and the divergence of held-out questions."""
    drawn, axes = figure()
    steps, losses = [point["step"] for point in curve], [point["loss"] for point in curve]
    width = max(1, len(losses) // 20)
    smooth = [sum(losses[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width)) for i in range(len(losses))]
    axes.plot(steps, smooth, color=PROTECTED, linewidth=1, label="training loss")
    probes = dict.fromkeys(name for point in curve for name in point if name not in ("step", "loss"))
    for color, name in zip(PALETTE, probes, strict=False):
        points = [(point["step"], point[name]) for point in curve if name in point]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=1, label=_wrapped(name))
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("training the router", loc="left", fontsize="medium")
    save(drawn, path)


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 30))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns in line: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0].rstrip(), "  ".join("-" * w for w in widths), *(line.rstrip() for line in lines[1:])])


def scores_table(scores: LayerScores, parameters: Sequence[int], protect: Sequence[int] = ()) -> str:
    fate = dict.fromkeys(scores.drop, "drop") | dict.fromkeys(protect, "protected")
    rows = [(i, f"{value:.4f}", f"{parameters[i]:,}", fate.get(i, "")) for i, value in enumerate(scores.values)]
    return table(("layer", f"redundancy ({scores.method})", "parameters", ""), rows)


def evaluation_table(done: Any) -> str:
    """One row a model and budget: size, exact match, share kept, fidelity; then question types and paired tests."""
    base = next((model for model in done.models if model.path == done.reference and model.budget is None), None)
    routed = any(model.budget for model in done.models)
    rows = []
    for model in done.models:
        low, high = model.interval
        kept = f"{100 * model.accuracy / base.accuracy:.1f} %" if base and base.accuracy else ""
        rows.append(
            (
                model.label,
                f"{model.parameters:,}",
                f"{model.bytes:,}",
                f"{100 * model.accuracy:.1f} %",
                f"{100 * low:.1f}-{100 * high:.1f}",
                kept,
                "" if model.kl is None else f"{model.kl:.4f}",
                "" if model.agreement is None else f"{100 * model.agreement:.1f} %",
                f"{model.seconds:.0f}",
                *[_share(model.flops_share), _share(model.decoder_flops_share)] * routed,
            )
        )
    header = ["model", "parameters", "bytes", "exact match", "95 % CI", "kept", "KL", "agreement", "seconds"]
    header += ["prefill FLOPs", "decoder FLOPs"] * routed
    text = table(header, rows)
    types = list(done.models[0].by_type)
    if len(types) > 1:
        by_type = [
            (name, done.models[0].by_type[name].n, *(f"{100 * m.by_type[name].accuracy:.1f}" for m in done.models))
            for name in types
        ]
        text += "\n\n" + table(("type", "n", *(Path(m.label).name for m in done.models)), by_type)
    shown = done.pairs if len(done.models) <= PAIRED else [p for p in done.pairs if p.first == done.models[0].label]
    for pair in shown:
        text += (
            f"\n{Path(pair.first).name} vs {Path(pair.second).name}: {pair.only_first} questions right only in the "
            f"first, {pair.only_second} only in the second, p = {pair.p_value:.2g} (McNemar, exact)"
        )
    if len(shown) < len(done.pairs):
        text += f"\nAll {len(done.pairs)} paired tests are in what --json writes."
    for model in done.models:
        if model.no_kl_because:
            text += f"\n{model.path}: no KL, {model.no_kl_because}"
    return text


BENCHMARK_HEADER = ("model", "batch", "image ms", "prefill ms", "first token ms", "decode ms", "tokens/s", "GFLOPs",
                    "KV MB", "peak MB")  # fmt: skip
RATIO_HEADER = ("model / reference", "batch", "prefill", "95 %", "decode", "95 %", "FLOPs", "KV", "FLOPs a step",
                "bytes a step", "peak", "of ideal: prefill", "decode")  # fmt: skip


def benchmark_table(done: Any) -> str:
    """Figures of every model at every batch size, then ratios to the reference, which is the first."""
    rows, ratios = [], []
    runtimes = {model.runtime for model in done.models}
    for model in done.models:
        name = benchmark_name(model) + (f" [{model.runtime}]" if len(runtimes) > 1 else "")
        for one in model.batches:
            times = (one.vision_ms, one.prefill_ms, one.first_token_ms, one.decode_ms, one.tokens_per_s)
            sizes = (_in(1e9, one.flops), _in(1e6, one.kv_bytes, 3), _in(1e6, one.peak_bytes, 1))
            rows.append((name, one.batch, *(f"{value:.1f}" for value in times), *sizes))
            if one.ratio_to_reference is not None:
                ratios.append((name, one.batch, *_ratio_cells(one.ratio_to_reference)))
    where = ", ".join(f"{value}" if key == "device" else f"{key} {value}" for key, value in done.hardware.items())
    text = table(BENCHMARK_HEADER, rows) + ("\n\n" + table(RATIO_HEADER, ratios) if ratios else "")
    one, options = done.models[0].batches[0], done.options
    return (
        f"{text}\n\n{where}; {'; '.join(sorted(runtimes))}; prompts of {one.visual_tokens // one.batch} visual and "
        f"{one.text_tokens // one.batch} other tokens,\n{options.new_tokens} decoding steps, medians of "
        f"{options.rounds} rounds in turn. First token: image (tower, projector) and prefill (router, decoder, head);\n"
        "the processor's work is in none."
    )


def benchmark_name(model: Any) -> str:
    """'folder (keep_visual_tokens=144)'."""
    asked = ", ".join(f"{k}={v}" for k, v in (model.budget or {}).items() if v is not None)
    return f"{model.path} ({asked})" if asked else str(model.path)


def _ratio_cells(ratio: dict[str, Any]) -> list[str]:
    cells = []
    for name in ("prefill_ms", "decode_ms"):
        low, high = ratio["intervals"][name]
        cells += [f"{ratio[name]:.3f}", f"{low:.3f}-{high:.3f}"]
    cells += [_in(1, ratio[name], 3) for name in ("flops", "kv_bytes", "decode_flops", "step_bytes", "peak_bytes")]
    return cells + [_in(1, ratio["achieved"][name], 2) for name in ("prefill", "decode")]


def _in(unit: float, value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


# --- comparisons ------------------------------------------------------------------------------------------------------

PALETTE = ("#3b6ea5", "#d1603d", "#4f9d69", "#8e6bbf", "#c9a227", "#5b6770", "#b0527a")
MARKERS = "osD^vP*X"


def comparison_rows(done: Any) -> list[tuple[Any, ...]]:
    """Cells by number of dropped layers, the best first."""
    rows = []
    for cell in sorted(done.cells, key=lambda c: (len(c.drop), -c.accuracy, c.kl)):
        low, high = cell.interval
        rows.append(
            (
                f"{cell.localizer} + {cell.fold}",
                len(cell.drop),
                ",".join(map(str, cell.drop)),
                f"{cell.parameters:,}",
                f"{100 * cell.accuracy:.1f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{100 * cell.kept:.1f}",
                f"{cell.kl:.4f}",
                f"{100 * cell.agreement:.1f}",
                "" if cell is done.best[len(cell.drop)] else f"{done.p_value(cell):.2g}",
            )
        )
    return rows


COMPARISON_HEADER = ("localizer + fold", "dropped", "layers", "parameters", "exact match %", "95 % CI", "kept %", "KL",
                     "agreement %", "p")  # fmt: skip


def comparison_table(done: Any) -> str:
    low, high = done.original.interval
    text = table(COMPARISON_HEADER, comparison_rows(done))
    text += (
        f"\n\noriginal: {100 * done.original.accuracy:.1f} % ({100 * low:.1f}-{100 * high:.1f}) of {done.original.n} "
        f"questions, {done.parameters:,} parameters"
    )
    for count, cell in sorted(done.best.items()):
        text += f"\nbest without {count} layers: {cell.localizer} + {cell.fold}, {100 * cell.kept:.1f} % kept"
    text += "\np: of a row against the best one of its budget, on the same questions (McNemar, exact)"
    if done.naive_seconds:
        text += (
            f"\n{len(done.cells)} cells in {done.seconds:.0f} s; cell by cell from scratch about "
            f"{done.naive_seconds:.0f} s, {done.naive_seconds / done.seconds:.1f} times that"
        )
    return text


def comparison_markdown(done: Any) -> str:
    lines = ["| " + " | ".join(COMPARISON_HEADER) + " |", "|---|" + "---:|" * (len(COMPARISON_HEADER) - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in comparison_rows(done)]
    return "\n".join(lines) + "\n"


def plot_comparison(done: Any, path: Path) -> None:
    """Exact match against parameters: a colour a localizer, a marker a fold, the Pareto front as a line."""
    drawn, axes = figure(8.5, 4.6)
    localizers = list(dict.fromkeys(cell.localizer for cell in done.cells))
    folds = list(dict.fromkeys(cell.fold for cell in done.cells))
    for cell in done.cells:
        axes.plot(
            cell.parameters / 1e6,
            100 * cell.accuracy,
            MARKERS[folds.index(cell.fold) % len(MARKERS)],
            color=PALETTE[localizers.index(cell.localizer) % len(PALETTE)],
            markersize=5,
            alpha=0.8,
        )
    axes.plot(done.parameters / 1e6, 100 * done.original.accuracy, "*", color="black", markersize=11)
    front = pareto_front([(done.parameters, done.original.accuracy), *((c.parameters, c.accuracy) for c in done.cells)])
    axes.plot([p / 1e6 for p, _ in front], [100 * a for _, a in front], color="black", linewidth=1, zorder=0)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("exact match (%)")
    shown = [("original", "*", "black"), *((n, "s", PALETTE[i % len(PALETTE)]) for i, n in enumerate(localizers))]
    shown += [(n, MARKERS[i % len(MARKERS)], "#888888") for i, n in enumerate(folds)]
    handles = [axes.plot([], [], marker, color=color, linestyle="")[0] for _, marker, color in shown]
    handles.append(axes.plot([], [], color="black", linewidth=1)[0])
    names = [*(name for name, *_ in shown), "Pareto front"]
    axes.legend(handles, names, frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(drawn, path)


def pareto_front(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of (parameters, accuracy): those that no other has both fewer parameters and a higher accuracy than."""
    front: list[tuple[int, float]] = []
    for parameters, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((parameters, accuracy))
    return front
