"""Auto: the fold that helps, chosen on held-out questions of the very run; none where none does.

Every candidate is fitted on the same questions and judged on others, about other pictures: by the error of the last
states, unless more answers become others, or the divergence at the original's answers clearly speaks against it. What
makes that divergence worse than no fold at all is never taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..data.batches import Batch
from ..methods import FOLDS, resolve
from ..models.divergence import CLEARLY, Divergence, most_faithful
from ..models.questions import SUFFIX, JobSize, portion
from ..models.residency import ranges_of
from ..models.side_by_side import Task, side_by_side
from ..models.variants import Variant
from ..plan import Folded
from .held_out import HeldOut
from .job import FoldJob, FoldRefused, GapMemo, gap_memo, measuring
from .reconstruction import reconstructing, refitting

CANDIDATES: dict[str, dict[str, Any]] = {  # in order of simplicity, with their options
    "none": {},
    "scp": {},
    "scp_both": {},
    "least_squares": {},
    "reconstruction": {"share": 1.0},
}
SHARE = {"scp": 0.25, "scp_both": 0.25, "least_squares": 0.25}  # of these questions, where a part suffices


def fold_auto(job: FoldJob, *, fitted_on: int | None = None) -> Folded:
    """Fit the candidates and take the one that stays nearest to the original on held-out questions, or none.

    The job's report says how they did.

    Args:
        fitted_on: questions that the candidates are fitted on, at most; None: as many as a fit reads.
    """
    held_out = job.held_out
    if reason := job.decoder.unfoldable:
        job.report["reason"] = f": in this family {reason}, so that no fold is exact"
    if held_out is None or held_out.too_few:
        job.report["reason"] = f": {held_out.too_few if held_out else 'no questions were held out'}"
    if "reason" in job.report or held_out is None:
        job.report["name"] = "none"
        return {}
    variants: dict[str, Variant] = {}
    notes: dict[str, dict[str, Any]] = {}
    fitted_on = fitted_on or held_out.questions.portion("fit")
    with gap_memo(job.model) as memo:
        jobs = {name: _job_of(name, job, held_out=held_out, fitted_on=fitted_on, memo=memo) for name in CANDIDATES}
        refitted = _read_once(jobs) if ranges_of(job.model) is not None else {}
        for name, options in CANDIDATES.items():
            inner = jobs[name]
            try:
                folded = refitted[name] if name in refitted else resolve(FOLDS[name].run)(inner, **options)
            except FoldRefused:  # by this family of models
                continue
            if folded or name == "none":  # one that had to do nothing is no candidate
                variants[name] = Variant(job.plan, folded)
                notes[name] = inner.report
            elif "fell_back" in inner.report:
                job.report["fell_back"] = f"{name} was no candidate: {inner.report['fell_back']}"
    judged, first = judge_candidates(held_out, variants)
    name = winner(judged)
    job.report.update(_report(name, judged, first, notes))
    return variants[name].folded


def _job_of(name: str, job: FoldJob, held_out: HeldOut, fitted_on: int, memo: GapMemo) -> FoldJob:
    """Return what a candidate works from."""
    number = round(SHARE.get(name, 1.0) * fitted_on)
    return dataclasses.replace(job, batches=_asking(held_out, name, number), memo=memo, report={})


def _read_once(jobs: Mapping[str, FoldJob]) -> dict[str, Folded]:
    """Measure gaps, and reconstruct, in one pass over layers on disk; return what was reconstructed.

    Folds by one linear map find the gaps in their memo. What a family refuses is left to who asks for it.
    """

    def tried(task: Task[Any]) -> Task[Any]:
        with contextlib.suppress(FoldRefused):
            return (yield from task)
        return None

    tasks: list[Task[Any]] = [reconstructing(jobs["reconstruction"], **CANDIDATES["reconstruction"])]
    if not jobs["scp"].decoder.post_norm:
        tasks.append(measuring(jobs["scp"]))
    folded = side_by_side(jobs["scp"].model, [tried(task) for task in tasks])[0]
    return {} if folded is None else {"reconstruction": folded}


def _asking(held_out: HeldOut, fold: str, number: int) -> Callable[..., Iterable[Batch]]:
    return lambda share=1.0: held_out.fit(f"fold ({fold})", max(1, round(share * number)))


def judge_candidates(
    held_out: HeldOut, variants: dict[str, Variant]
) -> tuple[dict[str, Divergence], dict[str, Divergence]]:
    """Judge all variants on a few held-out questions, and those that do best there, and none, on all of them."""
    few = held_out.questions.portion("judge_sets")
    more: dict[str, Divergence] = {}
    if held_out.judges_ahead(few, None):
        both = held_out.judge_twice(list(variants.values()), few, None)
        first, more = (dict(zip(variants, judged, strict=True)) for judged in both)
    else:
        first = dict(zip(variants, held_out.judge(list(variants.values()), few), strict=True))
    better = sorted(first, key=lambda name: _rank(first[name], first["none"]))[: max(2, len(first) // 2)]
    kept = [name for name in variants if name in better or name == "none"]
    if len(held_out.questions.split.held_out) <= few:
        return first, first
    if more:
        return {name: first[name].and_on(more[name]) for name in kept}, first
    known = [first[name] for name in kept]
    return dict(zip(kept, held_out.judge([variants[name] for name in kept], known=known), strict=True)), first


def _rank(divergence: Divergence, unfolded: Divergence) -> tuple[bool, float]:
    """Return what folds are ordered by: those that clearly hurt come last."""
    more, error = divergence.more_than(unfolded)
    return more > CLEARLY * error, divergence.state_error


def winner(judged: dict[str, Divergence]) -> str:
    """Return the most faithful of those whose divergence is no worse than without a fold."""
    names = [name for name in judged if judged[name].mean <= judged["none"].mean]
    return names[most_faithful([judged[name] for name in names])]


def _report(
    name: str, judged: dict[str, Divergence], first: dict[str, Divergence], notes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return what the record says of the choice."""
    fell_back = {"fell_back": notes[name]["fell_back"]} if "fell_back" in notes[name] else {}
    others = sorted(
        (other for other in judged if other != name), key=lambda other: _rank(judged[other], judged["none"])
    )
    runner_up = None
    if others:
        second = judged[others[0]]
        runner_up = {"name": others[0], **second.compared_with(judged[name]), **second.to_data()}
    return {
        "name": name,
        "options": dict(CANDIDATES[name]),
        "chosen_by": "error of the last states, other answers and divergence, held out",
        "held_out": judged[name].to_data(),
        "without": {**judged["none"].compared_with(judged[name]), **judged["none"].to_data()},
        "runner_up": runner_up,
        **fell_back,
        "candidates": {other: {**(judged.get(other) or first[other]).to_data(), **notes[other]} for other in first},
    }


def sweeps(size: JobSize, options: Mapping[str, Any]) -> int:
    """Return how often the weights are read: sums at gaps with a reconstruction, and all of the judging."""
    return 2 if size.judges else 0


def passes(size: JobSize, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return what it costs to fit and to judge the candidates."""
    if not size.judges:
        return 0.0, 0.0
    fit = (options.get("fitted_on") or portion("fit", size.questions)) / size.questions
    few, held_out = size.share("judge_sets"), size.share("held_out")
    then = 4 if size.streamed else 3  # candidates that the first questions leave
    judging = few * (1 + 4 * SUFFIX) + max(0.0, held_out - few) * (1 + then * SUFFIX)
    gaps = max(SHARE.values())  # measured once, for all that read no more than them
    return fit * (gaps + refitting(size)) + judging, fit + held_out
