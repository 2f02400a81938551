"""Refuses what the plain model would answer in silence: budgets that nothing of a model's classes knows of.

Whatever class vLLM runs, its multimodal processor sees every request first. `watch` looks at each that is made.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from exporter.modeling.served_router import ENTRY, OFF

from .known import KNOWN_VERSIONS, SERVED, is_known
from .requests import asked_for, without_keys

WATCHED = "_lvlm_exporter_watches"


def watch(version: str) -> None:
    """Look at every multimodal processor that vLLM makes; a second call changes nothing.

    Args:
        version: of vLLM.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    make = MULTIMODAL_REGISTRY.create_processor
    if getattr(make, WATCHED, False):
        return

    def make_and_check(model_config: Any, **options: Any) -> Any:
        processor = make(model_config, **options)
        if not getattr(processor, "serving", None):
            refuse_budgets(processor, model_config, version)
        return processor

    setattr(make_and_check, WATCHED, True)
    MULTIMODAL_REGISTRY.create_processor = make_and_check


def refuse_budgets(processor: Any, model_config: Any, version: str) -> None:
    """Have a processor of the plain model refuse every request with a budget; raise at once where all have one."""
    reason = reason_for(model_config, version)
    entry = getattr(model_config.hf_config, ENTRY, None)
    default = entry.get("default", OFF) if isinstance(entry, dict) else OFF
    at_start = asked_for((model_config.multimodal_config and model_config.multimodal_config.mm_processor_kwargs) or {})
    if default != OFF:
        raise ValueError(f"the preset {default!r} is the default of {model_config.model}, and {reason}")
    if at_start:
        raise ValueError(f"--mm-processor-kwargs names {at_start}, and {reason}")
    apply = processor.apply

    def apply_plain(inputs: Any, *arguments: Any, **options: Any) -> Any:
        if key := asked_for(inputs.hf_processor_mm_kwargs):
            raise ValueError(f"mm_processor_kwargs names {key}, and {reason}")
        inputs = copy(inputs)
        inputs.hf_processor_mm_kwargs = without_keys(inputs.hf_processor_mm_kwargs)
        return apply(inputs, *arguments, **options)

    processor.apply = apply_plain


def reason_for(model_config: Any, version: str) -> str:
    """Return why a model takes no budget, and what to do, as the second half of a sentence."""
    if getattr(model_config.hf_config, ENTRY, None) is None:
        return (
            f"{model_config.model} has no serving router, so that it would answer as the plain model: train one with "
            "`route --serve`, or leave it out."
        )
    if not is_known(version):
        return (
            f"vLLM {version} is not among the releases that serve budgets ({', '.join(KNOWN_VERSIONS)}): install one "
            f"of them, or serve the plain model with the preset {OFF!r}."
        )
    named = ", ".join(model_config.hf_config.architectures or ["none"])
    return (
        f"serving routers run in vLLM's own classes of {', '.join(SERVED)}, not here ({named}): serve the plain model "
        f"with the preset {OFF!r}, or run it in transformers."
    )
