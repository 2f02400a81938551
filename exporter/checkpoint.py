"""Writes the compressed folder, whole or not at all: beside its target first, renamed into place at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .files import check_written, copy_companions, left_behind, replace_text, settled, umask, without_auto_map
from .plan import PruningPlan, pruned_config
from .record import RECORD, read_record
from .source import LAYER_KEY, Source
from .weights import INDEX, SINGLE, Piece, write_shard

if TYPE_CHECKING:
    from .replay import Folded

__all__ = [
    "RECORD",
    "check_space",
    "check_target",
    "check_updatable",
    "read_record",
    "room",
    "staged",
    "write_checkpoint",
    "write_record",
]

logger = logging.getLogger(__name__)
LOCK = ".lock"
SPARE_BYTES = 64 << 20  # for everything that is not weights


# --- the place --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes the target if the block ends well, and is removed if it does not.

    A target that is a link is made where the link leads.
    """
    target = settled(target)
    with room(target) as stage:
        yield stage
        stage.chmod(0o777 & ~umask())
        check_target(target)
        stage.rename(target)
        (target / LOCK).unlink()  # only now: a stage without a lock is one to sweep


@contextlib.contextmanager
def room(target: Path) -> Iterator[Path]:
    """A folder beside the target for work in progress, removed at the end.

    What a killed run has left is removed by the next one: a live room is locked, a dead one is not.
    """
    target = settled(target)
    check_target(target)
    _sweep(target)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    lock = (made / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield made
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"the disk of {target.parent} is full; nothing was kept. Free some space.") from error
        raise
    finally:
        lock.close()
        shutil.rmtree(made, ignore_errors=True)


def stage_name(folder: Path) -> str:
    """Return the name that a folder has, or will have when it is done: no message names a temporary folder."""
    return re.sub(r"^\.(.+)\.partial-[^.]*$", r"\1", folder.absolute().name)


def check_target(target: Path) -> None:
    """Raise InputError if the folder can't be made. An empty folder may be there already, or a link to one."""
    named, target = target, settled(target)
    if os.path.ismount(target):
        raise InputError(f"{named} is where a disk is mounted, which no folder can take the place of: name one in it.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{named} exists already: name another folder, or remove it.")
    parent = target.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is no folder: make it first, {target.name} is to be written there.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is not writable: {target.name} can't be made there.")


def check_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(settled(target).parent).free
    if free < num_bytes + SPARE_BYTES:
        raise InputError(
            f"{target.name} needs {num_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free. Free some space, or "
            "name another disk."
        )


def _sweep(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.partial-*"):
        try:
            with (left / LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            continue  # a run that is alive
        except FileNotFoundError:
            shutil.rmtree(left, ignore_errors=True)


# --- the contents -----------------------------------------------------------------------------------------------------


def kept_pieces(source: Source, plan: PruningPlan, folded: Folded) -> list[list[Piece]]:
    """The output's shards: the source's own, without the dropped layers, in the same order; empty ones left out."""
    shards = []
    for shard in source.weights.shards:
        pieces = []
        for name, entry in shard.entries.items():
            match = LAYER_KEY.match(name)
            if match is None:
                if not _tied_copy(source, name):
                    pieces.append(Piece(name, entry))
            elif (old := int(match[2])) in plan.new_index:
                renamed = f"{match[1]}{plan.new_index[old]}.{match[3]}"
                pieces.append(Piece(renamed, entry, folded.get((old, match[3]))))
        if pieces:
            shards.append(pieces)
    return shards


def _tied_copy(source: Source, name: str) -> bool:
    """A head that the configuration ties to the embeddings, and that the source stores a second time all the same."""
    if not name.endswith("lm_head.weight") or not getattr(source.config, "tie_word_embeddings", False):
        return False
    embeddings = [n for n in source.weights.entries if n.endswith("embed_tokens.weight") and "vision" not in n]
    if len(embeddings) != 1:
        return False
    return bool((source.weights.read(name) == source.weights.read(embeddings[0])).all())


def write_checkpoint(
    source: Source,
    plan: PruningPlan,
    folded: Folded,
    folder: Path,
    advance: Callable[[int], object] = lambda done: None,
) -> None:
    """Weights, configuration and everything that goes along, into an existing folder; what stays behind is logged."""
    write_weights(source, plan, folded, folder, advance)
    # Without the mention of code, which stays behind: the plain class is what the checkpoint is verified with.
    config = without_auto_map(pruned_config(source.raw_config, source.config, plan))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    carry_companions(source, folder)


def carry_companions(source: Source, folder: Path) -> None:
    """Copy processor, tokenizer, templates, generation settings and licence texts; say what stays behind."""
    beside = source.beside_weights
    copy_companions(source.folder, beside.kept, folder)
    ours = "router" in source.raw_config  # then its modeling file is the package's, which a new router brings along
    if line := left_behind(name for name in beside.left if not (ours and name.endswith(".py"))):
        logger.warning("%s: %s", source.folder.name, line)


def write_weights(
    source: Source,
    plan: PruningPlan,
    folded: Folded,
    folder: Path,
    advance: Callable[[int], object] = lambda done: None,
) -> None:
    """The safetensors files, and the index where there is more than one."""
    shards = kept_pieces(source, plan, folded)
    metadata = {shard.path: shard.metadata for shard in source.weights.shards}
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    parameters = 0
    for number, pieces in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, pieces, metadata[pieces[0].entry.path] or {"format": "pt"}, advance)
        index["weight_map"] |= {piece.name: name for piece in pieces}
        index["metadata"]["total_size"] += sum(piece.entry.num_bytes for piece in pieces)
        parameters += sum(piece.entry.num_parameters for piece in pieces)
    index["metadata"]["total_parameters"] = parameters
    if len(shards) > 1:
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """compression.json."""
    replace_json(folder / RECORD, record)


def replace_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file in one step, so that a reader never meets half of it."""
    replace_text(path, json.dumps(data, indent=2) + "\n")


def check_updatable(folder: Path) -> None:
    """Raise InputError, before the work, where a folder's record and card could not be told what is measured."""
    if not folder.is_dir():
        return  # a name on the hub: nothing is written there
    if (folder / RECORD).exists():
        read_record(folder)
    check_written(folder)
