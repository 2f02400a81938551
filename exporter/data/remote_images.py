"""Images from the web, where the user allows it: each fetched once a run, into a folder that goes with the process."""

from __future__ import annotations

import functools
import hashlib
import urllib.request
from pathlib import Path

from ..checkpoints.temporary import folder_of_process
from ..errors import InputError

TIMEOUT_S = 30
LARGEST_BYTES = 64 << 20
AGENT = "lvlm-exporter (https://pypi.org/project/lvlm-exporter)"


def fetched(address: str) -> bytes:
    """Return what the address holds. Raises InputError."""
    kept = _folder() / hashlib.sha256(address.encode()).hexdigest()
    if not kept.exists():
        kept.write_bytes(_download(address))
    return kept.read_bytes()


def _download(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": AGENT})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(LARGEST_BYTES + 1)
    except Exception as error:  # URLError, HTTPError, timeouts, InvalidURL, and what the transport raises
        raise InputError(f"{address} can't be fetched ({str(error) or type(error).__name__}).") from error
    if len(content) > LARGEST_BYTES:
        raise InputError(f"{address} is larger than {LARGEST_BYTES >> 20} MiB, the most that is fetched for an image.")
    return content


@functools.cache
def _folder() -> Path:
    return folder_of_process("images", "the images that were fetched")
