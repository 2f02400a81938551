"""From a compressed checkpoint to one with a router: train it, put it beside the weights, describe, verify."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ranks
from ..cards.card_file import carry_card
from ..cards.model_card import card
from ..checkpoints.files import carry_adapter, hashes
from ..checkpoints.record import read_record, write_record
from ..checkpoints.source import Source, file_hashes, open_source
from ..checkpoints.staging import check_space, check_target, staged
from ..checkpoints.verification import require
from ..checkpoints.writer import write_checkpoint
from ..clean_room import load_processor, reference_answer
from ..data.calibration import Calibration, questions_of
from ..errors import InputError
from ..models.loading import alike_options, compute_dtype, load_model, pick_device
from ..plan import PruningPlan
from ..progress import Progress
from ..recipe import CalibrationData, RouterRecipe, RunOptions
from .folder import add_router, load_routed
from .settings import check_routable, default_settings

if TYPE_CHECKING:
    from .training.loop import Trained


def with_router(
    plain: Path,
    router: RouterRecipe,
    data: CalibrationData,
    out: Path,
    options: RunOptions,
    progress: Progress,
    questions: Calibration | None = None,
) -> Path:
    """Write a copy of the checkpoint `plain` with a router that was trained on the questions of `data`.

    A run that is broken off goes on where it was when the same command is repeated: the training's state lies beside
    the target as .NAME.training until the checkpoint is there.

    Args:
        questions: those of `data`, where they were loaded and checked before.
    Raises: InputError for wrong input, CheckFailed where the result does not verify.
    """
    begin = time.monotonic()
    job = prepare_router(plain, router, data=data, options=options, questions=questions)
    check_run(job, out, options)
    record = read_record(plain).to_data()
    state_file = out.absolute().parent / f".{out.name}.training"
    trained = train_job(job, state_file, progress)
    record.pop("serving", None)  # a serving router stays behind: a folder has one of the two
    record["recipe"]["router"] = {**router.to_data(), "calibration": data.to_data()}
    settings = with_budgets(job.settings, trained.budgets)
    record["router"] = describe_router(job, settings, trained, time.monotonic() - begin)
    forget_router(record)

    def add(stage: Path) -> None:
        add_router(stage, settings, trained.weights)

    write_routed(plain, out, job, record, part="router", add=add, reference=routed_reference)
    state_file.unlink(missing_ok=True)
    return out


def write_routed(
    plain: Path,
    out: Path,
    job: Any,
    record: dict[str, Any],
    *,
    part: str,
    add: Callable[[Path], None],
    reference: Callable[[Path, str, Any], dict[str, Any]],
) -> None:
    """Write a copy of `plain` with a router, described and verified; of several processes the first one does.

    Args:
        job: a RouterJob, or a ServingJob.
        record: to which the files' hashes and the router's answer are added.
        part: of the record, that is the router's.
        add: puts the router into a folder.
        reference: asks the folder, on a device and in a dtype, for the answer that it is verified by.
    """

    def write() -> None:
        with staged(out) as stage:
            write_checkpoint(job.source, PruningPlan(job.source.num_layers, ()), {}, stage)
            carry_adapter(plain, stage)
            add(stage)
            record["measured"]["files"] = hashes(stage)
            record[part]["reference"] = reference(stage, job.device, job.dtype)
            write_record(stage, record)
            carry_card(plain, stage)
            card(stage, out.name)
            require(stage, job.device)

    ranks.from_first(write)


def check_run(job: Any, out: Path, options: RunOptions) -> None:
    """Raise InputError where the result has no place, or where processes of one run are given different things.

    Args:
        job: a RouterJob, or a ServingJob.
    """

    def check_place() -> None:
        check_target(out)
        check_space(out, job.source.weights.num_bytes)

    ranks.from_first(check_place)
    if ranks.world() > 1:
        ranks.same(
            {
                "the recipe": [job.router.to_data(), job.answer_tokens],
                "the source": file_hashes(job.source),
                "the questions": job.questions.fingerprint,
                "device, dtype or memory": alike_options(job.device, job.dtype, options.batch_size, job.memory),
            }
        )


@dataclass(frozen=True)
class RouterJob:
    """A router's recipe with everything that it names opened and checked, but for the model itself."""

    router: RouterRecipe
    source: Source  # its config has the router's settings
    settings: dict[str, Any]
    questions: Calibration
    answer_tokens: int
    device: str
    dtype: Any
    memory: str | None


