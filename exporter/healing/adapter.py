"""The learnt updates as a file: low-rank updates of linear maps and new norms, and the tensors that come of them.

The file lies in the checkpoint, beside its record. Merging it into the checkpoint as it was before gives the same bytes
again, which training again might not.

Shapes: R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.safetensors_ranges import read_shard
from ..checkpoints.source import Source
from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

A, B = ".lora_A", ".lora_B"
SCALING = 2.0  # of B A, as PEFT multiplies it


def save_adapter(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write what was learnt, by name: 'layers.3.mlp.down_proj.lora_A' [R, inputs], '.lora_B' [outputs, R], norms."""
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"scaling": str(SCALING)})


def merged(source: Source, path: Path) -> dict[tuple[int, str], Callable[[], Tensor]]:
    """Return the decoder's new tensors, each to be made when it is written: (layer, name inside it) -> a function.

    Raises: InputError where the adapter is of another model.
    """
    shard = read_shard(path)
    scaling = float(shard.metadata.get("scaling", SCALING))
    changed: dict[tuple[int, str], Callable[[], Tensor]] = {}
    for name in shard.entries:
        if name.endswith(B):
            continue
        layer, _, inner = name.removeprefix("layers.").removesuffix(A).partition(".")
        inner = f"{inner}.weight" if name.endswith(A) else inner
        stored = f"{source.layer_prefix}{layer}.{inner}"
        if not layer.isdigit() or stored not in source.weights.entries:
            raise InputError(f"{path} is of another model: {source.name} has no tensor {stored}.")
        changed[int(layer), inner] = functools.partial(_merged, source, stored, path, name, scaling)
    return changed


def _merged(source: Source, stored: str, path: Path, name: str, scaling: float) -> Tensor:
    """Make one tensor in the checkpoint's own dtype, from sums in double precision: no order of them shows."""
    from safetensors import safe_open

    before = source.weights.read(stored)
    with safe_open(path, framework="pt") as file:
        learnt: Tensor = file.get_tensor(name)
        if not name.endswith(A):
            return learnt.to(before.dtype)
        second: Tensor = file.get_tensor(name.removesuffix(A) + B)
    update = scaling * (second.double() @ learnt.double())
    if update.shape != before.shape:
        raise InputError(f"{path} is of another model: its update of {stored} is {list(update.shape)}.")
    after: Tensor = (before.double() + update).to(before.dtype)
    return after
