"""The state that a training run goes on from after it was broken off, and its curve."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import ranks
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
        """Return the step to begin at: 0 where there is no state, where it is another run's, or where it is damaged.

        Args:
            path: of the first process of a run, which tells the others what is there.
        """
        saved = ranks.from_first(lambda: self._read(path))
        if saved is None:
            return 0
        before = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}
        try:
            curve, step = list(saved["curve"]), int(saved["step"])
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except Exception as error:  # load_state_dict raises dozens of types for damaged files
            _warn_of_damage(path, error)
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            return 0
        self.curve = curve
        return step

    def _read(self, path: Path | None) -> dict[str, Any] | None:
        """Return what a run before has left; None where there is nothing that can be used."""
        if path is None or not path.exists():
            return None
        if not path.is_file():
            raise InputError(f"{path} is no file, and a run keeps its state there: move it away.")
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return saved if saved["fingerprint"] == self.fingerprint else None
        except Exception as error:  # torch.load raises dozens of types for damaged files
            _warn_of_damage(path, error)
            return None

    def save(self, path: Path | None, step: int) -> None:
        """Keep the state on disk, in one step; in the first process of a run."""
        if path is None or not ranks.is_first():
            return
        saved = {"fingerprint": self.fingerprint, "curve": self.curve, "step": step}
        saved |= {name: part.state_dict() for name, part in self.parts.items()}
        with file_beside(path) as file:
            torch.save(saved, file)


def _warn_of_damage(path: Path | None, error: Exception) -> None:
    logger.warning("%s is damaged (%s): training begins anew", path, type(error).__name__)
