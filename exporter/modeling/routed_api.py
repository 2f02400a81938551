"""The parts of transformers beyond its documented interface that the routed files need, each with a probe.

Everything of transformers that a release may rename or change is imported here and nowhere else. Importing this file
ends in one sentence where something is missing; `check_transformers` refuses what is there and works in another way.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers

__all__ = [
    "CACHE_NAMES",
    "DECODER_TAKES",
    "LAYER_TAKES",
    "PACKED",
    "PER_TOKEN",
    "PROBES",
    "STOCK_CLASSES",
    "TESTED",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GradientCheckpointingLayer",
    "StaticCache",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "cache_in",
    "cache_name",
    "cache_of",
    "cached_file",
    "check_forward",
    "check_transformers",
    "checkpointing_spares_caches",
    "get_checkpoint_conversion_mapping",
    "logger",
    "misfit",
    "named_arguments",
    "register_checkpoint_conversion_mapping",
    "unknown_arguments",
    "unsupported",
    "uses_flash_attention",
    "with_cache_as",
]

TESTED = ("5.20.0", "5.23.0", "5.24.0")  # releases of transformers that all tests of these files have run on
INSTALL = "pip install 'transformers>=5.20,<5.25'"


def unsupported(reason: str) -> str:
    """Say in one sentence why this transformers cannot run the checkpoint, and what to do."""
    return (
        f"This checkpoint's modeling files do not understand transformers {transformers.__version__}: {reason}. They "
        f"were tested with transformers {', '.join(TESTED)}. Install one of these ({INSTALL}), or load the folder "
        "without trust_remote_code=True, as the plain model."
    )


try:
    from transformers.cache_utils import (
        Cache,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticCache,
        StaticLayer,
        StaticSlidingWindowLayer,
    )
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as STOCK_CLASSES
    from transformers.utils import cached_file, logging
except ImportError as error:
    raise ImportError(unsupported(str(error).split(" (")[0])) from None
logger = logging.get_logger(__name__)
CACHE_NAMES = ("cache", "past_key_values")  # the cache's argument since 5.24, and before; of both, the first counts
DECODER_TAKES = frozenset(
    "input_ids attention_mask position_ids inputs_embeds use_cache visual_pos_masks deepstack_visual_embeds "
    "modality".split()
).union(CACHE_NAMES)
DECODER_NEEDS = frozenset({"attention_mask", "inputs_embeds", "use_cache"})
LAYER_TAKES = frozenset(
    "hidden_states attention_mask position_ids position_embeddings use_cache modality".split()
).union(CACHE_NAMES)
PER_TOKEN = ("position_embeddings", "modality")  # [..., B or 1, S, C]: what a layer is given of each token
LAYER_NEEDS = frozenset({"hidden_states", "attention_mask", "position_embeddings"})
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")  # arguments that say where packed sequences end


# --- probes -----------------------------------------------------------------------------------------------------------


def _dynamic_caches_grow() -> bool:
    """Tell whether a dynamic cache has layers, whose keys and values [B, H, P, D] grow, and knows its masks' length."""
    cache, states = DynamicCache(), torch.zeros(2, 1, 3, 4)
    keys, _ = cache.update(states, states, 0)
    layer = cache.layers[0]
    grown = type(layer) is DynamicLayer and layer.is_initialized and keys.shape == layer.keys.shape == states.shape
    return grown and cache.get_seq_length() == 3 and tuple(cache.get_mask_sizes(2, 0)) == (5, 0)


def _dynamic_layers_are_filled_by_hand() -> bool:
    layer, states = DynamicLayer(), torch.zeros(2, 1, 3, 4)
    layer.lazy_initialization(states, states)
    layer.keys = layer.values = states
    layer.crop(-1)
    complete: bool = layer.is_initialized and layer.keys.shape[2] == layer.get_seq_length() == 2
    return complete


def _sliding_layers_say_how_far() -> bool:
    layer = DynamicSlidingWindowLayer(sliding_window=4)
    return layer.sliding_window == 4 and layer.record_past is False and not layer.is_initialized


def _static_layers_count() -> bool:
    """Tell whether a static layer is as long as it will ever be, and writes its next entry where it has counted to."""
    layer, states = StaticLayer(8), torch.zeros(2, 1, 3, 4)
    keys, _ = layer.update(states, states)
    return layer.max_cache_len == keys.shape[2] == 8 and int(layer.get_seq_length()) == 3


def _caches_are_asked_by_these_names() -> bool:
    """Tell whether the methods that routed caches override have the parameters that they expect."""
    known = {
        "get_seq_length": ["layer_idx"],
        "get_mask_sizes": ["query_length", "layer_idx"],
        "reorder_cache": ["beam_idx"],
        "batch_select_indices": ["indices"],
        "batch_repeat_interleave": ["repeats"],
        "activate_past_recording": [],
        "crop": None,  # what it takes is a negative number of tokens, by position
        "reset": [],
    }
    return all(
        names in (None, [*inspect.signature(getattr(Cache, method)).parameters][1:]) for method, names in known.items()
    )


