"""Writes the compressed folder, whole or not at all: beside its target first, renamed into place at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..families import PER_LAYER_TENSORS
from ..plan import PruningPlan
from .files import copy_companions, left_behind, without_auto_map
from .own_types import carry_modeling_files, own_type
from .pruned_config import pruned_config
from .safetensors_ranges import TensorRange, same_bytes, write_shards
from .source import Source

if TYPE_CHECKING:
    import torch

    from ..plan import Folded

logger = logging.getLogger(__name__)


def kept_pieces(source: Source, plan: PruningPlan, folded: Folded) -> list[list[TensorRange]]:
    """Return the output's shards: the source's own, without the dropped layers and without empty shards."""
    shards = []
    for shard in source.weights.shards:
        pieces = []
        for name, entry in shard.entries.items():
            match = source.layer_key.match(name)
            if match is None:
                if not _tied_copy(source, name):
                    pieces.append(_of_kept_layers(source, plan, TensorRange(name, entry)))
            elif (old := int(match[2])) in plan.new_index:
                renamed = f"{match[1]}{plan.new_index[old]}.{match[3]}"
                pieces.append(TensorRange(renamed, entry, folded.get((old, match[3]))))
        if pieces:
            shards.append(pieces)
    return shards


def _of_kept_layers(source: Source, plan: PruningPlan, piece: TensorRange) -> TensorRange:
    """Leave out the dropped layers' parts of a tensor that holds one for every layer, as Gemma 4's embeddings do."""
    axis = next((axis for ending, axis in PER_LAYER_TENSORS.items() if piece.name.endswith(ending)), None)
    if axis is None or not plan.drop:
        return piece

    def kept() -> torch.Tensor:
        import torch

        parts = source.weights.read(piece.name).chunk(plan.num_layers, axis)
        return torch.cat([parts[layer] for layer in plan.keep], axis)

    shape = list(piece.entry.shape)
    shape[axis] = shape[axis] // plan.num_layers * len(plan.keep)
    size = piece.entry.num_bytes // plan.num_layers * len(plan.keep)
    return TensorRange(piece.name, replace(piece.entry, shape=tuple(shape), end=piece.entry.begin + size), kept)


def _tied_copy(source: Source, name: str) -> bool:
    """Tell whether a tensor is a head that is tied to the embeddings, and stored all the same."""
    if not name.endswith("lm_head.weight") or not getattr(source.config, "tie_word_embeddings", False):
        return False
    embeddings = [n for n in source.weights.entries if n.endswith("embed_tokens.weight") and "vision" not in n]
    if len(embeddings) != 1:
        return False
    entries = source.weights.entries
    return same_bytes(entries[name], entries[embeddings[0]])


def write_checkpoint(
    source: Source,
    plan: PruningPlan,
    folded: Folded,
    folder: Path,
    advance: Callable[[int], object] = lambda done: None,
) -> None:
    """Write weights, configuration and all that goes along into an existing folder; log what stays behind."""
    metadata = {shard.path: shard.metadata for shard in source.weights.shards}
    write_shards(folder, kept_pieces(source, plan, folded), advance, metadata)
    # Without the mention of code, which stays behind: the plain class is what the checkpoint is verified with.
    config = pruned_config(source.raw_config, source.config, plan)
    if (our_type := own_type(source.raw_config)) is not None:
        carry_modeling_files(our_type, folder)
        config["auto_map"] = our_type.auto_map  # a router's, if the source has one, stays behind
    else:
        config = without_auto_map(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    carry_companions(source, folder)


def carry_companions(source: Source, folder: Path) -> None:
    """Copy processor, tokenizer, templates, generation settings and licence texts; say what stays behind."""
    beside = source.beside_weights
    copy_companions(source.folder, beside.kept, folder)
    # Then its modeling file is the package's, which is written with the weights or with a new router.
    ours = (
        any(name in source.raw_config for name in ("router", "serving_router"))
        or own_type(source.raw_config) is not None
    )
    if line := left_behind(name for name in beside.left if not (ours and name.endswith(".py"))):
        logger.warning("%s: %s", source.original.name, line)
