"""What a search leaves beside the chosen folder: a table, a picture, the others as recipes, and everything as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cards.plots import MARKERS, PALETTE, figure, save
from ..cards.tables import table
from ..checkpoints.files import replace_text
from ..comparison.saved import logger, write_all
from .candidate import Candidate, Mix
from .goal import SearchRecipe
from .prediction import Predictor
from .result import MeasuredCandidate, SearchResult

RESULTS, TABLE, PICTURE, RECIPES = "search.json", "table.md", "front.png", "recipes"
EXPECTED_HEADER = ("candidate", "times as fast", "parameters", "FLOPs", "MB", "minutes")


def header(result: SearchResult) -> tuple[str, ...]:
    return ("candidate", "times as fast", "95 %", "image", "prompt", "answer", "ms", f"{result.metric} %",
            "points lost", "parameters", "FLOPs", "MB", "same answers %", "")  # fmt: skip


def rows(result: SearchResult) -> list[tuple[str, ...]]:
    """Return the original and every measured candidate, the fastest last."""
    best, chosen = {measured.candidate for measured in result.front}, result.choice
    whole = result.original_figures
    accuracy, time = f"{100 * result.original.accuracy:.1f}", f"{whole['total_ms']:.1f}"
    original = (
        "the original",
        "1.00",
        "",
        "",
        "",
        "",
        time,
        accuracy,
        "",
        f"{whole['parameters']:,}",
        "1.000",
        "",
        "",
        "",
    )
    candidates = sorted(result.candidates, key=lambda measured: result.goal.better(measured.figures))
    return [original, *(_row(measured, measured.candidate in best, measured is chosen) for measured in candidates)]


def _row(measured: MeasuredCandidate, on_front: bool, chosen: bool) -> tuple[str, ...]:
    figures, ms, before = measured.figures, measured.figures["ms"], measured.figures["ms_of_original"]
    low, high = figures["speedup_interval"]
    share, told = figures["flops_share"], measured.held_out or {}
    same = f"{100 * told['same_answers']:.1f}" if "same_answers" in told else ""
    return (
        measured.candidate.label,
        f"{figures['speedup']:.2f}",
        f"{low:.2f}-{high:.2f}",
        *(f"{before[part] / ms[part]:.2f}" if ms[part] else "" for part in ms),
        f"{figures['total_ms']:.1f}",
        f"{100 * measured.rate.accuracy:.1f}",
        f"{measured.loss:.1f} ± {1.96 * measured.loss_error:.1f}",
        f"{figures['parameters']:,}",
        "" if share is None else f"{share:.3f}",
        f"{figures['memory_bytes'] / 1e6:,.1f}" + ("" if figures["memory_measured"] else "*"),
        same,
        "chosen" if chosen else "front" if on_front else "",
    )


def notes(result: SearchResult) -> list[str]:
    """Return what a reader of the table has to know."""
    sentences = [
        f"Times as fast: the whole answer to the task's first question, image, prompt and "
        f"{result.original_figures['answer_tokens']} further tokens, in turn with the original; then each of these by "
        "itself. Milliseconds are those of the machine as it was at that moment: compare the ratios.",
        f"Points lost: {result.metric} on {result.original.n} questions of the task, with 95 % intervals; the choice "
        "was made by them, so that other questions may show a little more.",
        "Same answers: of questions held out when layers went or when it was healed, without labels.",
    ]
    if any(not measured.figures["memory_measured"] for measured in result.candidates):
        sentences.append("MB*: weights and cache, since what an answer takes beyond them can't be measured there.")
    sentences += [f"{name}, not measured: on held-out questions it lost about {loss:.1f} points before it was healed."
             for name, loss in result.passed.items()]  # fmt: skip
    sentences += [f"{name}, left out: {reason}" for name, reason in {**result.left_out, **result.failed}.items()]
    return sentences + [f"{name}, not reached in the time: the same command goes on." for name in result.open]


def text(result: SearchResult) -> str:
    """Return the report as text for the terminal."""
    return "\n".join([table(header(result), rows(result)), "", *notes(result), "", result.verdict])


def markdown(result: SearchResult) -> str:
    lines = [f"| {' | '.join(header(result))} |", "|---|" + "---:|" * (len(header(result)) - 2) + "---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(result)), "", result.verdict]) + "\n"


def expected_rows(
    predictor: Predictor, candidates: Sequence[Candidate], seconds: Sequence[float]
) -> list[tuple[str, ...]]:
    """Return what candidates are expected to cost, and what it takes to make and measure each."""
    lines: list[tuple[str, ...]] = []
    for candidate, duration in zip(candidates, seconds, strict=True):
        expected = predictor.expect(candidate)
        memory = f"{expected['memory_bytes'] / 1e6:,.1f}"
        share = f"{expected['flops_share']:.3f}"
        parameters = f"{round(expected['parameters']):,}"
        lines.append((candidate.label, f"{expected['speedup']:.2f}", parameters, share, memory, f"{duration / 60:.1f}"))
    return lines


def plot(result: SearchResult, path: Path) -> None:
    """Draw the score against the goal's figure: a colour a mix, numbers of layers gone, the front as a line."""
    drawn, axes = figure(8.5, 4.6)
    goal = result.goal
    shown = [measured for measured in result.candidates if measured.figures.get(goal.kind.measure) is not None]
    found_mixes: list[Mix] = list(dict.fromkeys(measured.candidate.mix for measured in shown))
    for measured in shown:
        number = found_mixes.index(measured.candidate.mix)
        at = (float(measured.figures[goal.kind.measure]), 100 * measured.rate.accuracy)
        low, high = measured.rate.interval
        axes.plot([at[0]] * 2, [100 * low, 100 * high], color=PALETTE[number % len(PALETTE)], linewidth=0.8, alpha=0.5)
        axes.plot(*at, MARKERS[number % len(MARKERS)], color=PALETTE[number % len(PALETTE)], markersize=6)
        axes.annotate(str(measured.candidate.drop), at, (5, 4), textcoords="offset points", fontsize="small")
        if measured is result.choice:
            axes.plot(*at, "o", markersize=15, markerfacecolor="none", markeredgecolor="black")
    front = [(measured.figures[goal.kind.measure], 100 * measured.rate.accuracy) for measured in result.front]
    front += _lines(axes, result)
    if len(front) > 1:
        axes.plot(*zip(*sorted(front), strict=True), color="black", linewidth=1, zorder=0)
    axes.set_xlabel(AXES[goal.kind.measure])
    axes.set_ylabel(f"{result.metric} (%)")
    _legend(axes, found_mixes, with_front=len(front) > 1)
    save(drawn, path)


