"""Tells lmms-eval that there is a model `lvlm_exporter`: an entry point of the group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any

MODEL_NAME = "lvlm_exporter"
MODEL_CLASS = "exporter.plugins.lmms_eval_model.LvlmExporter"


def manifests() -> list[Any]:
    """Return what lmms-eval 0.7 registers: the name of `--model`, and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL_NAME, chat_class_path=MODEL_CLASS)]
