"""What a report tells of an evaluation: scores, cost and score, types of questions, answers beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..cards.figures import metric_figure
from ..cards.plots import percent_or_dash
from ..evaluation.metrics.table import METRICS
from ..evaluation.results import Evaluation, ModelResult
from ..routing.pictures import question_of
from .page import facts
from .parts import Answers, Bar, Bars, Kept, ModelAnswer, Part, Point, Report, Scatter, ShownQuestion, Table
from .pictures import thumbnail

LONGEST = 600  # characters of an answer or a question that are shown


def report_of_evaluation(done: Evaluation, commands: Sequence[str]) -> Report:
    """Return the page of an evaluation that was run for a report."""
    title = METRICS[done.metric].title
    parts: list[Part] = [
        Bars(
            f"{title}, with 95 % intervals",
            tuple(
                Bar(
                    name_of(m),
                    100 * m.accuracy,
                    (100 * m.interval[0], 100 * m.interval[1]),
                    f"{100 * m.accuracy:.1f} %",
                )
                for m in done.models
            ),
            note=f"{done.models[0].n} of {done.task}.",
        ),
        _table(done, title),
        *_figures(done),
        _front(done, title),
        *_types(done),
        *_pairs(done),
        *_answers(done),
    ]
    notes = () if done.uses is None else (done.uses.sentence,)
    return Report(f"{title} on {done.task}", tuple(commands), parts=tuple(parts), facts=facts(), notes=notes)


def name_of(model: ModelResult) -> str:
    """Return the folder's name with the budget."""
    short = Path(model.path).name
    return short + model.label.removeprefix(model.path)


def _table(done: Evaluation, title: str) -> Table:
    base = done.base
    header = ("model", title, "95 % CI", "kept", "KL", "agreement", "parameters", "bytes", "prefill FLOPs",
              "decoder FLOPs", "seconds")  # fmt: skip
    rows = [
        (
            model.label,
            f"{100 * model.accuracy:.1f} %",
            f"{100 * model.interval[0]:.1f}–{100 * model.interval[1]:.1f}",
            f"{100 * model.accuracy / base.accuracy:.1f} %" if base and base.accuracy else "–",
            "–" if model.kl is None else f"{model.kl:.4f}",
            "–" if model.agreement is None else f"{100 * model.agreement:.1f} %",
            f"{model.parameters:,}",
            f"{model.bytes:,}",
            percent_or_dash(model.flops_share),
            percent_or_dash(model.decoder_flops_share),
            f"{model.seconds:.0f}",
        )
        for model in done.models
    ]
    note = "Kept: as a share of the reference's. KL and agreement: on the reference's answers, token by token."
    return Table("All figures", header, tuple(rows), note if base else "")


def _figures(done: Evaluation) -> list[Part]:
    names = list(dict.fromkeys(name for model in done.models for name in model.figures))
    rows = [(name, *(metric_figure(name, model.figures.get(name)) for model in done.models)) for name in names]
    header = (done.metric, *(name_of(model) for model in done.models))
    return [Table(f"What {done.metric} tells beside", header, tuple(rows))] if rows else []


def _front(done: Evaluation, title: str) -> Scatter:
    """Cost is what a prompt takes: a budget's share of FLOPs times the share of the parameters that are left."""
    most = max(model.parameters for model in done.models)
    points = tuple(
        Point(
            name_of(model),
            100 * model.parameters / most * (1.0 if model.flops_share is None else model.flops_share),
            100 * model.accuracy,
            (100 * model.interval[0], 100 * model.interval[1]),
        )
        for model in done.models
    )
    routed = any(model.flops_share is not None for model in done.models)
    cost = "parameters × prefill FLOPs under the budget" if routed else "parameters"
    note = f"The line joins what nothing beats in both. {title} above, {cost} as a share of the largest model's below."
    return Scatter(
        "What it costs and what it scores", f"{cost} (%)", score_name=f"{title} (%)", points=points, note=note
    )


def _types(done: Evaluation) -> list[Part]:
    """Return what each model does for each type of question, and how far it is from the first one."""
    first, *others = done.models
    if len(first.by_type) < 2:
        return []
    header = ("type", "n", *(name_of(model) for model in done.models))
    rows = [
        (name, str(rate.n), *(f"{100 * model.by_type[name].accuracy:.1f}" for model in done.models))
        for name, rate in first.by_type.items()
    ]
    parts: list[Part] = [Table("By type of question", header, tuple(rows))]
    for model in others[:6]:
        differences = {
            name: 100 * (model.by_type[name].accuracy - rate.accuracy) for name, rate in first.by_type.items()
        }
        bars = tuple(Bar(name, value, None, f"{value:+.1f}") for name, value in differences.items())
        parts.append(Bars(f"{name_of(model)} less {name_of(first)}, in points", bars))
    return parts


def _pairs(done: Evaluation) -> list[Part]:
    rows = tuple(
        (f"{Path(pair.first).name} / {Path(pair.second).name}", str(pair.only_first), str(pair.only_second),
         f"{pair.p_value:.2g}", f"{pair.p_corrected:.2g}") for pair in done.pairs
    )  # fmt: skip
    note = "McNemar's exact test on questions that one of the two does better; corrected by Holm."
    header = ("first / second", "only the first", "only the second", "p", "p corrected")
    return [Table("Two by two, on the same questions", header, rows, note)] if rows else []


def _answers(done: Evaluation) -> list[Part]:
    shown = done.shown
    if shown is None:
        return []
    names = tuple(name_of(model) for model in done.models)
    questions = []
    for number in shown.numbers:
        sample = shown.samples[number]
        picture, size = thumbnail(sample, shown.processor)
        answers = tuple(
            ModelAnswer(_cut(model.answers[number]), model.correct[number], _kept(model.kept.get(number)))
            for model in done.models
        )
        right = ", ".join(sample.answers[:4])
        questions.append(
            ShownQuestion(
                number,
                _cut(question_of(sample)),
                right=_cut(right),
                type=sample.type or "",
                answers=answers,
                picture=picture,
                size=size,
            )
        )
    total = len(shown.samples)
    note = "" if len(questions) == total else f"{len(questions)} of {total} questions, evenly spread over the task."
    return [Answers("Answers beside each other", names, tuple(questions), note)]


def _kept(rows: Sequence[str] | None) -> Kept | None:
    return Kept(tuple(rows)) if rows else None


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
