"""Output that appears whole or not at all: staged beside its target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, show_as
from .files import real_target, umask
from .temporary import LOCK, locked_folder, sweep

SPARE_BYTES = 64 << 20  # for everything that is not weights


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder beside the target that becomes the target if the block ends well, and is removed if it does not.

    A target that is a link is made where the link leads.
    """
    target = real_target(target)
    with staging_directory(target) as stage:
        yield stage
        stage.chmod(0o777 & ~umask())
        check_target(target)
        stage.rename(target)
        (target / LOCK).unlink()  # only now: a stage without a lock is one to sweep


@contextlib.contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Give a folder beside the target for work in progress, removed at the end.

    What a killed run has left is removed by the next one.
    """
    target = real_target(target)
    check_target(target)
    prefix = f".{target.name}.partial-"
    sweep(target.parent, prefix)
    directory, lock = locked_folder(prefix, target.parent)
    show_as(directory, target)
    try:
        yield directory
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(
                f"the disk of {target.parent} is full; nothing was kept of {target.name}. Free some space."
            ) from error
        raise
    finally:
        lock.close()
        shutil.rmtree(directory, ignore_errors=True)


def stage_name(folder: Path) -> str:
    """Return the name that a folder has, or will have when it is done: no message names a temporary folder."""
    return re.sub(r"^\.(.+)\.partial-[^.]*$", r"\1", folder.absolute().name)


def check_target(target: Path) -> None:
    """Raise InputError if the folder can't be made. An empty folder may be there already, or a link to one."""
    named, target = target, real_target(target)
    if os.path.ismount(target):
        raise InputError(f"{named} is a mount point, which cannot be replaced: name a folder inside it.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{named} exists already: name another folder, or remove it.")
    parent = target.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is no folder: make it first, {target.name} is to be written there.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is not writable: {target.name} can't be made there.")


def check_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(real_target(target).parent).free
    if free < num_bytes + SPARE_BYTES:
        raise InputError(
            f"{target.name} needs {num_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free. Free some space, or "
            "name another disk."
        )
