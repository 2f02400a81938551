"""The configuration of a model with fewer layers."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import InputError
from ..families import (
    LAST_COUNTS,
    LAYER_COUNTS,
    LAYER_INDEX_LISTS,
    LAYER_MAPS,
    LAYER_SOURCES,
    MEANINGLESS_IF,
    PER_LAYER_LISTS,
    is_listed,
    text_path,
)
from ..plan import PruningPlan, refuse_unknown_lists

ROOT_PAIRS = ("deepstack_layer_map",)


def pruned_config(raw: dict[str, Any], loaded: Any, plan: PruningPlan) -> dict[str, Any]:
    """Return config.json for the kept layers: per-layer entries sliced, renumbered or recounted by kept index.

    Args:
        raw: config.json as the source has it; only what the plan changes is changed.
        loaded: transformers' configuration, for values that config.json leaves to defaults: a layer pattern that is
            derived from the number of layers would be another one after pruning.
    """
    path = text_path(loaded)
    changes = layer_changes(loaded, plan, _at(raw, path) or raw)
    pruned = copy.deepcopy(raw)
    pruned.pop("transformers_weights", None)  # the written weights have the usual names
    if [name for name in ("router", "serving_router") if pruned.pop(name, None) is not None]:
        pruned.pop("auto_map", None)  # it was trained for the layers of before, and its files stay behind
    if not plan.drop:
        return pruned
    for name in ROOT_PAIRS:  # Granite Vision 4: pairs of a vision layer and the decoder layer that gets its features
        if pairs := getattr(loaded, name, None):
            pruned[name] = [[vision, plan.new_index[layer]] for vision, layer in pairs if layer in plan.new_index]
    text = _at(pruned, path)
    if text is None:  # Qwen2-VL's first configs have no text_config
        pruned.update(changes)
        return pruned
    text.update(changes)
    if text is not pruned:
        pruned.update({name: value for name, value in changes.items() if name in pruned})
    return pruned


def layer_changes(loaded: Any, plan: PruningPlan, written: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the language model's configuration entries that are others when only the kept layers are there.

    Args:
        written: the entries that config.json has; None: all of the loaded ones.
    Raises: InputError for an entry that dropping layers would break.
    """
    text = loaded.get_text_config()
    written = text.to_dict() if written is None else written
    for name, trivial in MEANINGLESS_IF.items():
        if plan.drop and getattr(text, name, None) not in trivial:
            raise InputError(f"this checkpoint has {name}={getattr(text, name)}, which dropping layers would break.")
    changes: dict[str, Any] = {"num_hidden_layers": len(plan.keep)}
    if not is_listed(loaded):  # what a probe has opened: the run of the tiny model says whether a list was one
        changes |= _further_lists(text, plan)
    changes |= _sliced(text, plan, written) | _renumbered_entries(text, plan)
    if is_listed(loaded):
        refuse_unknown_lists(text, plan)
    return changes


def _sliced(text: Any, plan: PruningPlan, written: dict[str, Any]) -> dict[str, Any]:
    """Slice lists of one entry a layer and of layers' indices, and count again the first or last layers of a kind."""
    changes: dict[str, Any] = {}
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
    for name in LAST_COUNTS:
        if count := getattr(text, name, None):
            changes[name] = sum(layer >= plan.num_layers - count for layer in plan.keep)
    return changes


def _renumbered_entries(text: Any, plan: PruningPlan) -> dict[str, Any]:
    """Renumber entries that are found by a layer's index, or name another layer."""
    changes: dict[str, Any] = {}
    for name in LAYER_MAPS:
        if isinstance(entries := text.to_dict().get(name), dict):
            changes[name] = {
                str(plan.new_index[int(layer)]): entry
                for layer, entry in entries.items()
                if int(layer) in plan.new_index
            }
    for name in LAYER_SOURCES:
        if values := getattr(text, name, None):
            changes[name] = [_renumbered(values[layer], plan, name) for layer in plan.keep]
    return changes


def _at(raw: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the part of config.json under a path of names; None where it has no such part."""
    part: Any = raw
    for name in path:
        part = part.get(name)
        if not isinstance(part, dict):
            return None
    entry: dict[str, Any] = part
    return entry


def _further_lists(text: Any, plan: PruningPlan) -> dict[str, Any]:
    """Slice by kept index lists of one entry a layer that no table names."""
    known = {*PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *LAYER_SOURCES, "eos_token_id", "architectures"}
    return {
        name: [value[layer] for layer in plan.keep]
        for name, value in text.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == plan.num_layers and name not in known
    }


def _renumbered(source: Any, plan: PruningPlan, name: str) -> Any:
    if not isinstance(source, int):
        return source
    if source not in plan.new_index:
        raise InputError(
            f"layer {source} is among those that go, and {name} says that a layer that stays reads from it."
        )
    return plan.new_index[source]
