"""The whole story: from a recipe to a checkpoint that has been verified before it gets its name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ranks
from .cards.model_card import card
from .checkpoints.files import real_target
from .checkpoints.record import is_compressed, write_record
from .checkpoints.source import Source, open_source
from .checkpoints.staging import check_space, check_target, staged, staging_directory
from .checkpoints.temporary import remove_unless_held
from .checkpoints.tensor_types import refuse_not_finite
from .checkpoints.verification import require
from .checkpoints.writer import kept_pieces, write_checkpoint
from .compression.job import CompressionJob, prepare
from .compression.record import measure, scores_to_keep, write_verified
from .compression.stages import Stages, fingerprint_of, parts_of, stages_in
from .compression.steps import Changes, changes_of, localize
from .data.calibration import Calibration
from .errors import CheckFailed, InputError, show_as
from .healing.estimate import healing_cost
from .healing.healed import check_healing, merged_again, prepare_healing, with_healing
from .healing.schedule import Schedule
from .localize.scores import LayerScores
from .localize.stored import StoredScores, load_scores
from .plan import LayerBudget, breaks_period
from .progress import Progress, counting_bytes, silent
from .recipe import ROUTER_SAMPLES, CalibrationData, HealRecipe, Recipe, RouterRecipe, RunOptions
from .routing.serving.job import with_serving_router
from .routing.serving.settings import check_recipe, check_servable, refuse_question_aware
from .routing.settings import check_routable, default_settings
from .routing.with_router import unlabelled, with_router

logger = logging.getLogger(__name__)


def compress(
    recipe: Recipe,
    out: Path | str,
    options: RunOptions = RunOptions(),
    progress: Progress = silent,
    healed: Path | str | None = None,
    scores: StoredScores | Path | str | None = None,
) -> Path:
    """Make the checkpoint that a recipe describes, in the folder `out`, and verify it.

    Args:
        healed: a checkpoint that this recipe gave; what it learnt is merged, and nothing is trained.
        scores: of the layers, as `score` keeps them; no localizer runs.
    Returns: the folder. Raises: InputError for wrong input, CheckFailed where the result does not verify; in both
    cases nothing is left at `out`.
    """
    out = Path(out)
    if ranks.is_first():
        check_target(out)
    stored, work = load_scores(scores) if isinstance(scores, Path | str) else scores, work_folder(out)
    if recipe.router is None and recipe.heal is None:
        _compress(recipe, out, work, options=options, progress=progress, stored=stored)
        if ranks.is_first():
            remove_unless_held(work)
        return out
    questions = check_router(recipe) if recipe.router is not None else None
    if recipe.heal is not None and healed is None:
        check_healing(recipe.heal.seeded(recipe.seed), recipe.heal.calibration or recipe.calibration.unanswered)
    with _stage_of_all(out) as stage:
        plain = dataclasses.replace(recipe, heal=None, router=None)
        folder = _compress(plain, stage / "folded" / out.name, work, options=options, progress=progress, stored=stored)
        if recipe.heal is not None:
            target = out if recipe.router is None else stage / "healed" / out.name
            if healed is not None:
                merge = functools.partial(merged_again, folder, Path(healed), target, options)
                folder = ranks.from_first(merge)
            else:
                folder = _heal(folder, recipe.heal, recipe, target=target, out=out, options=options, progress=progress)
        if recipe.router is not None:
            train = with_serving_router if recipe.router.serve else with_router
            folder = train(folder, recipe.router, router_data(recipe.router, recipe.calibration),
                           out=out, options=options, progress=progress, questions=questions)  # fmt: skip
    if ranks.is_first():
        remove_unless_held(work)
    return folder


@contextlib.contextmanager
def _stage_of_all(out: Path) -> Iterator[Path]:
    """Give the folder of the first process for checkpoints on the way to `out`; the others read them there.

    Raises: InputError where they can't, as on machines that share no disk.
    """
    with staging_directory(out) if ranks.is_first() else contextlib.nullcontext(out) as mine:

        def with_folders() -> Path:
            for name in ("folded", "healed"):
                (mine / name).mkdir()
            return mine

        stage = ranks.from_first(with_folders)
        show_as(stage, out)
        if not stage.is_dir():
            raise InputError(
                f"process {ranks.rank()} does not see the folder of {out}, where process 0 writes: on machines that "
                "share no disk, compress first, copy the result to each, then start `heal` or `route`."
            )
        yield stage


def work_folder(out: Path, what: str = "compressing") -> Path:
    """Return the folder for what a run that is broken off goes on from; it is removed at the end.

    It lies beside the result: where `out` is a link, beside what it leads to.
    """
    target = real_target(out)
    return target.parent / f".{target.name}.{what}"


def heal(
    model: str | Path,
    healing: HealRecipe,
    out: Path | str,
    options: RunOptions = RunOptions(),
    progress: Progress = silent,
) -> Path:
    """Train a checkpoint with fewer layers, whoever made it, to answer as its original does.

    Args:
        model: folder or hub id.
        healing: its `teacher` names the original, its `calibration` the unlabelled questions.
    Returns: the folder, a plain checkpoint. Raises: InputError, CheckFailed, as `compress`.
    """
    model, out = str(model), Path(out)
    ranks.from_first(lambda: check_target(out))
    if healing.calibration is None or healing.teacher is None:
        raise InputError(
            "healing needs the original (--teacher MODEL) and questions about images (--calibration FILE)."
        )
    source = open_source(model)
    if not is_compressed(source.folder):
        return compress(all_layers(model, healing.calibration, heal=healing), out, options, progress)
    recipe = all_layers(model, healing.calibration)
    return _heal(source.folder, healing, recipe, target=out, out=out, options=options, progress=progress)


def check_heal(model: str | Path, healing: HealRecipe, out: Path, options: RunOptions = RunOptions()) -> dict[str, Any]:
    """Check what `heal` is given; return what it would cost. Nothing is loaded or written."""
    check_target(out)
    assert healing.calibration is not None and healing.teacher is not None
    job = prepare_healing(str(model), healing, data=healing.calibration, teacher=healing.teacher, options=options)
    kept = job.source.num_layers / job.teacher.num_layers
    samples, tokens = job.calibration.samples, job.answer_tokens
    return healing_cost(
        job.schedule, job.teacher, samples=samples, answer_tokens=tokens, kept_layers=kept, itemsize=job.dtype.itemsize
    )


def healing_of(recipe: Recipe, source: Source, gone: int, itemsize: int) -> dict[str, Any]:
    """Check the healing that a compression asks for; return what it would cost.

    Args:
        gone: layers that the smaller model lacks; itemsize: bytes of a number while it runs.
    """
    assert recipe.heal is not None
    data = recipe.heal.calibration or recipe.calibration.unanswered
    calibration, fit, held_out = check_healing(recipe.heal.seeded(recipe.seed), data)
    schedule, kept = Schedule(recipe.heal, len(fit), len(held_out)), 1 - gone / source.num_layers
    return healing_cost(
        schedule,
        source,
        samples=calibration.samples,
        answer_tokens=data.answer_tokens,
        kept_layers=kept,
        itemsize=itemsize,
    )


def _heal(
    plain: Path, healing: HealRecipe, recipe: Recipe, target: Path, out: Path, options: RunOptions, progress: Progress
) -> Path:
    """Heal a checkpoint into `target`; what a broken-off run goes on from lies beside `out` as .NAME.healing."""
    data, teacher = healing.calibration or recipe.calibration.unanswered, healing.teacher or recipe.model
    work = work_folder(out, "healing")
    heal = healing.seeded(recipe.seed)
    return with_healing(plain, heal, data, teacher=teacher, out=target, options=options, progress=progress, work=work)


def route(
    model: str | Path,
    router: RouterRecipe,
    out: Path | str,
    options: RunOptions = RunOptions(),
    progress: Progress = silent,
) -> Path:
    """Train a router for a checkpoint, whoever made it, and write a copy of the checkpoint with the router.

    Args:
        model: folder or hub id.
        router: its `calibration` names the unlabelled questions.
    Returns: the folder. Raises: InputError, CheckFailed, as `compress`.
    """
    model, out = str(model), Path(out)
    ranks.from_first(lambda: check_target(out))
    if router.calibration is None:
        raise InputError("a router is trained on questions about images: name them with --calibration FILE.")
    source = open_source(model)
    check_model_of(router, source)
    if is_compressed(source.folder):
        train = with_serving_router if router.serve else with_router
        return train(source.folder, router, data=router.calibration, out=out, options=options, progress=progress)
    return compress(all_layers(model, router.calibration, router=router), out, options, progress)


def all_layers(
    model: str, calibration: CalibrationData, heal: HealRecipe | None = None, router: RouterRecipe | None = None
) -> Recipe:
    """Return the recipe that removes no layer: what is healed or routed is the model as it came."""
    return Recipe(model, calibration, LayerBudget(layers=()), heal=heal, router=router)


def router_data(router: RouterRecipe, calibration: CalibrationData) -> CalibrationData:
    """Return the router's own questions; where none are named the compression's, all of them up to ROUTER_SAMPLES."""
    return router.calibration or dataclasses.replace(calibration.unanswered, samples=ROUTER_SAMPLES)


def check_model_of(router: RouterRecipe, source: Source) -> None:
    """Raise InputError, with the reason, if a model can't have the router that is asked for."""
    if router.serve:
        check_recipe(router)
        check_servable(source.config, source.raw_config, source.name)
        return
    refuse_question_aware(router)
    check_routable(source.config)


