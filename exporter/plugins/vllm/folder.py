"""A serving router's settings and weights from the folder, or the repository on the hub, that vLLM serves."""

from __future__ import annotations

import os
from typing import Any

from exporter.modeling.served_router import (
    SERVING_ROUTER_FILE,
    ServingRouter,
    ServingSettings,
    load_serving_weights,
)

from .requests import settings_of


def serving_settings(model_config: Any) -> ServingSettings | None:
    """Return the settings of a folder's serving router, overrides in place; None where it has none.

    Args:
        model_config: `vllm.config.ModelConfig`.
    """
    from transformers import PretrainedConfig

    from exporter.modeling.served_router import ENTRY

    if getattr(model_config.hf_config, ENTRY, None) is None:
        return None
    in_folder, _ = PretrainedConfig.get_config_dict(
        model_config.hf_config_path or model_config.model, revision=model_config.revision
    )
    return settings_of(model_config.hf_config, in_folder, model_config.model)


def serving_weights_file(model_config: Any) -> str:
    """Return the path of the router's weights, fetched from the hub if they lie there."""
    model = model_config.model
    if os.path.isdir(model):
        path = os.path.join(model, SERVING_ROUTER_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"{model} has no {SERVING_ROUTER_FILE}: fetch the serving router's folder too.")
        return path
    from transformers.utils import cached_file

    path = cached_file(model, SERVING_ROUTER_FILE, revision=model_config.revision)
    return str(path)


def load_into(router: ServingRouter, model_config: Any) -> None:
    """Give a router its weights. Raises ValueError where they are those of another one."""
    from safetensors.torch import load_file

    path = serving_weights_file(model_config)
    load_serving_weights(router, load_file(path), path)
