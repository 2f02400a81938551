"""Does an exported folder say what torch says? Asked in a clean process; the answer goes into the manifest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import CheckFailed
from . import comparison


def validate(folder: Path, job: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The differences found, or CheckFailed with the component that is off.

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
        report = _in_clean_process(path)
    if problems := report.pop("problems"):
        raise CheckFailed(f"the ONNX export differs from the model and was not kept: {'; '.join(problems)}.")
    return report


def _in_clean_process(job: Path) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-P", comparison.__file__, str(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        cwd="/",
        check=False,
    )
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        reason = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return {"problems": [f"comparing it in a clean process failed: {reason}"]}
    report: dict[str, Any] = json.loads(lines[-1])
    return report
