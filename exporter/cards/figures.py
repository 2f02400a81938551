"""Figures and budgets in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

EXACT_MATCH = "exact match"


def metric_title(entry: Mapping[str, Any]) -> str:
    """Return what a recorded figure is: the metric's own name; records without one are of exact match."""
    return str(entry.get("metric_title") or entry.get("metric") or EXACT_MATCH)


def score_name(titles: Iterable[str]) -> str:
    """Return the name of a column that holds figures of these metrics: the metric, or 'score' where they differ."""
    names = list(dict.fromkeys(titles))
    return names[0] if len(names) == 1 else "score"


def metric_figure(name: str, value: float | None) -> str:
    """Return a figure that a metric tells beside its mean, as it is read: shares in percent, points as they are."""
    if value is None:
        return "–"
    return f"{value:.1f}" if name.endswith("(points)") else f"{100 * value:.1f} %"


def describe(budget: dict[str, Any]) -> str:
    """Return 'fast: 0.25 of the visual tokens, 10 layers, by router' of a result's budget, as JSON has it."""
    tokens, layers = budget["keep_visual_tokens"], budget["keep_layers"]
    parts = []
    if tokens:
        parts.append(f"{tokens} of the visual tokens" if isinstance(tokens, float) else f"{tokens} visual tokens")
    if layers:
        parts.append(f"{layers} layers")
    if budget.get("flops"):
        parts.append(f"{100 * budget['flops']:g} % of the decoder's FLOPs")
    if budget.get("quality"):
        parts.append(f"{100 * budget['quality']:g} % of the answers kept")
    if parts and budget["rule"] != "router":
        at = "" if budget["drop_at"] is None else f" at {budget['drop_at']}"
        parts.append(f"by {budget['rule']}{at}")
    return (f"{budget['preset']}: " if budget["preset"] else "") + (", ".join(parts) or "everything")
