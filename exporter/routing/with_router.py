"""From a compressed checkpoint to one with a router: train it, put it beside the weights, describe, verify."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..cards.card_file import carry_card
from ..cards.model_card import card
from ..checkpoints.files import carry_adapter, hashes
from ..checkpoints.record import read_record, write_record
from ..checkpoints.source import file_hashes, open_source
from ..checkpoints.staging import check_space, check_target, staged
from ..checkpoints.verification import require
from ..checkpoints.writer import write_checkpoint
from ..clean_room import load_processor, reference_answer
from ..data.calibration import Calibration, load_calibration
from ..errors import InputError
from ..models.loading import compute_dtype, load_model, pick_device
from ..plan import PruningPlan
from ..recipe import CalibrationData, RouterRecipe, RunOptions
from .folder import add_router, load_routed
from .settings import check_routable, default_settings

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def with_router(
    plain: Path, router: RouterRecipe, data: CalibrationData, out: Path, options: RunOptions, progress: Progress
) -> Path:
    """A copy of the checkpoint `plain` with a router that was trained on the questions of `data`.

    A run that is broken off goes on where it was when the same command is repeated: the training's state lies beside
    the target as .NAME.training until the checkpoint is there.

    Raises: InputError for wrong input, CheckFailed where the result does not verify.
    """
    from ..modeling.routed_route import RouterSettings
    from .training.loop import Training, train_router
    from .training.losses import check_loss

    begin = time.monotonic()
    check_target(out)
    source = open_source(str(plain))
    check_routable(source.config)
    check_loss(router.loss)
    settings = default_settings(source.config, router.drop_at, router.candidates)
    source.config.router = settings
    questions = unlabelled(data, router.seed)
    check_space(out, source.weights.num_bytes)
    record = read_record(plain)
    device = pick_device(options.device)
    dtype = compute_dtype(options.dtype, source.config, device)
    loss = router.loss
    training = Training(
        steps=router.steps,
        batch_size=router.batch_size,
        learning_rate=router.learning_rate,
        loss=loss.name,
        options=loss.options,
        seed=router.seed,
        answer_tokens=data.answer_tokens,
    )
    state_file = out.absolute().parent / f".{out.name}.training"
    trained = train_router(
        load_model(source, device, dtype, options.memory)[0],
        load_processor(source.folder),
        questions.samples,
        RouterSettings.of(source.config),
        training,
        progress,
        state_file,
        fingerprint(router, file_hashes(source), questions, str(dtype)),
    )
    record["recipe"]["router"] = {**router.to_data(), "calibration": data.to_data()}
    record["router"] = {
        "settings": settings,
        "parameters": sum(tensor.numel() for tensor in trained.weights.values()),
        "questions": trained.questions,
        "held_out": trained.held_out,
        "fingerprint": questions.fingerprint,
        "curve": trained.curve,
        "seconds": round(time.monotonic() - begin, 1),
        "replaces_another": "router" in source.raw_config,
    }
    forget_router(record)
    with staged(out) as stage:
        write_checkpoint(source, PruningPlan(source.num_layers, ()), {}, stage)
        carry_adapter(plain, stage)
        add_router(stage, settings, trained.weights)
        record["measured"]["files"] = hashes(stage)
        record["router"]["reference"] = routed_reference(stage, device, dtype)
        write_record(stage, record)
        carry_card(plain, stage)
        card(stage, out.name)
        require(stage, device)
    state_file.unlink(missing_ok=True)
    return out


def forget_router(record: dict[str, Any]) -> None:
    """Take out what was measured under budgets of a router that the source had."""
    for name in ("evaluations", "benchmarks"):
        if name in record:
            record[name] = [entry for entry in record[name] if not entry.get("budget")]
    record.pop("routes", None)


def unlabelled(data: CalibrationData, seed: int) -> Calibration:
    """The questions to train on, with every image looked at."""
    found = load_calibration(
        data.data,
        samples=data.samples,
        seed=seed,
        columns=data.columns,
        split=data.split,
        prompt=data.prompt,
        config=data.config,
        allow_urls=data.allow_urls,
    )
    if len(found.samples) < 8:
        raise InputError(
            f"{data.data} holds {len(found.samples)} questions: a router needs 8 to learn from, better 500."
        )
    for sample in found.samples:
        sample.chat()
        sample.open_images()
    return found


def fingerprint(router: RouterRecipe, files: dict[str, str], questions: Calibration, dtype: str) -> str:
    """Of everything that a training run depends on."""
    parts = [json.dumps(router.to_data(), sort_keys=True), json.dumps(files, sort_keys=True), questions.fingerprint]
    return hashlib.sha256("".join([*parts, dtype]).encode()).hexdigest()


def routed_reference(folder: Path, device: str, dtype: Any) -> dict[str, Any]:
    """What the routed model answers to the reference question under its default preset."""
    source = open_source(str(folder))
    model = load_routed(source, device, dtype)
    model.set_budget(model.router_settings.default)
    return reference_answer(model, load_processor(folder))
