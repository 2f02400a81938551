"""The state of a training run on disk."""

from __future__ import annotations

import os

import pytest
import torch

from exporter.errors import InputError
from exporter.models.training_state import TrainingState


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / ".made.training"
    make(path)
    state = TrainingState({"layer": torch.nn.Linear(2, 2)}, "fingerprint")
    with pytest.raises(InputError, match=r"is no file, and a run keeps its state there: move it away\."):
        state.load(path)
    assert path.exists()
