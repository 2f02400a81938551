"""Loading a model on a device in a dtype, streamed from disk where it does not fit."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import ranks
from ..checkpoints.memory import parse_size
from ..checkpoints.source import Source, laid_out, refuse_report
from ..checkpoints.temporary import folder_of_process
from ..errors import InputError
from ..probe.stack import find_decoder, stack_path
from .residency import beside_layers, read_by_ranges
from .room import Room

if TYPE_CHECKING:
    import torch

AT_ONCE = 3  # layers in memory: one that runs, one that is read meanwhile, one that a fold goes back to
logger = logging.getLogger(__name__)


def load_model(
    source: Source,
    device: str,
    dtype: torch.dtype,
    memory: str | None = None,
    cls: Any = None,
    by_layer: bool = False,
) -> tuple[Any, list[str]]:
    """Load the stock model, frozen, checked for missing weights and NaN; name the tensors that it has no use for.

    Args:
        device: 'cpu', 'cuda', 'cuda:1', or 'auto' to spread over what there is (accelerate).
        memory: most that the model and its states may take on the device, '12GB'; layers beyond are read from disk.
        cls: a class to load it with in place of the stock one.
        by_layer: layers will be held one by one: none is kept from the beginning, so that those are that serve best.
    """
    from transformers import AutoModelForImageTextToText

    placement: dict[str, Any] = {"device_map": device}
    room = Room(0, 0)
    if memory:
        sizes = PartSizes.of(source, dtype.itemsize)
        num_held, left = sizes.share_out(parse_size(memory), source.name)
        if by_layer and num_held < len(sizes.layers):  # those stay that serve best, once they have run
            num_held, left = 0, left + num_held * max(sizes.layers)
        stay = sizes.layers_that_stay(left, device) if by_layer else 0
        room = Room(left + (AT_ONCE - 1) * max(sizes.layers), for_states=left - stay * max(sizes.layers))
        placement = {
            "device_map": _placed(source, device, num_held, cls),
            "offload_folder": str(folder_of_process("offload", "the folder for what --memory leaves on disk")),
        }
    with warnings.catch_warnings():  # parameters that are no module are named one by one, which accelerate wonders at
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        model, report = (cls or AutoModelForImageTextToText).from_pretrained(
            source.folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **placement
        )
    refuse_report(source.name, report)
    if report["unexpected_keys"]:
        logger.warning("%s holds tensors that transformers ignores: %s", source.name, sorted(report["unexpected_keys"]))
    check_finite(model, source.name)
    read_by_ranges(model, text_decoder(model).layers, weights=source.weights, name=source.name, room=room)
    return model.eval().requires_grad_(False), sorted(map(str, report["unexpected_keys"]))


@dataclass(frozen=True)
class PartSizes:
    """What the parts of a model take in memory, in bytes."""

    layers: tuple[int, ...]
    beside: int  # vision tower, embeddings, head

    @classmethod
    def of(cls, source: Source, itemsize: int) -> PartSizes:
        layers = tuple(itemsize * count for count in source.parameters_per_layer)
        return cls(layers, itemsize * source.weights.num_parameters - sum(layers))

    @property
    def least(self) -> int:
        """Return what streaming takes: all that is no layer, a layer, the one that is read meanwhile, and a fold's."""
        return self.beside + AT_ONCE * max(self.layers)

    def layers_that_stay(self, left: int, device: str) -> int:
        """Return how many layers the bytes beyond the least are for; what is left of them is for states.

        On a CPU a state in a file costs little beside what layers compute of it, and layers come first. On a GPU it
        costs more, and as much is for states as for layers.
        """
        return int(left / (1 if device == "cpu" else 2) / max(self.layers))

    def share_out(self, allowed: int, name: str) -> tuple[int, int]:
        """Return how many layers stay in memory, and the bytes that are left for states between layers.

        Raises: InputError where less is allowed than a single layer needs.
        """
        if sum(self.layers) + self.beside <= allowed:
            return len(self.layers), 0
        left = allowed - self.least
        if left < 0:
            raise InputError(
                f"--memory allows {allowed / 1e9:.3f} GB, and {name} needs {self.least / 1e9:.3f} GB at least: "
                f"{self.beside / 1e9:.3f} for what is no decoder layer, and {AT_ONCE} layers of "
                f"{max(self.layers) / 1e9:.3f} GB. Allow more, or take --dtype bfloat16."
            )
        num_held = min(int(left / 2 / max(self.layers)), len(self.layers) - 1)
        return num_held, left - num_held * max(self.layers)


def _placed(source: Source, device: str, num_held: int, cls: Any) -> dict[str, Any]:
    """Return where each part of the model is to lie: on the device, or on disk."""
    import torch

    if cls is None:
        model = laid_out(source.config)
    else:
        with torch.device("meta"):
            model = cls._from_config(source.config)
    layers, path = text_decoder(model).layers, stack_path(model)
    main = device if device != "auto" else 0
    placed: dict[str, Any] = dict.fromkeys(beside_layers(model, layers), main)
    placed |= {f"{path}.{index}": main if index < num_held else "disk" for index in range(len(layers))}
    return placed


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
    """Return the device asked for, checked; the first GPU if there is one and none was asked for.

    Of several processes each takes a GPU of its own.
    """
    import torch

    if ranks.world() > 1 and name in (None, "auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{_own_gpu(torch.cuda.device_count())}"
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device '{name}' was asked for, but torch {torch.__version__} sees no GPU.")
    try:
        return name if name == "auto" else str(torch.device(name))
    except RuntimeError as error:
        raise InputError(f"device '{name}' is not known: cpu, cuda, cuda:1 or auto.") from error


def alike_options(device: str, dtype: Any, batch_size: int, memory: str | None) -> list[Any]:
    """Return how a model is run, as processes that share the work must agree on: each takes a GPU of its own."""
    return [device.partition(":")[0] if ranks.world() > 1 else device, str(dtype), batch_size, memory]


def _own_gpu(count: int) -> int:
    """Return the number of the GPU that this process takes of so many on its machine. Raises InputError."""
    if (local := ranks.local_rank()) >= count:
        raise InputError(
            f"process {local} of this machine finds {count} GPUs, and each takes one: start {count} processes, or give "
            "--device cpu."
        )
    return local
