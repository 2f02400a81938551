"""From a checkpoint to one with a serving router: train it, put it beside the weights, describe, verify."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.record import read_record
from ...checkpoints.source import Source, file_hashes, open_source
from ...clean_room import load_processor, reference_answer
from ...data.calibration import Calibration
from ...models.loading import compute_dtype, load_model, pick_device
from ...progress import Progress
from ...recipe import CalibrationData, RouterRecipe, RunOptions
from ..with_router import check_run, fingerprint, forget_router, unlabelled, write_routed
from .folder import add_serving_router, has_serving_router, load_served, servable
from .settings import check_recipe, check_servable, serving_settings

if TYPE_CHECKING:
    from .loop import TrainedServing

REFERENCE_PRESET = "serve-balanced"  # under which the folder answers the question that verifies it


@dataclass(frozen=True)
class ServingJob:
    """A serving router's recipe with everything that it names opened and checked, but for the model itself."""

    router: RouterRecipe
    source: Source
    entry: dict[str, Any]  # of config.json
    questions: Calibration
    answer_tokens: int
    device: str
    dtype: Any
    memory: str | None


def with_serving_router(
    plain: Path,
    router: RouterRecipe,
    data: CalibrationData,
    out: Path,
    options: RunOptions,
    progress: Progress,
    questions: Calibration | None = None,
) -> Path:
    """Write a copy of the checkpoint `plain` with a serving router that was trained on the questions of `data`.

    A run that is broken off goes on where it was when the same command is repeated, as `with_router` says.

    Args:
        questions: those of `data`, where they were loaded and checked before.
    Raises: InputError for wrong input, CheckFailed where the result does not verify.
    """
    begin = time.monotonic()
    job = prepare_serving(plain, router, data=data, options=options, questions=questions)
    check_run(job, out, options)
    record = read_record(plain).to_data()
    state_file = out.absolute().parent / f".{out.name}.training"
    trained = train_serving_job(job, state_file, progress)
    record["recipe"]["router"] = {**router.to_data(), "calibration": data.to_data()}
    record["serving"] = describe_serving(job, trained, time.monotonic() - begin)
    forget_router(record)

    def add(stage: Path) -> None:
        add_serving_router(stage, job.entry, trained.weights)

    write_routed(plain, out, job, record, part="serving", add=add, reference=served_reference)
    state_file.unlink(missing_ok=True)
    return out


def prepare_serving(
    plain: Path, router: RouterRecipe, data: CalibrationData, options: RunOptions, questions: Calibration | None = None
) -> ServingJob:
    """Open and check what a serving router's recipe names, the cheap things first. Raises: InputError."""
    source = open_source(str(plain))
    check_recipe(router)
    check_servable(source.config, source.raw_config, source.name)
    device = pick_device(options.device)
    return ServingJob(
        router=router,
        source=source,
        entry=serving_settings(source.config, router.question_aware),
        questions=unlabelled(data, router.seed) if questions is None else questions,
        answer_tokens=data.answer_tokens,
        device=device,
        dtype=compute_dtype(options.dtype, source.config, device),
        memory=options.memory,
    )


def train_serving_job(job: ServingJob, state_file: Path | None, progress: Progress) -> TrainedServing:
    """Load the model and train its serving router; what a broken-off run goes on from is in `state_file`, if given."""
    import torch

    from ..training.loop import Training
    from .loop import train_serving_router

    router = job.router
    training = Training(
        steps=router.training_steps,
        batch_size=router.batch_size,
        learning_rate=router.learning_rate,
        seed=router.seed,
        answer_tokens=job.answer_tokens,
    )
    model = load_model(job.source, job.device, job.dtype, job.memory)[0]
    torch.manual_seed(router.seed)
    return train_serving_router(
        servable(model, job.entry),
        load_processor(job.source.folder),
        samples=job.questions.samples,
        training=training,
        progress=progress,
        state_file=state_file,
        fingerprint=fingerprint(router, file_hashes(job.source), job.questions, str(job.dtype)),
    )


def describe_serving(job: ServingJob, trained: TrainedServing, seconds: float) -> dict[str, Any]:
    """Return what the record says of a serving router."""
    return {
        "settings": job.entry,
        "measured": trained.measured,
        "parameters": sum(tensor.numel() for tensor in trained.weights.values()),
        "questions": trained.questions,
        "held_out": trained.held_out,
        "fingerprint": job.questions.fingerprint,
        "curve": trained.curve,
        "step": trained.step,
        "seconds": round(seconds, 1),
        "replaces_another": has_serving_router(job.source),
    }


def served_reference(folder: Path, device: str, dtype: Any) -> dict[str, Any]:
    """Return what the served model answers to the reference question under a preset, and its name."""
    source = open_source(str(folder))
    model = load_served(source, device, dtype)
    model.set_budget(REFERENCE_PRESET)
    return {**reference_answer(model, load_processor(folder)), "preset": REFERENCE_PRESET}