AXES = {
    "speedup": "times as fast as the original, the whole answer",
    "total_ms": "milliseconds of an answer",
    "parameters": "parameters",
    "flops_share": "share of the original's operations",
    "memory_bytes": "bytes of memory",
}


def _legend(axes: Any, found_mixes: Sequence[Mix], with_front: bool) -> None:
    """Say beside the picture what its marks stand for."""
    styles: dict[str, dict[str, Any]] = {
        mix.label or "layers gone alone": {"marker": MARKERS[i % len(MARKERS)], "color": PALETTE[i % len(PALETTE)]}
        for i, mix in enumerate(found_mixes)
    }
    styles["the original"] = {"marker": "*", "color": "black", "markersize": 11}
    handles = [axes.plot([], [], linestyle="", **style)[0] for style in styles.values()]
    names = list(styles)
    if with_front:
        handles.append(axes.plot([], [], color="black", linewidth=1)[0])
        names.append("Pareto front")
    handles.append(axes.plot([], [], color="#888888", linestyle=":")[0])
    axes.legend(
        handles,
        [*names, "goal, and the original less the loss"],
        frameon=False,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        title="numbers: layers gone; circle: chosen",
        title_fontsize="small",
    )


def _lines(axes: Any, result: SearchResult) -> list[tuple[float, float]]:
    """Draw the original, the goal, and what may be lost. Returns: the original's point, where nothing beats it."""
    whole, measure, points = result.original_figures, result.goal.kind.measure, []
    if (x := whole.get(measure)) is not None:
        points = [(float(x), 100 * result.original.accuracy)]
        axes.plot(*points[0], "*", color="black", markersize=11)
    axes.axhline(100 * result.original.accuracy - result.max_loss, color="#888888", linestyle=":", linewidth=1)
    if result.goal.target is not None:
        axes.axvline(result.goal.target, color="#888888", linestyle=":", linewidth=1)
    beaten = any(measured.rate.accuracy >= result.original.accuracy for measured in result.front)
    return [] if beaten else points


def recipe_text(measured: MeasuredCandidate, result: SearchResult, search: SearchRecipe) -> str:
    """Return a candidate as the YAML that `compress` takes, with its figures and what is to be done further."""
    import yaml

    lines = [
        f"# {measured.candidate.label}: {result.words(measured)}",
        "# lvlm-exporter compress --recipe THIS.yaml --out DIR",
    ]
    if measured.candidate.mix.int8:
        lines.append("# lvlm-exporter onnx DIR --out DIR-int8 --quantize int8")
    if measured.candidate.budget is not None:
        lines.append(f"# model.generate(**inputs, keep_visual_tokens={measured.candidate.mix.tokens})")
    return "\n".join(lines) + "\n" + yaml.safe_dump(measured.candidate.recipe(search).to_data(), sort_keys=False)


def write_report(result: SearchResult, recipe: SearchRecipe) -> bool:
    """Write recipes, table, picture and search.json. Returns: False where something could not be written."""
    folder = result.out / RECIPES
    try:
        folder.mkdir(exist_ok=True)
        for measured in result.candidates:
            replace_text(folder / f"{measured.candidate.slug}.yaml", recipe_text(measured, result, recipe))
    except OSError as error:
        logger.warning("%s can't be written (%s).", folder, error.strerror or error)
        return False
    pictures = {PICTURE: lambda path: plot(result, path)}
    return write_all(result.out, {TABLE: markdown(result)}, pictures=pictures, data=result.to_data(), results=RESULTS)
