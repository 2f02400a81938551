"""The state that a training run goes on from after it was broken off, and its curve."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.temporary import file_beside
from ..errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Hold the parts of a training run that have a state, under the fingerprint of all that the run depends on."""

    parts: dict[str, Any]  # what learns, optimizer, schedule: whatever has state_dict and load_state_dict
    fingerprint: str
    curve: list[dict[str, float]] = field(default_factory=list)

    def note(self, step: int, loss: float, what: str) -> None:
        """Add a point to the curve. Raises: InputError for a loss that is no finite number."""
        if not math.isfinite(loss):
            raise InputError(f"{what} is {loss} at step {step}: try --dtype float32.")
        self.curve.append({"step": step, "loss": round(loss, 6)})

    def load(self, path: Path | None) -> int:
        """Return the step to begin at: 0 where there is no state, where it is another run's, or where it is damaged."""
        if path is None or not path.exists():
            return 0
        if not path.is_file():
            raise InputError(f"{path} is no file, and a run keeps its state there: move it away.")
        before = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}
        try:
            saved = torch.load(path, weights_only=True)
            if saved["fingerprint"] != self.fingerprint:
                return 0
            curve, step = list(saved["curve"]), int(saved["step"])
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except Exception as error:  # torch.load and load_state_dict raise dozens of types for damaged files
            logger.warning("%s is damaged (%s): training begins anew", path, type(error).__name__)
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            return 0
        self.curve = curve
        return step

    def save(self, path: Path, step: int) -> None:
        """Keep the state on disk, in one step."""
        saved = {"fingerprint": self.fingerprint, "curve": self.curve, "step": step}
        saved |= {name: part.state_dict() for name, part in self.parts.items()}
        with file_beside(path) as file:
            torch.save(saved, file)
