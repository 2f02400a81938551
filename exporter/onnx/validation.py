"""Does an exported folder say what torch says? Asked in a clean process; the answer goes into the manifest."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..clean_room.process import run_check
from ..errors import CheckFailed


def validate(folder: Path, job: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the differences found, or CheckFailed with the component that is off.

    Args:
        job: source, device, dtype, quantize and opset of the export.
        inputs: batches of questions to compare on beside those that every export is compared on.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="lvlm-exporter-") as place:
        saved = Path(place) / "inputs.pt"
        if inputs:
            torch.save(inputs, saved)
        path = Path(place) / "job.json"
        path.write_text(json.dumps({**job, "folder": str(folder), "inputs": str(saved) if inputs else None}))
        report = run_check("compare-onnx", str(path), doing="comparing it")
    if problems := report.pop("problems"):
        raise CheckFailed(f"the ONNX export differs from the model and was not kept: {'; '.join(problems)}.")
    return report
