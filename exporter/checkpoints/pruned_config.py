"""The configuration of a model with fewer layers."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import InputError
from ..families import LAYER_COUNTS, LAYER_INDEX_LISTS, MEANINGLESS_IF, PER_LAYER_LISTS
from ..plan import PruningPlan, refuse_unknown_lists


def pruned_config(raw: dict[str, Any], loaded: Any, plan: PruningPlan) -> dict[str, Any]:
    """config.json for the kept layers: every per-layer entry sliced, renumbered or recounted by kept index.

    Args:
        raw: config.json as the source has it; only what the plan changes is changed.
        loaded: transformers' configuration, for values that config.json leaves to defaults: a layer pattern that is
            derived from the number of layers would be another one after pruning.
    """
    text = loaded.get_text_config()
    for name, trivial in MEANINGLESS_IF.items():
        if plan.drop and getattr(text, name, None) not in trivial:
            raise InputError(f"this checkpoint has {name}={getattr(text, name)}, which dropping layers would break.")
    changes: dict[str, Any] = {"num_hidden_layers": len(plan.keep)}
    written = raw.get("text_config", raw)
    for name in PER_LAYER_LISTS:
        values = getattr(text, name, None) or ()
        if len(values) == plan.num_layers and (name in written or len(set(values)) > 1):
            changes[name] = [values[layer] for layer in plan.keep]
    for name in LAYER_INDEX_LISTS:
        if getattr(text, name, None):
            changes[name] = [plan.new_index[layer] for layer in getattr(text, name) if layer in plan.new_index]
    for name in LAYER_COUNTS:
        if getattr(text, name, None) is not None and (name in written):
            limit = min(getattr(text, name), plan.num_layers)
            changes[name] = sum(layer < limit for layer in plan.keep)
    refuse_unknown_lists(text, plan)
    pruned = copy.deepcopy(raw)
    pruned.pop("transformers_weights", None)  # the written weights have the usual names
    if pruned.pop("router", None) is not None:  # it chose among the layers of before, and its files stay behind
        pruned.pop("auto_map", None)
    if not plan.drop:
        return pruned
    for place in (pruned.get("text_config"), pruned):  # Qwen2-VL's first configs have no text_config
        if place is None:
            continue
        if place is pruned and "text_config" in pruned:
            place.update({k: v for k, v in changes.items() if k in place})
        else:
            place.update(changes)
    return pruned
