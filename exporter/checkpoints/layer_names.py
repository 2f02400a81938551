"""Which tensors of a checkpoint belong to which decoder layer, for types that no table names.

Names on disk are not those in memory: transformers renames while it loads. The model is laid out without memory, each
name is put through the same renaming, and what ends inside the stack of decoder layers is a layer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import InputError
from ..probe.stack import NoStack, stack_path

LISTED = re.compile(
    r"^((?:model\.|language_model\.|text_model\.)*layers\.)(\d+)\.(.+)$"
)  # of the families in the table
INDEXED = re.compile(r"^(.*?\.)?(\d+)\.")


def layer_key(model: Any, names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the names of the decoder layers' tensors: what comes before the index, the index, the rest.

    Args:
        model: transformers' model, which may be on the meta device.
        names: of the checkpoint's tensors.
    Raises: InputError where the layers can't be told by one prefix.
    """
    try:
        path = stack_path(model)
    except NoStack as error:
        raise InputError(
            f"model_type '{model.config.model_type}' is not a family that this version can compress: {error}."
        ) from error
    in_memory = renamed(model, names)
    prefixes: set[str] = set()
    for name, target in in_memory.items():
        inside = re.match(rf"{re.escape(path)}\.(\d+)\.", target)
        if inside is None:
            continue
        prefix = _prefix(name, inside[1])
        if prefix is None:
            raise InputError(
                f"tensor {name} is a part of decoder layer {inside[1]} ({target}), and its name does not say so: "
                "layers that are numbered otherwise on disk can't be dropped."
            )
        prefixes.add(prefix)
    if not prefixes:
        raise InputError(f"the weights hold no tensor of a decoder layer ({path}).")
    either = "|".join(re.escape(prefix) for prefix in sorted(prefixes))
    return re.compile(rf"^({either})(\d+)\.(.+)$")


def _prefix(name: str, index: str) -> str | None:
    """Return the part of a tensor's name that stands before the layer's index."""
    match = re.match(rf"^(.*?\.){index}\.", name)
    return match[1] if match else None


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names that transformers gives a checkpoint's tensors in memory, by their names on disk."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in names}
