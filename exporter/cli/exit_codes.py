"""From errors to one sentence and an exit code: 0 done, 1 a check did not hold, 2 wrong input, 130 interrupted."""

from __future__ import annotations

import sys

from .. import ranks
from ..errors import printable, shown

LONGEST = 1200  # characters of a message


def complain(message: str, code: int) -> int:
    """Say why the run has ended, unless another process does. Returns: the exit code."""
    if ranks.is_silent():
        return code
    text = printable(shown(message))
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."  # of a file that says things of any length
    print(f"lvlm-exporter: {text}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory was too little: Python's, a GPU's by torch, or the host's by torch, which has no class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def reason_of(error: Exception) -> str | None:
    import errno

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; nothing was kept."
    if isinstance(error, ValueError) and "features and image tokens do not match" in str(error):
        return f"processor and config.json do not fit each other, copy both from the base model: {error}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if _is_out_of_memory(error):
        return "out of memory: lower --batch-size, or give --memory so that the model is streamed from disk."
    return None
