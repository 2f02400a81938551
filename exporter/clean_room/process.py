"""Keep `exporter` out of the process of a check."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


class _Blocked:
    """An import hook that refuses `exporter`, installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "exporter":
            raise ImportError("the clean process must not import exporter")


def block_exporter() -> None:
    """Make every later import of `exporter` fail in this process."""
    sys.meta_path.insert(0, _Blocked())


def load_package(name: str, folder: Path) -> Any:
    """Import a package by its folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package
