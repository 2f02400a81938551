"""Which files of a folder are the checkpoint's weights: exactly those that transformers would load, or a refusal.

transformers takes the file that config.json names under `transformers_weights`, else `model.safetensors`, else the
shards of `model.safetensors.index.json`, else pickled weights (modeling_utils._get_resolved_checkpoint_files). Other
programs take the shards where there is an index, so that two sets in one folder are two models under one name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError
from .json_file import read_json
from .safetensors_ranges import INDEX, SINGLE, Shard, Weights, read_shard

logger = logging.getLogger(__name__)
NAMED_WEIGHTS = "transformers_weights"  # the entry of config.json
ADAPTER = "adapter_config.json"
TRAINING_STATE = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


def open_weights(folder: Path, named: str | None = None) -> Weights:
    """Read the headers of the weights that transformers would load from a folder, and check them against each other.

    Args:
        named: what config.json says under `transformers_weights`.
    Raises: InputError.
    """
    if named is not None:
        path = folder / inside(named, "config.json")
        return Weights((read_shard(path),)) if not named.endswith(".index.json") else read_sharded(path)
    index_path, single = folder / INDEX, folder / SINGLE
    if not index_path.exists():
        if single.exists():
            return Weights((read_shard(single),))
        raise InputError(no_weights(str(folder), [path.relative_to(folder).as_posix() for path in files_in(folder)]))
    if single.exists() and set(read_index(index_path).values()) != {SINGLE}:
        return Weights((_one_of_two(folder, read_shard(single)),))
    return read_sharded(index_path)


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it, one level deep."""
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())


def no_weights(where: str, names: Iterable[str]) -> str:
    """Say why a folder or repository without model.safetensors and index can't be used.

    Args:
        names: its files, relative to it.
    """
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    shards = [name for name in top if name.endswith(".safetensors") and "-of-" in name]
    if ADAPTER in top:
        return adapter_alone(where)
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) and name not in TRAINING_STATE for name in top):
        return (
            f"{where} holds pickled weights only (.bin/.pt), which can run code when read. Convert it once with "
            "transformers: AutoModelForImageTextToText.from_pretrained(X).save_pretrained(Y)."
        )
    if any(name.endswith(".gguf") for name in top):
        return (
            f"{where} holds GGUF weights only, which can't be compressed: name the checkpoint that they were made from."
        )
    if shards:
        return f"{where} holds {len(shards)} shards, {shards[0]} among them, but no {INDEX}: download it again."
    if deeper := [name for name in names if name.endswith((f"/{SINGLE}", f"/{INDEX}"))]:
        return f"{where} holds no weights of its own; there are some in {where}/{deeper[-1].split('/')[0]}: name that."
    return f"{where} holds no weights: neither {SINGLE} nor {INDEX}."


def adapter_alone(where: str) -> str:
    return (
        f"{where} holds an adapter ({ADAPTER}) and no weights: merge it into its base model first (peft: "
        "model.merge_and_unload().save_pretrained(X)), and name X."
    )


def refuse_adapter(folder: Path, name: str) -> None:
    """Raise InputError for an adapter beside weights: transformers applies it if peft is there, and else does not."""
    if not (folder / ADAPTER).exists():
        return
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        raise InputError(adapter_alone(name))
    raise InputError(
        f"{name} holds weights and an adapter beside them ({ADAPTER}): transformers applies it where peft is "
        "installed, and elsewhere does not. Merge it first (peft: model.merge_and_unload().save_pretrained(X)) and "
        f"name X, or take {ADAPTER} and the adapter's weights out of the folder if they are merged already."
    )


def inside(name: Any, origin: str) -> str:
    """Return a file name that stays in its folder."""
    if not isinstance(name, str) or not name or "\\" in name or PurePosixPath(name).is_absolute():
        raise InputError(f"{origin} names the weight file {name!r}: a file of the folder is needed.")
    if ".." in PurePosixPath(name).parts:
        raise InputError(f"{origin} names the weight file '{name}', which is outside the folder.")
    return name


def read_index(path: Path) -> dict[str, str]:
    """Return the shard of every tensor, as the index says."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} is no index of safetensors shards: it has no 'weight_map' of tensors.")
    return {name: inside(file, str(path)) for name, file in weight_map.items()}


def read_sharded(index_path: Path) -> Weights:
    """Return the shards of an index, each tensor in the one place where the index says it is."""
    folder, weight_map = index_path.parent, read_index(index_path)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing)}.")
    shards = tuple(read_shard(folder / name) for name in names)
    held: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        for name in shard.entries:
            if name in held:
                raise InputError(
                    f"{folder} holds '{name}' twice, in {held[name]} and in {file}: which one counts depends on the "
                    "program that loads it. Write the checkpoint again, or download it again."
                )
            held[name] = file
    wrong = [name for name, file in weight_map.items() if held.get(name) != file]
    if wrong:
        raise InputError(
            f"{index_path} is wrong about {len(wrong)} of {len(weight_map)} tensors: '{wrong[0]}' is not in "
            f"{weight_map[wrong[0]]}. Write the index again, or download the checkpoint again."
        )
    unlisted = [name for name in held if name not in weight_map]
    if unlisted:
        raise InputError(
            f"{index_path} leaves out {len(unlisted)} tensors that the shards hold, '{unlisted[0]}' among them. "
            "Write the index again, or download the checkpoint again."
        )
    return Weights(shards)


def _one_of_two(folder: Path, single: Shard) -> Shard:
    """Choose between `model.safetensors`, which transformers takes, and an index of other shards, which others take."""
    weight_map = read_index(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    there = [name for name in shards if (folder / name).exists()]
    if not there:
        logger.warning("%s: %s is read; the shards that %s names are not there", folder, SINGLE, INDEX)
        return single
    both = len(set(weight_map) & set(single.entries))
    if set(weight_map) != set(single.entries):
        raise InputError(
            f"{folder} holds two sets of weights that differ: {SINGLE} ({len(single.entries)} tensors) and the "
            f"{len(shards)} shards of {INDEX} ({len(weight_map)} tensors, {both} of the same name). transformers loads "
            f"{SINGLE}, other programs the shards: remove the set that is not meant."
        )
    logger.warning(
        "%s holds two sets of weights: %s is read, as transformers does, the %d shards of %s are not",
        folder, SINGLE, len(shards), INDEX,
    )  # fmt: skip
    return single
