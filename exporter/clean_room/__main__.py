"""Run one check, `verify FOLDER DEVICE`, `structure FOLDER` or `compare-onnx JOB.json`; print what it found as JSON."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Load this folder as the package `clean_room`, block `exporter`, and run the check."""
    # Run as a folder, this file's siblings are on the path as top-level modules; they are a package's.
    sys.path[:] = [entry for entry in sys.path if entry != str(HERE)]
    spec = importlib.util.spec_from_file_location("clean_room", HERE / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["clean_room"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    importlib.import_module("clean_room.process").block_exporter()
    check, path, *rest = sys.argv[1:]
    if check == "verify":
        report = importlib.import_module("clean_room.verify_checkpoint").verify(Path(path), *rest)
    elif check == "structure":
        report = importlib.import_module("clean_room.verify_checkpoint").structure(Path(path))
    else:
        report = importlib.import_module("clean_room.compare_onnx").compare(json.loads(Path(path).read_text()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
