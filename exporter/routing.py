"""Puts a router into a checkpoint: its weights, its settings, and the modeling file that runs the model with it.

The folder stays what it was for everybody who does not trust remote code: config.json keeps its model_type, and the
router's weights lie in a folder of their own, which neither transformers nor serving engines look into.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .families import FAMILIES, family_of
from .source import Source, load_model
from .trust import warn_of_foreign_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODELING_FILE = "modeling_routed.py"
AUTO_CLASS = "AutoModelForImageTextToText"
DROP_AT = 2  # measured: dropped before layer 0, tokens take with them what the first layers would have passed on


def check_routable(config: Any) -> None:
    """Raise InputError, with the reason, if a model of this family can't be routed."""
    if reason := family_of(config).unroutable:
        raise InputError(f"a {FAMILIES[config.model_type].title} model can't have a router: {reason}.")


def default_settings(config: Any, drop_at: int | None = None, candidates: int | None = None) -> dict[str, Any]:
    """Router settings that fit a model, as they stand in config.json.

    Args:
        config: transformers' configuration of the model as it is now, pruned or not.
        drop_at: the layer before which visual tokens leave; the router reads what enters it. None: DROP_AT, or the
            first layer that may be skipped where that comes before.
        candidates: how many of the last layers may be skipped; half of them if None.
    """
    from .modeling.modeling_routed import ROUTER_FORMAT

    text = config.get_text_config()
    num_layers, hidden = text.num_hidden_layers, text.hidden_size
    candidates = num_layers // 2 if candidates is None else candidates
    first = num_layers - candidates
    drop_at = min(DROP_AT, max(first, 0)) if drop_at is None else drop_at
    if not drop_at <= first <= num_layers:
        raise InputError(
            f"candidates={candidates} of {num_layers} layers begin at layer {first}, before drop_at={drop_at}: a layer "
            "that has run before the router can't be skipped any more. Lower one of them."
        )
    head = 64 if hidden >= 1024 else 16
    most, fewer = (num_layers - candidates // part for part in (4, 3))
    return {
        "drop_at": drop_at,
        "read_at": drop_at,
        "candidates": list(range(first, num_layers)),
        "bottleneck": max(1, hidden // 4 // head) * head,
        "num_heads": max(1, hidden // 4 // head),
        "presets": {
            "quality": {"keep_visual_tokens": 0.5},
            "balanced": {"keep_visual_tokens": 0.5, "keep_layers": most},
            "fast": {"keep_visual_tokens": 0.25, "keep_layers": fewer},
            "token-only": {"keep_visual_tokens": 0.25},
            "layer-only": {"keep_layers": fewer},
        },
        "default": "balanced",
        "trained_for": {"model_type": config.model_type, "hidden_size": hidden, "num_hidden_layers": num_layers},
        "format": ROUTER_FORMAT,
    }


def has_router(model: Any) -> bool:
    return getattr(model, "router", None) is not None


def load_routed(source: Source, device: str, dtype: torch.dtype, memory: str | None = None) -> Any:
    """The model of a folder, able to follow routes: with its router if it has one, else for routes by rule only.

    It runs whole until it is given a budget. The class is this package's own: nothing in the folder is trusted to run.
    """
    from .modeling import modeling_routed

    if "router" not in source.raw_config:
        return routable(load_model(source, device, dtype, memory)[0])
    check_routable(source.config)
    warn_of_foreign_code(source.folder, source.name)
    cls = getattr(modeling_routed, modeling_routed.class_name(source.config.model_type))
    try:
        model = load_model(source, device, dtype, memory, cls)[0]
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source.name}: {error}") from error
    model.set_budget("off")
    return model


def routable(model: Any, settings: Mapping[str, Any] | None = None) -> Any:
    """A loaded stock model made able to follow routes, in place; it has no router, so that budgets alone won't do."""
    from .modeling.modeling_routed import OFF, RouterSettings, make_routable, routed

    check_routable(model.config)
    model.config.router = dict(settings or default_settings(model.config)) | {"default": "off"}
    stock: Any = type(model)
    model.__class__ = routed(stock)
    model.router_settings, model.budget = RouterSettings.of(model.config), OFF
    make_routable(model._text_model())
    return model


def add_router(folder: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a router into a checkpoint folder: weights, modeling file, and the two entries of config.json, last."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from .modeling.modeling_routed import ROUTER_FILE, class_name

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_routable(config)
    path = folder / ROUTER_FILE
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    shutil.copyfile(Path(__file__).parent / "modeling" / MODELING_FILE, folder / MODELING_FILE)
    raw = json.loads((folder / "config.json").read_text())
    module = MODELING_FILE.removesuffix(".py")
    raw["auto_map"] = {**raw.get("auto_map", {}), AUTO_CLASS: f"{module}.{class_name(config.model_type)}"}
    raw["router"] = dict(settings)
    part = folder / "config.json.partial"
    part.write_text(json.dumps(raw, indent=2) + "\n")
    part.replace(folder / "config.json")