def prepare_router(
    plain: Path, router: RouterRecipe, data: CalibrationData, options: RunOptions, questions: Calibration | None = None
) -> RouterJob:
    """Open and check what a router's recipe names, the cheap things first. Raises: InputError."""
    from .training.losses import check_loss

    source = open_source(str(plain))
    check_routable(source.config)
    check_loss(router.loss)
    settings = default_settings(source.config, router.drop_at, router.candidates, router.read_at)
    source.config.router = settings
    device = pick_device(options.device)
    return RouterJob(
        router=router,
        source=source,
        settings=settings,
        questions=unlabelled(data, router.seed) if questions is None else questions,
        answer_tokens=data.answer_tokens,
        device=device,
        dtype=compute_dtype(options.dtype, source.config, device),
        memory=options.memory,
    )


def train_job(job: RouterJob, state_file: Path, progress: Progress) -> Trained:
    """Load the model and train its router; what a broken-off run goes on from is in `state_file`."""
    from ..modeling.routed_route import RouterSettings
    from .training.loop import Training, train_router

    router = job.router
    training = Training(
        steps=router.training_steps,
        batch_size=router.batch_size,
        learning_rate=router.learning_rate,
        loss=router.loss.name,
        options=router.loss.options,
        seed=router.seed,
        answer_tokens=job.answer_tokens,
    )
    return train_router(
        load_model(job.source, job.device, job.dtype, job.memory)[0],
        load_processor(job.source.folder),
        samples=job.questions.samples,
        settings=RouterSettings.of(job.source.config),
        training=training,
        progress=progress,
        state_file=state_file,
        fingerprint=fingerprint(router, file_hashes(job.source), job.questions, str(job.dtype)),
    )


def with_budgets(settings: dict[str, Any], budgets: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with what was measured of budgets, and with presets that are shares of cost."""
    if not budgets:
        return settings
    from .training.outcomes import PRESETS

    run_by = {name: value for name, value in budgets.items() if name != "measured"}
    return {**settings, "presets": settings["presets"] | PRESETS, "budgets": run_by}


def describe_router(job: RouterJob, settings: dict[str, Any], trained: Trained, seconds: float) -> dict[str, Any]:
    """Return what the record says of a router."""
    return {
        "settings": settings,
        "measured": trained.budgets.get("measured", []),
        "parameters": sum(tensor.numel() for tensor in trained.weights.values()),
        "questions": trained.questions,
        "held_out": trained.held_out,
        "fingerprint": job.questions.fingerprint,
        "curve": trained.curve,
        "seconds": round(seconds, 1),
        "replaces_another": any(name in job.source.raw_config for name in ("router", "serving_router")),
    }


def forget_router(record: dict[str, Any]) -> None:
    """Take out what was measured under budgets of a router that the source had."""
    for name in ("evaluations", "benchmarks"):
        if name in record:
            record[name] = [entry for entry in record[name] if not entry.get("budget")]
    record.pop("routes", None)


def unlabelled(data: CalibrationData, seed: int) -> Calibration:
    """Return the questions to train on, with every image looked at."""
    questions = questions_of(data, seed)
    if len(questions.samples) < 8:
        raise InputError(
            f"{data.data} holds {len(questions.samples)} questions: a router needs 8 to learn from, better 500."
        )
    for sample in ranks.share(questions.samples):
        sample.check()
    return questions


def fingerprint(router: RouterRecipe, files: dict[str, str], questions: Calibration, dtype: str) -> str:
    """Hash everything that a training run depends on."""
    parts = [json.dumps(router.to_data(), sort_keys=True), json.dumps(files, sort_keys=True), questions.fingerprint]
    return hashlib.sha256("".join([*parts, dtype]).encode()).hexdigest()


def routed_reference(folder: Path, device: str, dtype: Any) -> dict[str, Any]:
    """Return what the routed model answers to the reference question under its default preset."""
    source = open_source(str(folder))
    model = load_routed(source, device, dtype)
    model.set_budget(model.router_settings.default)
    return reference_answer(model, load_processor(folder))
