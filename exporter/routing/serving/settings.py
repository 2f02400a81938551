"""The settings that a new serving router starts from, and the models that can have one."""

from __future__ import annotations

from typing import Any

from ...errors import InputError
from ...modeling.served_router import IN_AXES, OFF, PRESETS, SERVING_FORMAT, TYPES, base_model, why_untested
from ...recipe import RouterRecipe

NARROWEST = 64  # R of small models
HEAD = 64  # of the router's attention, where it is that wide


def check_servable(config: Any, raw_config: dict[str, Any], name: str) -> None:
    """Raise InputError, with the reason, if a model can't have a serving router."""
    if kind := why_untested(config):
        raise InputError(
            f"{name} is {kind}, and a serving router is made and tested for {', '.join(TYPES)} "
            "only: `lvlm-exporter route` without --serve trains a router for transformers."
        )
    if "router" in raw_config:
        raise InputError(
            f"{name} has a router whose tokens leave inside the decoder, which no engine runs, and a folder has "
            "one of the two: train the serving router for the checkpoint that this one was made from."
        )


def serving_settings(config: Any, question_aware: bool) -> dict[str, Any]:
    """Return serving settings that fit a model, as they stand in config.json."""
    hidden = config.get_text_config().hidden_size
    head = HEAD if hidden >= 1024 else HEAD // 4
    width = max(NARROWEST, hidden // 4 // head * head)
    in_axes = config.model_type in IN_AXES
    return {
        "bottleneck": width,
        "num_heads": width // head,
        "depth": 2,
        "question_aware": question_aware,
        "pooled": True,
        **({"keeps_places": True} if in_axes else {}),
        "presets": {name: dict(preset) for name, preset in PRESETS.items()},
        "default": OFF,
        "trained_for": base_model(config),
        "format": SERVING_FORMAT,
    }


def check_recipe(router: RouterRecipe) -> None:
    """Raise InputError for settings of a router inside the decoder: no layer is chosen, and nothing is read there."""
    named = {name: getattr(router, name) for name in ("candidates", "drop_at", "read_at")}
    if others := [name for name, value in named.items() if value is not None]:
        raise InputError(
            f"{others[0]}={named[others[0]]} is of a router inside the decoder; of a serving router (--serve) tokens "
            "leave before it, and no layer is skipped: leave it out."
        )
    if router.loss != RouterRecipe.loss:
        raise InputError(f"loss '{router.loss.name}' is of a router inside the decoder: a serving router has its own.")


def refuse_question_aware(router: RouterRecipe) -> None:
    """Raise InputError where a router inside the decoder is asked to be question-aware: it always is."""
    if router.question_aware:
        raise InputError("--question-aware is for a serving router: give --serve too. Other routers always read it.")
