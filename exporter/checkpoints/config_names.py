"""config.json: entries that nobody reads because their name is a slip, and texts that are none.

transformers keeps what a configuration class does not know as an attribute that nothing asks for: 'head_dimx' is said,
and the class's default counts.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from .near_names import misspelt

logger = logging.getLogger(__name__)
TEXTS = ("transformers_version", "_name_or_path")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
ROPE_PARTS = ("rope_parameters", "rope_scaling")
ROPE = (
    "rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
    "mscale", "mscale_all_dim", "truncate", "mrope_section", "mrope_interleaved",
)  # fmt: skip
# What no answer depends on: of training, of who wrote the file, of how it is stored.
INERT = re.compile(r"drop|initiali[sz]er|^(?:architectures|transformers_version|dtype|use_cache|pretraining_tp)$")


def check_texts(name: str, raw: dict[str, Any]) -> None:
    """Raise InputError for an entry without a name, and for names and versions that are no texts."""
    for place, settings in _parts(raw):
        if any(not key.strip() for key in settings):
            raise InputError(f"{name}: {place} has an entry without a name: take it out, or give it the one it had.")
        for key in TEXTS:
            value = settings.get(key)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name}: {place} says {key}={value!r:.60}; a text is needed.")
        for key in ("dtype", "torch_dtype"):
            value = settings.get(key)
            several = value.values() if isinstance(value, dict) else [value]  # one for each part of the model
            if value is not None and not all(isinstance(item, str) for item in several):
                raise InputError(f"{name}: {place} says {key}={value!r:.60}; the name of a type is needed.")
        classes = settings.get("architectures")
        if classes is not None and not _are_texts(classes):
            raise InputError(f"{name}: {place} says architectures={classes!r:.60}; a list of names is needed.")
        for where, rope in _ropes(place, settings):
            if any(not key.strip() for key in rope):
                raise InputError(f"{name}: {where} has an entry without a name.")
            theta = rope.get("rope_theta")
            if theta is not None and not _is_positive(theta):
                raise InputError(f"{name}: {where} says rope_theta={theta!r:.60}; a number above 0 is needed.")


def check_names(name: str, raw: dict[str, Any], config: Any) -> None:
    """Refuse an entry whose name is a slip where another value counts than it says; say it where nothing changes.

    Args:
        config: what transformers makes of `raw`.
    Raises: InputError.
    """
    parts = [("config.json", raw, config)]
    parts += [
        (f"config.json's {part}", raw[part], getattr(config, part, None))
        for part in getattr(type(config), "sub_configs", {})
        if isinstance(raw.get(part), dict)
    ]
    for place, settings, read in parts:
        for entry, meant in misspelt(settings, _known(type(read))):
            counts = getattr(read, meant, None)
            told = f"{name}: {place} has no entry '{meant}', and one called {entry!r:.60}, which nothing reads"
            if INERT.search(meant) or counts == settings[entry]:
                logger.warning("%s: it changes no answer", told)
                continue
            raise InputError(
                f"{told}: {counts!r:.60} would count instead of {settings[entry]!r:.60}. Did you mean '{meant}'?"
            )
        for key in TOKENS:
            if isinstance(settings.get(key), int) and settings[key] < 0:
                logger.warning("%s: %s says %s=%d, which is the id of no token", name, place, key, settings[key])
        for where, rope in _ropes(place, settings):
            for entry, meant in misspelt(rope, ROPE):
                raise InputError(f"{name}: {where} has the entry {entry!r:.60}: did you mean '{meant}'?")


def _known(cls: type) -> set[str]:
    """Return the names that a configuration class reads."""
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return fields | {"model_type"} | set(getattr(cls, "attribute_map", {}))


def _parts(raw: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    inner = [(f"config.json's {key}", value) for key, value in raw.items() if isinstance(value, dict)]
    return [("config.json", raw), *((place, value) for place, value in inner if place.endswith("_config"))]


def _ropes(place: str, settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts that say how positions are encoded: one, or one for each type of layer."""
    yield place, {key: settings[key] for key in ("rope_theta",) if key in settings}
    for part in ROPE_PARTS:
        rope = settings.get(part)
        if isinstance(rope, dict):
            several = [(key, value) for key, value in rope.items() if isinstance(value, dict)]
            yield f"{place}'s {part}", {key: value for key, value in rope.items() if not isinstance(value, dict)}
            yield from ((f"{place}'s {part}.{key}", value) for key, value in several)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
