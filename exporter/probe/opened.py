"""Facts of a type that the tables of families lack, read from a small model of the same structure."""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

from ..errors import InputError
from ..families import DECODERS, Decoder
from .stack import NoStack, build, check_stack
from .tiny_config import tiny_config
from .writes import LayerWrites, layer_writes, layers_at_work

logger = logging.getLogger(__name__)


def decoder_of(config: Any) -> Decoder:
    """Return how the layers of a loaded configuration's language model are made: its row, or what a probe finds."""
    row = DECODERS.get(config.get_text_config().model_type)
    if row is not None:
        return row
    return probed(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str))


@functools.lru_cache(maxsize=16)
def probed(model_type: str, data: str) -> Decoder:
    """Probe a small model with the layers that a configuration has.

    Args:
        data: the configuration as JSON.
    Raises: InputError where there is no stack of decoder layers, or the type is none that reads pictures.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(
            f"model_type '{model_type}' is not a family that this version can compress: transformers has no "
            "image-text-to-text model of it. `lvlm-exporter families` lists those that work."
        )
    config = CONFIG_MAPPING[model_type].from_dict(json.loads(data))
    try:
        model = build(tiny_config(config))
    except Exception as error:  # whatever a class makes of sizes that it does not foresee
        return Decoder(unfoldable=f"no small model could be made to look ({_first_line(error)})")
    try:
        check_stack(model)
    except NoStack as error:
        raise InputError(
            f"model_type '{model_type}' is not a family that this version can compress: {error}. `lvlm-exporter "
            "families` lists those that work."
        ) from error
    return written_by(model)


def written_by(model: Any) -> Decoder:
    """Disturb every layer of a small model to see which maps write, and say why no fold is exact where none is."""
    try:
        writes = [layer_writes(layer, step, state) for layer, step, state in layers_at_work(model)]
    except Exception as error:  # a layer that hands on more than a hidden state, or takes what is not there alone
        return Decoder(unfoldable=f"its layers can't be run one at a time ({_first_line(error)})")
    maps = tuple((write.attention, write.mlp) for write in writes)
    factors = {write.factor for write in writes if write.attention or write.mlp}
    return Decoder(maps=maps, factor=next(iter(factors), 1.0), unfoldable=_why_not(writes, factors))


def _why_not(writes: list[LayerWrites], factors: set[float]) -> str | None:
    """Return why no fold is exact: a clause; None where one is."""
    if norm := next((write.follows for write in writes if write.follows), ""):
        return f"a norm ({norm}) follows the MLP inside each layer"
    without = [index for index, write in enumerate(writes) if write.mlp is None]
    if without:
        return (
            f"in {len(without)} of {len(writes)} layers no single matrix writes the MLP's output (experts, or a gate)"
        )
    if len(factors) > 1:
        return f"layers weigh what they add differently ({', '.join(map(str, sorted(factors)[:3]))})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
