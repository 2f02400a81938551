"""The versions of this package and of what it stands on, and the hash of its code."""

from __future__ import annotations

import functools

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"exporter": __version__, "python": platform.python_version(), **packages}


@functools.cache
def code_hash() -> str:
    """Return one hash of all files of this package that are code."""
    import hashlib
    from pathlib import Path

    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()
