"""The entries of compression.json that describe a compression."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cards.licence import inherited_licence
from ..cards.model_card import base_model_of
from ..checkpoints.config_file import load_config
from ..checkpoints.files import hashes
from ..checkpoints.json_file import read_json
from ..checkpoints.record import reference_part, write_record
from ..checkpoints.record_types import CalibrationPart, ScoresPart
from ..checkpoints.source import file_hashes
from ..checkpoints.staging import stage_name
from ..checkpoints.verification import Verification
from ..checkpoints.weight_files import open_weights
from ..localize.scores import LayerScores
from ..localize.stored import FORMAT, ScoredSource, StoredScores
from ..models.flops import kv_bytes_per_token
from ..models.questions import Questions
from ..plan import PruningPlan, breaks_period
from ..version import versions
from .job import CompressionJob

logger = logging.getLogger(__name__)


def describe(
    job: CompressionJob,
    questions: Questions,
    scores: LayerScores,
    plan: PruningPlan,
    fold: dict[str, Any],
    reference: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return compression.json: everything that is needed to understand the checkpoint and to make it again.

    Args:
        reference: the answer that it will be compared by; None where the model was not loaded.
    """
    source, dtype = job.source, str(job.dtype).removeprefix("torch.")
    base_model = base_model_of(source.name, source.folder, job.recipe.base_model)
    return {
        "format": 1,
        "recipe": job.recipe.to_data(),
        "run": {
            "device": job.device,
            "dtype": dtype,
            "batch_size": job.options.batch_size,
            "memory": job.options.memory,
        },
        "source": {
            "name": source.name,
            "revision": source.revision,
            "model_type": source.config.model_type,
            "base_model": base_model,
            "license": inherited_licence(source.folder, base_model),
            "parameters": source.weights.num_parameters,
            "bytes": source.weights.num_bytes,
            "kv_bytes_per_token": kv_bytes_per_token(source.config, job.dtype),
            "files": file_hashes(source),
        },
        "calibration": calibration_part(job, questions),
        "protect": list(job.protect),
        "scores": {
            "method": scores.method,
            "values": list(scores.values),
            "drop": list(scores.drop),
            "details": scores.details,
            "stored": job.stored is not None,
        },
        "plan": {
            "num_layers": plan.num_layers,
            "drop": list(plan.drop),
            "keep": list(plan.keep),
            "broken_period": breaks_period(source.config, plan.keep),
        },
        "fold": fold,
        "reference": None if reference is None else reference_part(reference, dtype),
        "evaluations": [],
        "versions": versions(),
    }


def calibration_part(job: CompressionJob, questions: Questions) -> dict[str, Any]:
    """Return what is said of the questions; of those that stored scores were read from where there are no others."""
    if job.stored is not None and not job.calibration.samples:
        return asdict(job.stored.calibration)
    elsewhere = job.calibration.answers
    return {
        "data": job.recipe.calibration.data,
        "samples": len(job.calibration.samples),
        "of": job.calibration.total,
        "fingerprint": job.calibration.fingerprint,
        "tokens": questions.tokens,
        "answer_tokens": sum(len(tokens) for tokens in questions.answers.values()),
        "pictures": questions.split.num_pictures,
        "held_out": len(questions.split.held_out),
    } | ({} if elsewhere is None else {"answers": {"file": elsewhere.path, "sha256": elsewhere.sha256}})


def scores_to_keep(job: CompressionJob, questions: Questions, scores: LayerScores) -> StoredScores:
    """Return scores with all that they depend on."""
    source, part = job.source, calibration_part(job, questions)
    return StoredScores(
        format=FORMAT,
        source=ScoredSource(source.name, source.revision, file_hashes(source)),
        calibration=CalibrationPart(**{name: part[name] for name in ("data", "samples", "fingerprint", "tokens")}),
        localizer=job.recipe.localizer.to_data(),
        protect=job.protect,
        seed=job.recipe.seed,
        dtype=str(job.dtype).removeprefix("torch."),
        scores=ScoresPart(scores.method, scores.values, scores.drop, scores.details),
    )


def write_verified(folder: Path, record: dict[str, Any], verification: Verification) -> None:
    """Write down how a new checkpoint was verified, and its first answer where none was known before."""
    reason = verification.details.get("structure_only", "")
    record["verification"] = {"loaded": not reason, "reason": reason}
    if record["reference"] is None and "tokens" in verification.details:
        answer = {name: verification.details[name] for name in ("tokens", "margins")}
        record["reference"] = reference_part(answer, record["run"]["dtype"])
    if reason:
        logger.warning("%s: its structure was verified, it was not loaded: %s", stage_name(folder), reason)
    write_record(folder, record)


def measure(folder: Path, record: dict[str, Any], seconds: float, bytes_read: int | None) -> dict[str, Any]:
    """Return what the written checkpoint weighs, and the bytes of weights that were read for it by --memory."""
    import torch

    weights = open_weights(folder)
    config = load_config(folder, read_json(folder / "config.json"))
    return {
        "parameters": weights.num_parameters,
        "bytes": weights.num_bytes,
        "seconds": round(seconds, 2),
        "kv_bytes_per_token": kv_bytes_per_token(config, getattr(torch, record["run"]["dtype"])),
        "files": hashes(folder),
    } | ({} if bytes_read is None else {"bytes_read": bytes_read})