def check_router(recipe: Recipe) -> Calibration:
    """Check the router's part of a recipe before the layers are looked at; return its questions, checked too."""
    from .routing.training.losses import check_loss

    router = recipe.router
    assert router is not None
    source = open_source(recipe.model, recipe.revision)
    check_model_of(router, source)
    if not router.serve:
        check_loss(router.loss)
        default_settings(
            source.config, router.drop_at, router.candidates, router.read_at
        )  # what does not fit all layers fits fewer still less
    return unlabelled(router_data(router, recipe.calibration), router.seed)


def _compress(
    recipe: Recipe, out: Path, work: Path, options: RunOptions, progress: Progress, stored: StoredScores | None = None
) -> Path:
    job = _prepared(recipe, options, progress, stored)
    if ranks.is_first():
        check_space(out, job.source.weights.num_bytes)
    if not job.needs_model:
        return ranks.from_first(lambda: _written(job, out, Stages(), changes_of(job)))
    with stages_in(work, fingerprint_of(job)) if ranks.is_first() else contextlib.nullcontext(Stages()) as stages:
        changes = changes_of(job, stages)
        return ranks.from_first(lambda: _written(job, out, stages, changes))


def _prepared(
    recipe: Recipe, options: RunOptions, progress: Progress, stored: StoredScores | None = None
) -> CompressionJob:
    """Open what a recipe names. Raises: InputError also where processes of one run are given different things."""
    job = prepare(recipe, options, progress, stored)
    if ranks.world() > 1:
        ranks.same(parts_of(job))
    return job


