"""Settings of an image processor as their file has them: values that would make other pictures without a word."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import InputError
from .near_names import misspelt

logger = logging.getLogger(__name__)
BRIGHTEST = 255  # of a pixel; what is taken off and divided by is of pixels, scaled or not
LARGEST = 1 << 31
NUMBERS = ("image_mean", "image_std", "rescale_factor")
SIZES = ("size", "crop_size", "pad_size", "max_image_size", "min_image_size", "high_res_size", "tile_size")
SCALED_TO = ("size", "crop_size")  # what a picture is made of, which the tower then cuts into patches
COUNTS = ("min_pixels", "max_pixels", "merge_size", "temporal_patch_size", "min_patches", "max_patches")
TEXTS = ("processor_class", "image_processor_type", "feature_extractor_type")
RESAMPLE = range(6)  # PIL's filters
IMAGE_PART = "image_processor"  # of processor_config.json


def check_image_settings(where: str, settings: dict[str, Any], config: Any) -> None:
    """Raise InputError for the first value that no image processor could mean.

    Args:
        where: 'MODEL: preprocessor_config.json'.
        config: transformers' configuration of the model.
    """
    vision = getattr(config, "vision_config", None)
    channels = _first_int(vision, "num_channels", "in_channels", "in_chans") or 3
    patch = _first_int(vision, "patch_size")
    for part in (settings, settings.get(IMAGE_PART)):
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            if not key.strip():
                raise InputError(f"{where} has an entry without a name: take it out, or give it the one it had.")
            if value is not None and (needed := _wanted(key, value, channels, patch)):
                raise InputError(f"{where} says {key}={value!r:.80}; {needed}.")


def _wanted(key: str, value: Any, channels: int, patch: int | None) -> str | None:
    """Say what a setting must be where it is something else; None: it may be that, or nobody knows."""
    if key in NUMBERS:
        return _wanted_number(key, value, channels)
    if key in SIZES:
        return _wanted_size(value, patch if key in SCALED_TO else None)
    rules: list[tuple[bool, Callable[[Any], bool], str]] = [
        (key in COUNTS, _is_size, "a positive whole number is needed"),
        (key in TEXTS, lambda v: isinstance(v, str), "the name of a class is needed"),
        (key.startswith("do_"), lambda v: v in (True, False), "true or false is needed"),
        (key == "resample", lambda v: type(v) is int and v in RESAMPLE, "the number of a filter of PIL is needed, 0-5"),
    ]
    return next((needed for applies, fits, needed in rules if applies and not fits(value)), None)


def _wanted_number(key: str, value: Any, channels: int) -> str | None:
    several = value if isinstance(value, list) else [value]
    least = "" if key == "image_mean" else " above 0"
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in several)
    if not numbers or (least and any(number <= 0 for number in several)):
        return f"finite numbers{least} are needed"
    if any(not 0 <= number <= BRIGHTEST for number in several):
        return f"pixels are scaled by numbers from 0 to {BRIGHTEST}"
    if isinstance(value, list) and len(value) not in (1, 3, channels):
        return f"one number is needed for each of {channels} channels"
    return None


def _wanted_size(value: Any, patch: int | None) -> str | None:
    if isinstance(value, dict):
        edges = [edge for edge in value.values() if edge is not None]
    else:
        edges = value if isinstance(value, list) else [value]
    if not edges or not all(map(_is_size, edges)):
        return 'edges in pixels are needed, such as {"shortest_edge": 336} or {"height": 336, "width": 336}'
    if patch is not None and min(edges) < patch:
        return f"every picture would be made smaller than a patch of {patch} pixels"
    return None


def _is_size(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value == value and 0 < value < LARGEST and value == int(value)


def _first_int(config: Any, *names: str) -> int | None:
    return next((value for name in names if type(value := getattr(config, name, None)) is int), None)


# --- names ------------------------------------------------------------------------------------------------------------


def check_image_names(where: str, settings: dict[str, Any], image_processor: Any) -> None:
    """Refuse an entry whose name is a slip where another value counts than it says; say it where nothing changes.

    Args:
        settings: of the image processor, as the file has them.
        image_processor: what transformers makes of them.
    """
    _check(where, settings, image_processor, _known(image_processor))


def check_processor_names(where: str, settings: dict[str, Any], processor: Any, parameters: Iterable[str]) -> None:
    """Check names as `check_image_names` does, of processor_config.json's own entries.

    Args:
        parameters: of the processor's class.
    """
    _check(where, settings, processor, {*parameters, *TEXTS, "chat_template"} - {"kwargs", "self"})


def _known(image_processor: Any) -> set[str]:
    """Return the names of the settings that an image processor's class reads."""
    cls = type(image_processor)
    allowed = getattr(getattr(cls, "valid_kwargs", None), "__annotations__", {})
    declared = {name for name, value in vars(cls).items() if not name.startswith("_") and not callable(value)}
    return {*allowed, *declared, *TEXTS}


def _check(where: str, settings: dict[str, Any], read: Any, known: set[str]) -> None:
    for entry, meant in misspelt(settings, known):
        counts, stated = getattr(read, meant, None), settings[entry]
        told = f"{where} has no entry '{meant}', and one called {entry!r:.60}, which nothing reads"
        if meant in TEXTS or _plain(counts) == _plain(stated):
            logger.warning("%s: it changes no picture", told)
            continue
        raise InputError(
            f"{told}: {_plain(counts)!r:.80} would count instead of {stated!r:.80}. Did you mean '{meant}'?"
        )


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it: transformers makes tuples of lists, and sizes with every edge that there is."""
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "shortest_edge"):
        return {key: edge for key, edge in vars(value).items() if edge is not None}
    return value
