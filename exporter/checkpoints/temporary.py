"""Folders and files for the time of a run: each is locked by the run that owns it, and what a killed one left is swept.

A lock of the system goes with its process, however that ends, and holds between containers that share a disk, where
process ids don't. So what is locked is somebody's, and what is not locked is nobody's any more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import InputError, show_as

LOCK = ".lock"
PREFIX = "lvlm-exporter-"
WITHOUT_LOCK_S = 24 * 3600  # after which a folder without a lock is nobody's: earlier releases made some
_held: list[IO[str]] = []  # locks of what is kept as long as the process lives


@contextlib.contextmanager
def temporary_folder(kind: str, stands_for: object) -> Iterator[Path]:
    """Give a folder in the system's place for temporary files, removed at the end of the block.

    Args:
        stands_for: what messages name in its place.
    """
    sweep_temporary()
    folder, lock = locked_folder(f"{PREFIX}{kind}-", Path(tempfile.gettempdir()))
    show_as(folder, stands_for)
    try:
        yield folder
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def folder_of_process(kind: str, stands_for: object) -> Path:
    """Return a folder as `temporary_folder` gives, removed when the process ends."""
    sweep_temporary()
    folder, lock = locked_folder(f"{PREFIX}{kind}-", Path(tempfile.gettempdir()))
    _held.append(lock)
    show_as(folder, stands_for)
    atexit.register(_removed_by, os.getpid(), folder)
    return folder


def _removed_by(owner: int, folder: Path) -> None:
    """Remove a folder, but not at the end of a fork of the process that owns it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def locked_folder(prefix: str, place: Path) -> tuple[Path, IO[str]]:
    """Make a folder with a lock in it. Returns: the folder, and the open lock; closing it gives the folder up."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            lock = (folder / LOCK).open("w")
        except FileNotFoundError:
            continue  # another run took it for a leftover before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_at(lock, folder / LOCK):
            return folder, lock
        lock.close()


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder that a later run goes on from. Raises: InputError where another run that is alive holds it.

    Args:
        what: such a run does: 'another run is healing'.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{what} in {folder}: wait for it, or name another folder.") from None
        yield


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[IO[bytes]]:
    """Give a file that takes the place of another one in one step, if the block ends well; half of it is never seen."""
    for left in path.parent.glob(f".{glob_escape(path.name)}.*.partial"):
        _remove_unlocked(left, left.unlink)
    while True:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        file = os.fdopen(handle, "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, Path(part)):
            break
        file.close()
    with file:
        try:
            yield file
            file.flush()
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise


def glob_escape(name: str) -> str:
    """Return a name that a glob takes literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def sweep_temporary() -> None:
    """Remove what killed runs have left in the system's place for temporary files."""
    sweep(Path(tempfile.gettempdir()), PREFIX)


def sweep(place: Path, prefix: str) -> None:
    """Remove folders of a prefix that no living run holds."""
    for left in place.glob(f"{glob_escape(prefix)}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        _remove_unlocked(left / LOCK, functools.partial(shutil.rmtree, left, ignore_errors=True))
        with contextlib.suppress(OSError):
            if not (left / LOCK).exists():
                left.rmdir()  # killed before it had a lock; one that holds something stays
        with contextlib.suppress(OSError):
            if not (left / LOCK).exists() and time.time() - left.stat().st_mtime > WITHOUT_LOCK_S:
                shutil.rmtree(left, ignore_errors=True)


def remove_unless_held(folder: Path) -> None:
    """Remove a folder that was held for a later run to go on from, unless another run that is alive holds it now."""
    _remove_unlocked(folder / LOCK, functools.partial(shutil.rmtree, folder, ignore_errors=True))


def _remove_unlocked(lock_file: Path, remove: Callable[[], object]) -> None:
    """Call `remove` unless somebody holds the lock; holds it meanwhile."""
    with contextlib.suppress(OSError), lock_file.open("r+") as lock:  # BlockingIOError: a run that is alive
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove()


def _is_at(file: IO[Any], path: Path) -> bool:
    """Tell whether an open file still lies at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False
