"""The versions of this package and of what it stands on."""

from __future__ import annotations

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"exporter": __version__, "python": platform.python_version(), **packages}
