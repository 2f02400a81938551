"""How a configuration is exported to ONNX: by the row of its family, or by what a probe finds; and why not others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..families import OWN_FAMILIES, family_of, is_listed
from .found import found_support
from .rows import GROWING, SHARED, SQUARE, SUPPORTED, NotExported, Support, cache_of

__all__ = ["GROWING", "SHARED", "SQUARE", "SUPPORTED", "Support", "cache_kind", "refusal", "support_of"]


def support_of(config: Any, layout: str | None = None) -> Support:
    """Return how a loaded transformers configuration is exported, or an InputError with the reason why it is not.

    Args:
        layout: of the folder; None: that of our own runner. Clients cut no tiles: they show a picture as one square.
    """
    if config.model_type in OWN_FAMILIES:
        raise refusal(config, "it runs by a modeling file of this package, for which no graphs are written")
    if not is_listed(config) or config.model_type not in SUPPORTED:
        try:
            return found_support(config)
        except NotExported as reason:
            raise refusal(config, str(reason)) from reason
    support = SUPPORTED[config.model_type]
    if config.model_type == "llava" and config.vision_config.model_type == "pixtral":
        return Support("sized")
    return replace(support, kind=SQUARE) if layout is not None and support.kind == "anyres" else support


def refusal(config: Any, reason: str) -> InputError:
    """Return the message that a configuration can't be exported, for a reason that is a clause."""
    return InputError(
        f"{family_of(config).title} can't be exported to ONNX: {reason}. `lvlm-exporter families` lists the types that "
        "can."
    )


def cache_kind(config: Any, dtype: str, device: str) -> str:
    """Return how keys and values are kept from token to token.

    'shared': buffers of the answer's full length, which ONNX Runtime's GroupQueryAttention fills in place; it is causal
    and, on CUDA, for half precision only. 'growing': each pass returns longer ones and takes a mask, which can say
    that tokens see each other both ways.
    """
    return cache_of(support_of(config), dtype, device)
