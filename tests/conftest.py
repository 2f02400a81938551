"""No network and one thread for every test; markers; the fixtures that tests share are in `tests/fixtures`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

# Before torch is imported, and for the processes that tests start: workers share the cores, each takes one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tiny_models import ONE_OF_EACH_KIND

from exporter.families import FAMILIES

pytest_plugins = [
    "fixtures.checkpoints",
    "fixtures.damage",
    "fixtures.hub",
    "fixtures.mplug_owl2",
    "fixtures.onnx_folders",
    "fixtures.originals",
    "fixtures.routed",
    "fixtures.tasks",
    "fixtures.videos",
]
# Kinds of graphs beside these: windows in the vision tower with three positions, images of any size.
ONE_OF_EACH_GRAPH = (*ONE_OF_EACH_KIND, "qwen2_5_vl", "mistral3")
# Whoever takes one of these fixtures is as slow as it: it carries the fixture's marker.
MARKER_OF_FIXTURE = {"digits": "reference", "exported": "onnx_export", "routed_graphs": "onnx_export"}


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in set(getattr(item, "fixturenames", ())) & set(MARKER_OF_FIXTURE):
            item.add_marker(MARKER_OF_FIXTURE[fixture])
        call = getattr(item, "callspec", None)
        values = [value for value in call.params.values() if isinstance(value, str)] if call else []
        families = {value for value in values if value in FAMILIES}
        if not families <= set(ONE_OF_EACH_KIND):
            item.add_marker("every_family")
        if item.get_closest_marker("onnx_export") and not families <= set(ONE_OF_EACH_GRAPH):
            item.add_marker("long_tail")
    items.sort(key=lambda item: not item.get_closest_marker("reference"))  # a worker takes whole files: long ones first


_started: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and str(arguments[0]).startswith(sys.prefix):
        _started.append(" ".join(map(str, arguments[1])))


sys.addaudithook(_note)


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of the quick run that starts a Python process, which takes seconds, and does not say so."""
    _started.clear()
    yield
    if "not clean_process" in request.config.getoption("-m") and _started:
        pytest.fail(f"it starts a process, which takes seconds: mark it clean_process. {_started[0][:200]}")
