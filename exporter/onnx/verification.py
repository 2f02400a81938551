"""Are a folder's files still those that were compared with torch when it was exported?"""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.trust import foreign_code, replaced_weights
from ..checkpoints.verification import Verification, compared
from ..clean_room import load_processor
from ..errors import CheckFailed
from .manifest import read_manifest


def verify(folder: Path | str, trust_remote_code: bool = False) -> Verification:
    """Compare every file with the hashes in onnx.json, byte for byte, and load the processor; no GPU is needed.

    Raises: InputError where it is no folder of `lvlm-exporter onnx`, or its manifest is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, whole=False)
    problems = compared(folder, manifest.sha256, "lvlm-exporter onnx CHECKPOINT --out NEW")
    problems += replaced_weights(folder)
    if not trust_remote_code:
        problems += foreign_code(folder)
    problems = list(dict.fromkeys(problems)) or _processor_problems(folder)
    outcome = manifest.outcome
    details = {
        "graphs": len(manifest.files),
        "files": len(manifest.sha256),
        "layers": manifest.layers,
        "equal_tokens": outcome.equal_tokens,
        "tokens": outcome.tokens,
        "max_difference": max(difference.max for difference in outcome.outputs.values()),
    }
    return Verification(folder, tuple(problems), details)


def _processor_problems(folder: Path) -> list[str]:
    try:
        load_processor(folder)
    except Exception as error:  # whatever transformers and tokenizers raise for files that are none of theirs
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return [f"its processor does not load: {reason}"]
    return []


def require(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Verification:
    """Verify, or raise CheckFailed; the device does not matter."""
    result = verify(folder, trust_remote_code)
    if not result.holds:
        raise CheckFailed(f"{folder.name} does not verify: {'; '.join(result.problems)}. Export it again.")
    return result
