"""What compression.json says of a compression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards.licence import inherited_licence
from ..cards.model_card import base_model_of
from ..checkpoints.config_file import load_config
from ..checkpoints.files import hashes
from ..checkpoints.json_file import read_json
from ..checkpoints.source import file_hashes
from ..checkpoints.weight_files import open_weights
from ..clean_room import REFERENCE_QUESTION
from ..localize.scores import LayerScores
from ..models.flops import kv_bytes_per_token
from ..models.questions import Questions
from ..plan import PruningPlan, breaks_period
from ..version import versions
from .job import CompressionJob

if TYPE_CHECKING:
    pass


def describe(
    job: CompressionJob,
    questions: Questions,
    scores: LayerScores,
    plan: PruningPlan,
    fold: dict[str, Any],
    reference: dict[str, Any],
) -> dict[str, Any]:
    """compression.json: everything that is needed to understand the checkpoint and to make it again."""
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
        "calibration": {
            "data": job.recipe.calibration.data,
            "samples": len(job.calibration.samples),
            "of": job.calibration.total,
            "fingerprint": job.calibration.fingerprint,
            "tokens": questions.tokens,
            "answer_tokens": sum(len(tokens) for tokens in questions.answers.values()),
            "pictures": questions.split.num_pictures,
            "held_out": len(questions.split.held_out),
        },
        "protect": list(job.protect),
        "scores": {
            "method": scores.method,
            "values": list(scores.values),
            "drop": list(scores.drop),
            "details": scores.details,
        },
        "plan": {
            "num_layers": plan.num_layers,
            "drop": list(plan.drop),
            "keep": list(plan.keep),
            "broken_period": breaks_period(source.config, plan.keep),
        },
        "fold": fold,
        "reference": {**reference, "question": REFERENCE_QUESTION, "dtype": dtype},
        "evaluations": [],
        "versions": versions(),
    }


def measure(folder: Path, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what the written checkpoint weighs."""
    import torch

    weights = open_weights(folder)
    config = load_config(folder, read_json(folder / "config.json"))
    return {
        "parameters": weights.num_parameters,
        "bytes": weights.num_bytes,
        "seconds": round(seconds, 2),
        "kv_bytes_per_token": kv_bytes_per_token(config, getattr(torch, record["run"]["dtype"])),
        "files": hashes(folder),
    }
