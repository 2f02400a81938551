"""The entry "router" of config.json: read and checked before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .shapes import ANYTHING, COUNT, NUMBER, POSITIVE, TEXT, ListOf, MapOf, Maybe, Misfit, check

if TYPE_CHECKING:
    from ..modeling.routed_route import RouterSettings

ROUTER_ENTRY = {
    "drop_at": COUNT,
    "candidates": ListOf(COUNT),
    "bottleneck": POSITIVE,
    "num_heads": POSITIVE,
    "read_at?": COUNT,
    "presets?": MapOf(
        {
            "keep_visual_tokens?": Maybe(NUMBER),
            "keep_layers?": Maybe(COUNT),
            "flops?": Maybe(NUMBER),
            "quality?": Maybe(NUMBER),
        }
    ),
    "default?": TEXT,
    "trained_for?": MapOf(ANYTHING),
    "format?": COUNT,
    "image_floor?": NUMBER,
    "budgets?": {
        "cost?": {"layers": ListOf(COUNT), "width": COUNT, "router_token": COUNT, "router_layer": COUNT},
        "front?": ListOf(ListOf(NUMBER, 2)),
        "quality?": {"score": TEXT, "answers": COUNT, "at": ListOf(ListOf(NUMBER, 3))},
    },
}


def read_settings(config: Any, name: str) -> RouterSettings:
    """Return the router's settings of a configuration. Raises InputError where they are damaged or don't fit it."""
    from ..modeling.routed_route import RouterSettings

    try:
        check(config.router, ROUTER_ENTRY, "router")
        settings = RouterSettings.of(config)
        for preset in settings.presets:
            settings.preset(preset).check(settings, config.get_text_config().num_hidden_layers)
    except Misfit as misfit:
        raise InputError(f"{name}: config.json is damaged ({misfit}): train the router again.") from misfit
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error
    return settings
