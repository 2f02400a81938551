"""Put a serving router into a checkpoint, and load a folder that has one.

The folder stays what it was for everybody who does not trust remote code: the plain model. Engines find the router by
the entry "serving_router" of config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.config_file import first_lines
from ...checkpoints.files import replace_text
from ...checkpoints.json_file import read_json
from ...checkpoints.safetensors_ranges import read_shard
from ...checkpoints.serving_entry import read_serving_settings
from ...checkpoints.source import Source
from ...checkpoints.tensor_types import check_types
from ...checkpoints.trust import warn_of_foreign_code
from ...errors import InputError
from ...models.loading import load_model
from ..folder import AUTO_CLASS, MODELING_FOLDER

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SERVING_FILES = (  # what travels with a folder that has a serving router; the first imports the others
    "modeling_served.py",
    "routed_api.py",
    "routed_types.py",
    "served_cells.py",
    "served_file.py",
    "served_layout.py",
    "served_pictures.py",
    "served_places.py",
    "served_router.py",
)


def has_serving_router(source: Source) -> bool:
    """Tell whether a folder's config.json names a serving router."""
    from ...modeling.served_router import ENTRY

    return ENTRY in source.raw_config


def servable(model: Any, entry: Mapping[str, Any]) -> Any:
    """Make a loaded stock model one of the served class, in place, with an untrained serving router."""
    from ...modeling.modeling_served import served
    from ...modeling.served_router import ServingSettings

    model.config.serving_router = dict(entry)
    stock: Any = type(model)
    model.__class__ = served(stock)
    model.serving_settings, model.budget = ServingSettings.of(model.config), None
    model._attach_router()
    model.serving_router.to(model.device)
    return model


def load_served(source: Source, device: str, dtype: torch.dtype, memory: str | None = None) -> Any:
    """Return the model of a folder with its serving router; it runs whole until it is given a budget.

    The class is this package's own: nothing in the folder is trusted to run.
    """
    from safetensors import SafetensorError

    from ...modeling import modeling_served
    from ...modeling.served_router import SERVING_ROUTER_FILE

    warn_of_foreign_code(source.folder, source.name)
    read_serving_settings(source.config, source.name)
    try:
        if (path := source.folder / SERVING_ROUTER_FILE).is_file():  # else loading says so
            check_types(f"{source.name}'s serving router", read_shard(path).entries, all_learnt=True)
        cls = getattr(modeling_served, modeling_served.served_name(source.config.model_type))
        model = load_model(source, device, dtype=dtype, memory=memory, cls=cls)[0]
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source.name}: {first_lines(error)}") from error
    model.set_budget("off")
    return model


def add_serving_router(folder: Path, entry: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a serving router into a checkpoint folder: weights, modeling files, and config.json, last."""
    from ...modeling.modeling_served import served_name
    from ...modeling.served_file import save_router
    from ...modeling.served_router import ENTRY

    save_router(dict(weights), folder)
    for name in SERVING_FILES:
        shutil.copyfile(MODELING_FOLDER / name, folder / name)
    raw = read_json(folder / "config.json")
    module = SERVING_FILES[0].removesuffix(".py")
    raw["auto_map"] = {**raw.get("auto_map", {}), AUTO_CLASS: f"{module}.{served_name(raw['model_type'])}"}
    raw[ENTRY] = dict(entry)
    replace_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")
