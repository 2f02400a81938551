"""The file of a serving router in a checkpoint of transformers: found, fetched, written."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors.torch import save_file  # transformers cannot do without it either
from torch import Tensor

from .routed_api import cached_file
from .served_router import SERVING_ROUTER_FILE


def router_file(name: Any, options: dict[str, Any]) -> str:
    """Return the path of a checkpoint's serving router, fetched from the hub if it lies there.

    Args:
        options: those of `from_pretrained`.
    """
    file = os.path.join(str(name), options.get("subfolder") or "", SERVING_ROUTER_FILE)
    if os.path.isdir(name) and not os.path.isfile(file):
        raise OSError(
            f"{name} has no {SERVING_ROUTER_FILE}: fetch the serving router's folder too, or load the plain model, "
            "without trust_remote_code."
        )
    hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
    path: str = cached_file(name, SERVING_ROUTER_FILE, **{key: options[key] for key in hub if key in options})
    return path


def save_router(weights: dict[str, Tensor], folder: Any) -> None:
    """Write a serving router's weights into a folder, in float32."""
    path = os.path.join(folder, SERVING_ROUTER_FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def name_class(name: str, folder: Any) -> None:
    """Write the class of transformers into a folder's config.json, in place of ours."""
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({**config, "architectures": [name]}, indent=2, sort_keys=True) + "\n")
