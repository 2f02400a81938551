"""The settings that a new router starts from, and the models that can have one."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..families import family_of
from ..probe.routed import why_not_routed

IMAGE_FLOOR = 0.25  # of an even share of the tokens that stay: what each image of a sequence keeps at least
DROP_AT = 2  # measured: dropped before layer 0, tokens take with them what the first layers would have passed on


def check_routable(config: Any, *, has_router: bool = False) -> None:
    """Raise InputError, with the reason, if a model of this configuration can't be routed.

    Types that the tables list are known; of others a small model is made, routed, and compared with its stock layers.

    Args:
        has_router: it was routed before, when its type was tried.
    """
    if reason := family_of(config).unroutable or (None if has_router else why_not_routed(config)):
        raise InputError(f"a {family_of(config).title} model can't have a router: {reason}.")


def default_settings(
    config: Any, drop_at: int | None = None, candidates: int | None = None, read_at: int | None = None
) -> dict[str, Any]:
    """Return router settings that fit a model, as they stand in config.json.

    Args:
        config: transformers' configuration of the model as it is now, pruned or not.
        drop_at: the layer before which visual tokens leave. None: DROP_AT, or the first layer that may be skipped
            where that comes before.
        candidates: how many of the last layers may be skipped; half of them if None.
        read_at: the router reads the states that enter this layer, 0 the embeddings. None: drop_at.
    """
    from ..modeling.routed_route import ROUTER_FORMAT

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
    read_at = drop_at if read_at is None else read_at
    if read_at > drop_at:
        raise InputError(
            f"read_at={read_at} comes after drop_at={drop_at}: the router has to read before tokens leave. Lower "
            "read_at, or raise drop_at."
        )
    head = 64 if hidden >= 1024 else 16
    return {
        "drop_at": drop_at,
        "read_at": read_at,
        "candidates": list(range(first, num_layers)),
        "bottleneck": max(1, hidden // 4 // head) * head,
        "num_heads": max(1, hidden // 4 // head),
        "presets": default_presets(num_layers, candidates),
        "default": "balanced",
        "trained_for": {"model_type": config.model_type, "hidden_size": hidden, "num_hidden_layers": num_layers},
        "format": ROUTER_FORMAT,
        "image_floor": IMAGE_FLOOR,
    }


def default_presets(num_layers: int, candidates: int) -> dict[str, dict[str, float]]:
    """Return the budgets that a new router has names for."""
    if not candidates:  # every layer always runs
        return {
            "quality": {"keep_visual_tokens": 0.5},
            "balanced": {"keep_visual_tokens": 0.375},
            "fast": {"keep_visual_tokens": 0.25},
        }
    most, fewer = (num_layers - candidates // part for part in (4, 3))
    return {
        "quality": {"keep_visual_tokens": 0.5},
        "balanced": {"keep_visual_tokens": 0.5, "keep_layers": most},
        "fast": {"keep_visual_tokens": 0.25, "keep_layers": fewer},
        "token-only": {"keep_visual_tokens": 0.25},
        "layer-only": {"keep_layers": fewer},
    }
