"""Fixtures: tiny random checkpoints of every family, questions about drawn images. No network, one thread count."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES_HERE, SIZES, build, random_image

QUESTIONS = (
    "what color is the digit?",
    "describe the image.",
    "how many circles are there in the top left corner?",
    "where is the cat?",
    "is there a red square?",
    "what is the number?",
)
FAMILIES = tuple(FAMILIES_HERE)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """tiny('llava') is the folder of that family's checkpoint, made once a session."""
    made: dict[tuple[object, ...], Path] = {}

    def folder(family: str, **options: object) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = build(family, tmp_path_factory.mktemp(family) / "model", **options)
        return made[key]

    return folder


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """compress without the clean process at its end, which takes seconds: for tests of what comes before it."""
    monkeypatch.setattr("exporter.pipeline.require", lambda *_: None)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with a dozen unlabelled questions about images of different sizes."""
    folder = tmp_path_factory.mktemp("questions")
    random = np.random.default_rng(0)
    lines = []
    for index in range(12):
        random_image(random, SIZES[index % len(SIZES)]).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": QUESTIONS[index % len(QUESTIONS)]})
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def digits() -> Path:
    """The reference model's folder, examples/digits."""
    return Path(__file__).parent.parent / "examples" / "digits"


def picture(path: Path, size: tuple[int, int] = (48, 48)) -> Path:
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return path
