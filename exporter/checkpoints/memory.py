"""How much memory there is, and what a model takes of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InputError

UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
LOADING = 1.2  # of a model's size, that loading it takes at most
CGROUP = Path("/sys/fs/cgroup")


def parse_size(text: str) -> int:
    """Return the bytes that '12GB' or '800MiB' stand for. Raises: InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"memory '{text[:40]}' is no size like 12GB or 800MiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].upper()])


def available_bytes() -> int:
    """Return the memory that a new process of this machine, or of this container, may take."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = [int(match[1]) * 1024]
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cached = re.search(r"^file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        if limit != "max":
            free.append(int(limit) - int(used) + int(cached[1] if cached else 0))
    except (OSError, ValueError):  # no container, or one of another kind
        pass
    return max(0, min(free))


def bytes_to_load(parameters: int, itemsize: int) -> int:
    """Return what loading a model takes, at most."""
    return round(LOADING * parameters * itemsize)


def why_too_large(parameters: int, itemsize: int, memory: str | None = None) -> str:
    """Return why a model can't be loaded whole: the rest of 'it was not loaded: '; empty where it can.

    Args:
        memory: what the user allows, '12GB'; None: all that is free.
    """
    needed, free = bytes_to_load(parameters, itemsize), available_bytes()
    allowed = free if memory is None else min(free, parse_size(memory))
    if needed <= allowed:
        return ""
    whose = "is free" if memory is None or allowed == free else "is allowed (--memory)"
    return f"that takes {needed / 1e9:.1f} GB, and {allowed / 1e9:.1f} GB {whose}"
