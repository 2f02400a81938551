"""What a routed model is told by its type: the stock class, the text model, the tokens that stand for pictures.

Nothing here names a type: classes are looked up in transformers' own table, the rest in the configuration.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from .routed_api import (
    STOCK_CLASSES,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

PLACEHOLDERS = (  # entries of configurations that hold the id of a token in whose place features come
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "image_patch_id",
    "video_token_id",
)
INSIDE = ("model", "decoder", "language_model")  # where a head wraps the text model


def class_name(model_type: str) -> str:
    """Return the class that config.json names in auto_map, after the name of this file."""
    return f"Routed{STOCK_CLASSES[model_type]}"


def stock_class(name: str) -> Any:
    """Return the class of transformers that a routed one is made of; None for a name that is none of a routed class."""
    stock = name.removeprefix("Routed")
    return getattr(transformers, stock) if stock != name and stock in STOCK_CLASSES.values() else None


def register_hub_names(stock: Any, name: str) -> None:
    """Let a routed class know tensors by the names of the hub, which transformers keeps from what is not its own.

    Names are registered as transformers has them, for the class or for the type: it looks up parts of the model too,
    and leaves out those of a type that it has met.
    """
    if (mapping := get_checkpoint_conversion_mapping(stock.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
        return
    for model_type in [known for known, class_of_type in STOCK_CLASSES.items() if class_of_type == stock.__name__]:
        if (mapping := get_checkpoint_conversion_mapping(model_type)) is not None:
            register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def text_model_of(model: Any) -> Any:
    """Return the module whose `layers` are the decoder layers."""
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers"):
        deeper = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if deeper is decoder:
            deeper = next((getattr(decoder, name) for name in INSIDE if hasattr(decoder, name)), None)
        if deeper is None:
            raise ValueError(f"{type(model).__name__} has no decoder layers that a route could be followed in.")
        decoder = deeper
    return decoder


def placeholders(config: Any, input_ids: Tensor) -> Tensor:
    """Return where features of pictures take the place of tokens, [B, S]."""
    ids = (getattr(config, name, None) for name in PLACEHOLDERS)
    known = sorted({number for number in ids if isinstance(number, int)})
    return torch.isin(input_ids, torch.tensor(known, device=input_ids.device))