def _hub_names_are_registered() -> bool:
    parameters = [inspect.signature(register_checkpoint_conversion_mapping).parameters]
    return "overwrite" in parameters[0] and callable(get_checkpoint_conversion_mapping)


PROBES: dict[str, Callable[[], bool]] = {
    "DynamicCache.layers and get_mask_sizes": _dynamic_caches_grow,
    "DynamicLayer.lazy_initialization, keys, values and crop": _dynamic_layers_are_filled_by_hand,
    "DynamicSlidingWindowLayer.sliding_window and record_past": _sliding_layers_say_how_far,
    "StaticLayer.max_cache_len and update": _static_layers_count,
    "the methods of Cache": _caches_are_asked_by_these_names,
    "register_checkpoint_conversion_mapping": _hub_names_are_registered,
}


def check_transformers(decoder: Any) -> None:
    """Refuse a transformers whose caches, decoder or decoder layers do not work as these files take them to.

    Args:
        decoder: a text model of transformers, not yet routable.

    Raises:
        ValueError: one sentence that names what is not understood.
    """
    with torch.device("cpu"):  # also while a model is made on meta
        for name, probe in PROBES.items():
            try:
                reason = "" if probe() else f"{name} work in another way"
            except Exception as error:
                reason = f"{name} work in another way ({type(error).__name__}: {error})"
            if reason:
                raise ValueError(unsupported(reason))
    check_forward(type(decoder), DECODER_TAKES, DECODER_NEEDS)
    for layer_class in {type(layer): None for layer in decoder.layers}:
        check_forward(layer_class, LAYER_TAKES, LAYER_NEEDS)


def check_forward(module_class: Any, known: frozenset[str], needed: frozenset[str]) -> None:
    """Refuse a forward with an argument that is not known, or without one that is needed."""
    if reason := misfit(module_class, known, needed):
        raise ValueError(unsupported(reason))


def misfit(module_class: Any, known: frozenset[str], needed: frozenset[str]) -> str:
    """Return why a forward is none that these files understand: a clause; '' if it is one."""
    parameters = inspect.signature(module_class.forward).parameters
    named = named_arguments(module_class)
    where = f"{module_class.__name__}.forward"
    if others := unknown_arguments(module_class, known):
        return f"{where} takes an argument that they do not know, {others[0]!r}"
    if missing := sorted(needed - set(named)):
        return f"{where} has no argument {missing[0]!r}"
    if not any(name in named for name in CACHE_NAMES):
        return f"{where} takes no cache by the name of {' or '.join(CACHE_NAMES)}"
    if len(named) == len(parameters) - 1:
        return f"{where} hands on no further keywords"
    return ""


def named_arguments(module_class: Any) -> list[str]:
    """Return the names of a forward's arguments, without self and without those that it only hands on."""
    parameters = inspect.signature(module_class.forward).parameters
    return [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD][1:]


def unknown_arguments(module_class: Any, known: frozenset[str]) -> list[str]:
    return [name for name in named_arguments(module_class) if name not in known]


# --- what differs between the releases -------------------------------------------------------------------------------


def cache_name(forward: Any) -> str:
    """Return the name by which a forward of the transformers that is installed takes its cache."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_in(named: dict[str, Any]) -> Any:
    """Return the cache among keyword arguments, whichever its name; None if there is none."""
    return next((named[name] for name in CACHE_NAMES if name in named), None)


def with_cache_as(name: str, named: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the cache under one name: releases ignore it under the other, or warn."""
    if not any(other in named for other in CACHE_NAMES if other != name):
        return named
    cache = cache_in(named)
    return {key: value for key, value in named.items() if key not in CACHE_NAMES} | {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output holds, whichever its name; None without one."""
    return next((getattr(output, name) for name in CACHE_NAMES if getattr(output, name, None) is not None), None)


@functools.cache
def checkpointing_spares_caches() -> bool:
    """Tell whether layers with gradient checkpointing keep their cache in passes without a gradient: since 5.24."""

    class Probe(GradientCheckpointingLayer):
        def forward(self, states: Any, **keywords: Any) -> dict[str, Any]:
            return keywords

    probe = Probe()
    probe.gradient_checkpointing, probe._gradient_checkpointing_func = True, lambda run, *args: run(*args)
    with torch.no_grad():
        return all(probe(None, **{name: True})[name] for name in CACHE_NAMES)


def uses_flash_attention(config: Any) -> bool:
    return "flash" in str(getattr(config, "_attn_implementation", None))