def _written(job: CompressionJob, out: Path, stages: Stages, changes: Changes) -> Path:
    """Write a checkpoint into the folder `out`, and verify it."""
    options, progress = job.options, job.progress
    plan, folded, record = changes.plan, changes.folded, changes.record
    if broken := breaks_period(job.source.config, plan.keep):
        logger.warning("%s: %s", out.name, broken)
    if fell_back := record["fold"].get("fell_back"):
        logger.warning("%s: %s; more calibration questions give more tokens", out.name, fell_back)
    if any(name in job.source.raw_config for name in ("router", "serving_router")):
        logger.warning("%s: its router stays behind, since it was trained for this model as it is", job.source.name)
    with staged(out) as stage:
        kept = sum(piece.entry.num_bytes for shard in kept_pieces(job.source, plan, folded) for piece in shard)
        with counting_bytes(progress, "write", kept) as advance:
            write_checkpoint(job.source, plan, folded=folded, folder=stage, advance=advance)
        record["measured"] = measure(stage, record, stages.spent.seconds, changes.bytes_read)
        write_record(stage, record)
        card(stage, out.name)
        try:
            verified = require(stage, job.device, memory=options.memory)
        except CheckFailed:
            refuse_not_finite(job.source.name, job.source.weights)  # they were copied unread
            raise
        write_verified(stage, record, verified)
    return out


def score(
    recipe: Recipe, options: RunOptions = RunOptions(), progress: Progress = silent, save: Path | str | None = None
) -> tuple[CompressionJob, LayerScores]:
    """Score the layers, and remove none. Returns: what was opened, and the scores.

    Args:
        save: a file that takes the scores with all that they depend on, for `compress(..., scores=FILE)`.
    """
    job = _prepared(recipe, options, progress)
    model = job.load_model()[0] if job.reads_questions else None
    questions = job.questions(model)
    scores = localize(job, model, questions)
    questions.count_tokens()
    if save is not None and ranks.is_first():
        scores_to_keep(job, questions, scores).save(Path(save))
    return job, scores
