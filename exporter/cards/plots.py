"""Pictures and tables of what was measured. matplotlib draws; nothing here computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..localize.scores import LayerScores
from ..methods import localizer_row

KEPT, DROPPED, PROTECTED = "#3b6ea5", "#d1603d", "#9aa5b1"


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
    """Draw one bar a layer: high is redundant; dropped layers in their own colour."""
    drawn, axes = figure()
    layers = range(len(scores.values))
    colors = [DROPPED if i in scores.drop else PROTECTED if i in protect else KEPT for i in layers]
    measured = scores.details.get("chosen", scores.method)  # best_of shows the values of the proposal that won
    row = localizer_row(measured)
    values = [math.nan if row.of_blocks and value == 0 else value for value in scores.values]  # no block fits
    axes.bar(layers, values, color=colors, width=0.8)
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known), max(known)
    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(_wrapped(row.value_name))
    step = max(1, len(layers) // 32)
    axes.set_xticks(list(layers)[::step])
    shown = [("kept", KEPT), ("dropped", DROPPED)]
    if protect:
        shown.append(("protected", PROTECTED))
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


def plot_training(curve: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draw the loss of a training, smoothed over a twentieth of the steps, and the divergence of held-out questions."""
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
    axes.set_title(title, loc="left", fontsize="medium")
    save(drawn, path)


def percent_or_dash(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 30))


PALETTE = ("#3b6ea5", "#d1603d", "#4f9d69", "#8e6bbf", "#c9a227", "#5b6770", "#b0527a")
MARKERS = "osD^vP*X"
