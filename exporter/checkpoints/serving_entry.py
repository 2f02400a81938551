"""The entry "serving_router" of config.json: read and checked before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .shapes import ANYTHING, COUNT, FLAG, NUMBER, POSITIVE, TEXT, MapOf, Misfit, check

if TYPE_CHECKING:
    from ..modeling.served_router import ServingSettings

SERVING_ENTRY = {
    "bottleneck": POSITIVE,
    "num_heads": POSITIVE,
    "depth?": POSITIVE,
    "question_aware?": FLAG,
    "presets?": MapOf({"keep_visual_tokens": NUMBER}),
    "default?": TEXT,
    "trained_for?": MapOf(ANYTHING),
    "format?": COUNT,
}


def read_serving_settings(config: Any, name: str) -> ServingSettings:
    """Return a configuration's serving settings. Raises InputError where there are none, or they don't fit it."""
    from ..modeling.served_router import ENTRY, ServingSettings

    try:
        if (entry := getattr(config, ENTRY, None)) is not None:
            check(entry, SERVING_ENTRY, ENTRY)
        return ServingSettings.of(config)
    except Misfit as misfit:
        raise InputError(f"{name}: config.json is damaged ({misfit}): train the serving router again.") from misfit
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error
