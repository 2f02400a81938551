"""The main job on the model that ships with the repository: trained, so that accuracy means something.

Figures here are lower bounds on a part of the test questions, to notice damage; `make demo` measures all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.checkpoints.config_file import load_config
from exporter.checkpoints.json_file import read_json
from exporter.checkpoints.source import open_source
from exporter.checkpoints.verification import verify
from exporter.clean_room import load_processor
from exporter.data.batches import make_batches
from exporter.data.calibration import load_calibration
from exporter.evaluation.evaluate import evaluate
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RunOptions

QUESTIONS = 180  # of the test split
OPTIONS = RunOptions(batch_size=32)


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory) -> Path:
    """A quarter of the layers gone, by the defaults."""
    recipe = Recipe(
        str(digits / "model"), CalibrationData(str(digits / "data" / "calibration.jsonl")), LayerBudget(drop_ratio=0.25)
    )
    return compress(recipe, tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="module")
def judged(digits, small):
    return evaluate(
        [small], digits / "data" / "test.jsonl", reference=str(digits / "model"), samples=QUESTIONS, options=OPTIONS
    )


def test_it_is_what_it_says(digits):
    source = open_source(str(digits / "model"))
    assert source.config.model_type == "llava_next"
    assert source.num_layers == 12
    assert sum(path.stat().st_size for path in (digits / "model").iterdir()) <= 16e6


def test_the_number_of_visual_tokens_varies(digits):
    samples = load_calibration(str(digits / "data" / "calibration.jsonl"), samples=200).samples
    config = load_config(digits / "model", read_json(digits / "model" / "config.json"))
    processor = load_processor(digits / "model")
    counts = {int(b.is_visual.sum()) for b in make_batches(samples, processor, config, 1)}
    assert len(counts) >= 8
    assert min(counts) >= 64
    assert max(counts) <= 200


def test_no_digit_of_the_test_set_is_in_the_calibration_set(digits):
    images = {
        split: {(digits / "data" / json.loads(line)["image"]).read_bytes() for line in lines}
        for split in ("calibration", "test")
        for lines in [(digits / "data" / f"{split}.jsonl").read_text().splitlines()]
    }
    assert not images["calibration"] & images["test"]


def test_full_and_compressed_model_answer_held_out_questions(judged):
    full, small = judged.models
    assert full.accuracy >= 0.92
    assert small.accuracy >= 0.95 * full.accuracy
    assert small.agreement >= 0.9
    assert set(small.by_type) == {
        "count",
        "color",
        "digit",
        "where",
        "exists",
        "left",
        "largest",
        "background",
        "describe",
    }


def test_the_card_tells_what_was_measured(judged, small):
    text = (small / "README.md").read_text()
    assert f"{100 * judged.models[1].accuracy:.1f} %" in text
    assert f"n={QUESTIONS}" in text
    record = json.loads((small / "compression.json").read_text())
    assert record["evaluations"][0]["accuracy"] == judged.models[1].accuracy


def test_batch_of_1_and_of_32_answer_alike_and_a_second_time_too(digits, small, judged):
    def answers(batch_size: int) -> tuple[str, ...]:
        options = RunOptions(batch_size=batch_size)
        task = digits / "data" / "test.jsonl"
        return evaluate([small], task, samples=48, options=options, update_cards=False).models[0].answers

    assert answers(1) == answers(32) == answers(32)


def test_it_verifies(small):
    assert verify(small).holds  # built again bit for bit: tests/compression, on a model that takes no minute
