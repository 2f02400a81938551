"""Loading a model on a device in a dtype, streamed from disk where it does not fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..checkpoints.source import Source, refuse_report
from ..checkpoints.temporary import folder_of_process
from ..errors import InputError
from ..probe.stack import find_decoder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def load_model(
    source: Source, device: str, dtype: torch.dtype, memory: str | None = None, cls: Any = None
) -> tuple[Any, list[str]]:
    """Load the stock model, frozen, checked for missing weights and NaN; name the tensors that it has no use for.

    Args:
        device: 'cpu', 'cuda', 'cuda:1', or 'auto' to spread over what there is (accelerate).
        memory: most memory a device may hold, '12GB'; the rest is read from disk layer by layer (accelerate).
        cls: a class to load it with in place of the stock one.
    """
    from transformers import AutoModelForImageTextToText

    placement: dict[str, Any] = {"device_map": device}
    if memory:
        first = 0 if device != "cpu" else "cpu"
        placement = {
            "device_map": "auto",
            "max_memory": {first: memory},
            "offload_folder": str(folder_of_process("offload", "the folder for what --memory leaves on disk")),
        }
    model, report = (cls or AutoModelForImageTextToText).from_pretrained(
        source.folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **placement
    )
    refuse_report(source.name, report)
    if report["unexpected_keys"]:
        logger.warning("%s holds tensors that transformers ignores: %s", source.name, sorted(report["unexpected_keys"]))
    check_finite(model, source.name)
    return model.eval().requires_grad_(False), sorted(map(str, report["unexpected_keys"]))


def check_finite(model: Any, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:  # offloaded: met when it runs
            continue
        if not parameter.isfinite().all():
            raise InputError(f"{name}: tensor {parameter_name} holds NaN or infinite values. Download it again.")


def text_decoder(model: Any) -> Any:
    """Return the module whose `layers` are the decoder layers, in any family."""
    return find_decoder(model)


def compute_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """Choose the dtype: 'auto' is the checkpoint's on a GPU, float32 on the CPU, where half precision is slow."""
    import torch

    if name == "auto":
        stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        return stated if isinstance(stated, torch.dtype) and device != "cpu" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype '{name}' is not known: auto, {', '.join(known)}.")
    return known[name]


def pick_device(name: str | None) -> str:
    """Return the device asked for, checked; the first GPU if there is one and none was asked for."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device '{name}' was asked for, but torch {torch.__version__} sees no GPU.")
    try:
        return name if name == "auto" else str(torch.device(name))
    except RuntimeError as error:
        raise InputError(f"device '{name}' is not known: cpu, cuda, cuda:1 or auto.") from error
