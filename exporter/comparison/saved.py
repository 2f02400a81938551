"""Results of a comparison on disk: what can't be written is said, and costs nobody the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.files import replace_text

logger = logging.getLogger(__name__)
RESULTS_FILE = "results.json"  # written last: it says that all is there


def write_all(
    out: Path,
    texts: Mapping[str, str],
    pictures: Mapping[str, Callable[[Path], object]],
    data: Any,
    results: str = RESULTS_FILE,
) -> bool:
    """Write tables, pictures and the results into a folder. Returns: False where something could not be written."""
    writes: dict[str, Callable[[Path], object]] = {
        name: lambda path, text=text: replace_text(path, text)  # type: ignore[misc]
        for name, text in texts.items()
    }
    writes |= pictures
    try:
        out.mkdir(exist_ok=True)
        for name, write in writes.items():
            write(out / name)
        replace_text(out / results, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        logger.warning("%s can't be written: %s", error.filename2 or out, error.strerror or error)
        return False
    return True
