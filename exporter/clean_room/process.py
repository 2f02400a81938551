"""Start a check in a process of its own, and keep `exporter` out of that process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_check(check: str, *arguments: str, doing: str) -> dict[str, Any]:
    """Run `python -P exporter/clean_room CHECK ARGUMENTS…` and return its report, {"problems": [...], ...}.

    A process that fails is a problem too. Copies that transformers makes of a folder's modeling files go to a place
    that nobody else uses.

    Args:
        doing: what the process is for, as a message names it: "loading it".
    """
    with tempfile.TemporaryDirectory(prefix="lvlm-exporter-modules-") as modules:
        alone = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "HF_MODULES_CACHE": modules}
        ran = subprocess.run(
            [sys.executable, "-P", str(HERE), check, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | alone,
            cwd="/",
            check=False,
            stdin=subprocess.DEVNULL,
        )
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        reason = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return {"problems": [f"{doing} in a clean process failed: {reason}"]}
    report: dict[str, Any] = json.loads(lines[-1])
    return report


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
