"""Are a folder's graphs still those that were compared with torch when it was exported?"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckFailed, InputError
from ..source import file_hash
from ..verification import Verification
from .manifest import MANIFEST, read_manifest


def verify(folder: Path | str) -> Verification:
    """Every graph file byte for byte the one that the comparison in onnx.json is of: no GPU is needed to say so.

    Raises: InputError where it is no folder of `lvlm-exporter onnx`, or a file is missing.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if missing := [name for name in ("sha256", "validation", "layers") if name not in manifest]:
        raise InputError(f"{folder / MANIFEST} is damaged (it has no '{missing[0]}'): export again.")
    changed = [name for name, digest in manifest["sha256"].items() if file_hash(folder / name) != digest]
    compared = manifest.get("quantized") or manifest["validation"]
    details = {
        "graphs": len(manifest["sha256"]),
        "layers": manifest["layers"],
        "equal_tokens": compared["equal_tokens"],
        "tokens": compared["tokens"],
        "max_difference": max(difference["max"] for difference in compared["outputs"].values()),
    }
    return Verification(
        folder, tuple(f"{name} is not the file that was compared with torch" for name in changed), details
    )


def require(folder: Path, device: str = "cpu") -> Verification:
    """Verify, or raise CheckFailed; the device does not matter."""
    result = verify(folder)
    if not result.holds:
        raise CheckFailed(f"{folder.name} does not verify: {'; '.join(result.problems)}. Export it again.")
    return result
