"""Which budget of a folder's serving router an export has, and what its record says of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NoReturn

from ..checkpoints.config_file import first_lines
from ..checkpoints.serving_entry import read_serving_settings
from ..checkpoints.source import Source
from ..errors import InputError
from ..modeling.served_router import ENTRY, OFF, ServingRouter, load_serving_router

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """The one budget of an export, and the router that it is for."""

    preset: str | None  # None: the budget was given as a count or a share
    budget: int | float | None  # None: the plain model
    router: ServingRouter | None = None

    def facts(self, rows: int | None = None, stays: int | None = None) -> dict[str, Any]:
        """Return the record's entry; `rows` of a picture, of which `stays` are given out."""
        facts = {"preset": self.preset, "keep_visual_tokens": self.budget, "rows": rows, "stays": stays}
        return {name: value for name, value in facts.items() if value is not None}


def serving_of(source: Source, layout: str | None, preset: str | None, keep: int | float | None) -> Serving | None:
    """Return the budget of an export; None for a checkpoint without a serving router.

    Args:
        layout: None for that of our own runner, which has no graphs of serving routers.
        preset: asked for by name; `keep`: by a count or a share. Neither: the folder's default.
    Raises: InputError where a budget is asked for that the checkpoint or the layout has not.
    """
    if ENTRY not in source.raw_config:
        if preset is not None or keep is not None:
            refuse_budget(source, f"--preset {preset}" if preset is not None else f"--keep-visual-tokens {keep}")
        return None
    settings = read_serving_settings(source.config, source.name)
    if layout is None:
        raise InputError(
            f"{source.name} has a serving router, and our own runner's layout has no graphs of one: export it with "
            "--layout and --preset, or export the checkpoint that it was trained for."
        )
    try:
        budget = settings.budget(preset, keep)
    except ValueError as error:
        raise InputError(f"{source.name}: {error}") from error
    if preset is None and keep is None:
        preset = settings.default
        if budget is None:
            logger.warning(
                "%s has a serving router and no default budget: the graphs are the plain model, with all visual "
                "tokens. Name a budget with --preset (%s).",
                source.name,
                settings.preset_names(),
            )
    if budget is None:
        return Serving(OFF, None)
    if not settings.pooled:
        raise InputError(
            f"{source.name}: its serving router is of an older form, which lets single rows stay, and no graphs are "
            "written of it: train it again with `lvlm-exporter route --serve`."
        )
    return Serving(preset, budget, loaded(source, settings))


def refuse_budget(source: Source, flag: str) -> NoReturn:
    """Raise InputError for a budget that a checkpoint without a serving router is asked for."""
    if "router" in source.raw_config:
        raise InputError(
            f"{source.name} has a router inside the decoder, which is given its budget when it runs: leave {flag} out."
        )
    raise InputError(
        f"{source.name} has no serving router, and {flag} is a budget of one: train it with `lvlm-exporter route "
        f"{source.name} --serve`, or leave the budget out."
    )


def loaded(source: Source, settings: Any) -> ServingRouter:
    try:
        return load_serving_router(source.folder, source.config.get_text_config().hidden_size, settings)
    except Exception as error:  # whatever safetensors says of a file that is none, beside OSError and ValueError
        raise InputError(f"{source.name}: {first_lines(error)}") from error
