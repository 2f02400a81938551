"""The table that `evaluate` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cards.figures import metric_figure
from ..cards.plots import percent_or_dash
from ..cards.tables import table
from .metrics.table import METRICS
from .scoring import PairedTest

PAIRED = 5  # models in a call whose paired tests are all shown; of more, those with the first one


def evaluation_table(done: Any) -> str:
    """Return a row for each model and budget; then the metric's figures, types and paired tests."""
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
                *[percent_or_dash(model.flops_share), percent_or_dash(model.decoder_flops_share)] * routed,
            )
        )
    header = [
        "model",
        "parameters",
        "bytes",
        METRICS[done.metric].title,
        "95 % CI",
        "kept",
        "KL",
        "agreement",
        "seconds",
    ]
    header += ["prefill FLOPs", "decoder FLOPs"] * routed
    text = table(header, rows) + metric_figures(done)
    types = list(done.models[0].by_type)
    if len(types) > 1:
        by_type = [
            (name, done.models[0].by_type[name].n, *(f"{100 * m.by_type[name].accuracy:.1f}" for m in done.models))
            for name in types
        ]
        text += "\n\n" + table(("type", "n", *(Path(m.label).name for m in done.models)), by_type)
    shown = done.pairs if len(done.models) <= PAIRED else [p for p in done.pairs if p.first == done.models[0].label]
    graded = any(value not in (0, 1) for model in done.models for value in model.trials)
    test = "sign test on better answers, exact" if graded else "McNemar, exact"
    for pair in shown:
        text += (
            f"\n{Path(pair.first).name} vs {Path(pair.second).name}: {pair.only_first} questions right only in the "
            f"first, {pair.only_second} only in the second, p = {pair.p_value:.2g}{corrected(pair, done)} ({test})"
        )
    if len(shown) < len(done.pairs):
        text += f"\nAll {len(done.pairs)} paired tests are in what --json writes."
    for model in done.models:
        if model.answers_kept is not None:
            text += (
                f"\n{model.path}: {100 * model.answers_kept:.1f} % of its {model.n} answers kept, "
                f"{100 * model.budget['quality']:g} % were asked for"
            )
        if model.no_kl_because:
            text += f"\n{model.path}: no KL, {model.no_kl_because}"
    if done.uses is not None:
        text += f"\n{done.uses.sentence}"
    return text


def corrected(pair: PairedTest, done: Any) -> str:
    """Return the p-value that is corrected for the number of tests, where there are several."""
    return f", {pair.p_corrected:.2g} by Holm for {len(done.pairs)} tests" if len(done.pairs) > 1 else ""


def metric_figures(done: Any) -> str:
    """Return a table of what the metric tells beside its mean: shares in percent, points as they are."""
    names = list(dict.fromkeys(name for model in done.models for name in model.figures))
    if not names:
        return ""
    rows = [(name, *(metric_figure(name, model.figures.get(name)) for model in done.models)) for name in names]
    return "\n\n" + table((done.metric, *(Path(m.label).name for m in done.models)), rows)
