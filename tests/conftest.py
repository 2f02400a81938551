"""No network and one thread count for every test; the fixtures that they share are in `tests/fixtures`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest_plugins = [
    "fixtures.checkpoints",
    "fixtures.damage",
    "fixtures.hub",
    "fixtures.onnx_folders",
    "fixtures.routed",
    "fixtures.tasks",
]


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
