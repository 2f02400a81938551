"""The steps between a loaded model and a written checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from .. import ranks
from ..checkpoints.source import Source, ignored_keys
from ..fold.held_out import HeldOut
from ..fold.job import FoldJob, GapMemo, gap_memo
from ..fold.sets import FoldedSets
from ..localize import LocalizeJob, explicit, run_localizer
from ..localize.judged import JudgedSets, KeptLoss
from ..localize.scores import LayerScores
from ..methods import FOLDS, LOCALIZERS, resolve
from ..models.questions import Questions
from ..models.residency import ranges_of
from ..models.variants import Variant, assembled
from ..plan import Folded, PruningPlan, best_in_period, breaks_period, make_plan
from .job import CompressionJob
from .record import describe
from .stages import Stages

LAST_READ = 4  # weights and biases of the two output matrices of a layer


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is to become of a checkpoint, and what its record says of that."""

    plan: PruningPlan
    folded: Folded
    record: dict[str, Any]
    bytes_read: int | None = None  # of weights, where layers lie on disk


def changes_of(job: CompressionJob, stages: Stages | None = None) -> Changes:
    """Choose the layers, and fold; the model is loaded only where it is needed, and let go.

    Args:
        stages: what a run that was broken off has finished of this, which is not done again.
    """
    if not job.needs_model:
        return _without_model(job)
    stages = stages or Stages()
    model, ignored = job.load_model()
    questions = job.questions(model)
    ranges = ranges_of(model)
    stages.read_here = lambda: 0 if ranges is None else ranges.bytes_read
    if ranges is not None:
        ranges.journal = stages.journal
    stages.follow_answers(questions)
    judged = JudgedSets()
    stages.follow_judged(judged, questions)
    scores = stages.run("scores", questions, functools.partial(localize, job, model, questions, judged))
    plan = make_plan(job.source.num_layers, scores.drop)
    folded, fold = stages.run("fold", questions, functools.partial(fold_gaps, job, model, questions, plan))
    smaller = Variant(plan, folded)
    reference = stages.run("reference", questions, functools.partial(_reference, model, questions, smaller))
    read = ranks.total(stages.read_here())
    stages.read_here = lambda: read  # lets the layers go
    if ranges is not None:
        ranges.room.forget(*ranges.room.layers.values())
    del model, questions.model  # verification loads the checkpoint again: there is memory for one
    record = describe(job, questions, scores=scores, plan=plan, fold=fold, reference=reference)
    record["source"]["unexpected_keys"] = ignored
    return Changes(plan, folded, record, None if ranges is None else stages.before.bytes_read + read)


def _reference(model: Any, questions: Questions, smaller: Variant) -> dict[str, Any]:
    """Return what the smaller model says to the reference question; the first process asks it."""

    def answer() -> dict[str, Any]:
        with assembled(model, smaller):
            return questions.reference_answer()

    return ranks.from_first(answer)


def _without_model(job: CompressionJob) -> Changes:
    """Take the layers that are named or scored already: headers are read, and nothing else of the weights."""
    questions = job.questions(None)
    scores = localize(job, None, questions)
    plan = make_plan(job.source.num_layers, scores.drop)
    fold = {"name": "none", "options": {}, "reason": "", "tensors": []}
    record = describe(job, questions, scores=scores, plan=plan, fold=fold, reference=None)
    record["source"]["unexpected_keys"] = ignored_keys(job.source)
    return Changes(plan, {}, record)


def localize(job: CompressionJob, model: Any, questions: Questions, judged: JudgedSets | None = None) -> LayerScores:
    """Return the layers to drop: as stored scores or the recipe name them, or by the recipe's localizer.

    Args:
        judged: sets of layers that a run before has judged, and that takes those that are judged here.
    """
    if job.chosen is not None:
        return in_period(job, job.chosen) if job.recipe.keep_period else job.chosen
    if job.recipe.budget.layers is not None:
        return explicit(job.source.num_layers, job.recipe.budget.layers)
    if LOCALIZERS[job.recipe.localizer.name].control:  # looks at nothing
        looking_at_nothing = LocalizeJob(None, job.source.num_layers, None, job.recipe.seed)
        scores = run_localizer(job.recipe.localizer, looking_at_nothing, job.count, job.protect)
        return in_period(job, scores) if job.recipe.keep_period else scores
    judged = judged or JudgedSets()
    folded = FoldedSets(
        model=model,
        kept=judged,
        held_out=HeldOut(model, questions),
        read=reader(job.source, model),
        decoder=job.source.decoder,
        multiplier=job.multiplier,
    )
    measured_from = LocalizeJob(
        model=model,
        num_layers=job.source.num_layers,
        questions=questions,
        seed=job.recipe.seed,
        folded=None if questions.split.too_few else folded,
        kept_loss=functools.partial(KeptLoss, judged=judged),
    )
    scores = run_localizer(job.recipe.localizer, measured_from, job.count, job.protect)
    return in_period(job, scores) if job.recipe.keep_period else scores


def in_period(job: CompressionJob, scores: LayerScores) -> LayerScores:
    """Return the scores with the best layers that keep the period of attention types; themselves where theirs do."""
    plan = make_plan(job.source.num_layers, scores.drop)
    if breaks_period(job.source.config, plan.keep) is None:
        return scores
    drop = best_in_period(job.source.config, scores.values, job.count, job.protect)
    return dataclasses.replace(scores, drop=drop, details=scores.details | {"before_keep_period": list(scores.drop)})


def fold_gaps(
    job: CompressionJob, model: Any, questions: Questions, plan: PruningPlan
) -> tuple[Folded, dict[str, Any]]:
    """Return new weights for the layers that stay, and what the record says of them."""
    method = job.fold
    with gap_memo(model) as memo:
        fold_inputs = fold_job(job, model, questions=questions, plan=plan, memo=memo)
        folded = resolve(FOLDS[method.name].run)(fold_inputs, **method.options) if plan.drop else {}
    tensors = [f"layer {layer}'s {name}" for layer, name in sorted(folded)]
    told = {"name": method.name if plan.drop else "none", "options": method.options, "reason": "", **fold_inputs.report}
    return folded, {**told, "tensors": tensors}


def fold_job(
    job: CompressionJob, model: Any, questions: Questions, plan: PruningPlan, memo: GapMemo | None = None
) -> FoldJob:
    """Return what a fold of the plan works from.

    Args:
        memo: where gaps are kept that several folds of one model share.
    """
    return FoldJob(
        model=model,
        batches=functools.partial(questions.batches, f"fold ({job.fold.name})"),
        plan=plan,
        read=reader(job.source, model),
        decoder=job.source.decoder,
        multiplier=job.multiplier,
        memo=memo or GapMemo(),
        held_out=HeldOut(model, questions),
        half_of=questions.half_of,
    )


def reader(source: Source, model: Any = None) -> Callable[[int, str], Any]:
    """Return a function that reads a decoder layer's tensor by its name inside the layer; None where there is none.

    Args:
        model: where its layers are on disk, what is read for folds is counted too; the last few tensors stay.
    """
    ranges = None if model is None else ranges_of(model)

    def read(layer: int, name: str) -> Any:
        full = f"{source.layer_prefix}{layer}.{name}"
        if full not in source.weights.entries:
            return None
        if ranges is not None:
            ranges.count(source.weights.entries[full].num_bytes)
        return source.weights.read(full)

    return read if ranges is None else functools.lru_cache(LAST_READ)(read)
