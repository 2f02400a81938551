"""Figures and budgets in words."""

from __future__ import annotations

from typing import Any


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
