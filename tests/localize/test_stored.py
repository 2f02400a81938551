"""Stored scores: another budget without a forward pass, and only for what they were read from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fixtures.checkpoints import recipe

import exporter
from exporter.checkpoints.files import hashes
from exporter.errors import InputError
from exporter.localize.scores import LayerScores
from exporter.localize.stored import chosen_from, load_scores
from exporter.plan import LayerBudget
from exporter.recipe import Method

pytestmark = pytest.mark.usefixtures("verified_here")
NONE = Method("none")


@pytest.fixture(scope="module")
def saved(tiny, questions, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    exporter.score(recipe(tiny("llava"), questions, localizer=Method("tis")), save=path)
    return path


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.slow
@pytest.mark.parametrize("count", (1, 2, 3))
def test_another_budget_is_what_the_localizer_would_have_chosen(count, saved, tiny, questions, tmp_path, monkeypatch):
    asked = recipe(tiny("llava"), questions, localizer=Method("tis"), fold=NONE, budget=LayerBudget(drop_layers=count))
    ran = exporter.compress(asked, tmp_path / "ran")
    monkeypatch.setattr("exporter.compression.job.load_model", no_model)
    stored = exporter.compress(asked, tmp_path / "stored", scores=saved)
    plans = [json.loads((folder / "compression.json").read_text())["plan"] for folder in (ran, stored)]
    assert plans[0] == plans[1]
    assert hashes(ran) == hashes(stored)


def test_they_need_no_questions_without_a_fold_and_come_again(saved, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.compression.job.load_model", no_model)
    asked = exporter.Recipe(str(tiny("llava")), exporter.recipe.NO_QUESTIONS, LayerBudget(drop_layers=2), fold=NONE)
    small = exporter.compress(asked, tmp_path / "small", scores=str(saved))
    record = json.loads((small / "compression.json").read_text())
    assert record["recipe"]["localizer"] == "tis" and "calibration" not in record["recipe"]
    assert record["calibration"]["samples"] == 6  # those that the scores were read from
    assert exporter.reproduce(small, tmp_path / "again").identical


@pytest.mark.slow
def test_a_fold_takes_them_too(saved, tiny, questions, tmp_path, monkeypatch):
    asked = recipe(tiny("llava"), questions, localizer=Method("tis"), fold=Method("reconstruction"))
    ran = exporter.compress(asked, tmp_path / "ran")
    monkeypatch.setattr("exporter.compression.steps.run_localizer", no_model)
    assert hashes(exporter.compress(asked, tmp_path / "stored", scores=saved)) == hashes(ran)


def of(method: str, drop: tuple[int, ...], saved: Path):
    stored = load_scores(saved)
    scores = dataclasses.replace(stored.scores, method=method, values=(0.1, 0.4, 0.2, 0.3), drop=drop)
    return dataclasses.replace(stored, localizer=method, scores=scores)


def test_what_the_values_do_not_say_is_refused(saved):
    assert chosen_from(of("angular", (1, 2), saved), 2, ()).drop == (1, 2)
    with pytest.raises(InputError, match=r"stored scores are of 2, not 3: score again with --drop-layers 3"):
        chosen_from(of("angular", (1, 2), saved), 3, ())
    assert chosen_from(of("greedy", (3, 1), saved), 1, ()).drop == (3,)
    with pytest.raises(InputError, match=r"greedy removes layers one after the other, and the stored scores are of 2"):
        chosen_from(of("greedy", (3, 1), saved), 3, ())
    best: LayerScores = chosen_from(of("best_of", (3, 2), saved), 1, (1,))
    assert best.drop == (3,) and "another budget" in best.details["ranked"]
    assert chosen_from(of("best_of", (3, 2), saved), 2, ()).drop == (3, 2)


def test_a_mismatch_is_one_sentence(saved, tiny, questions, tmp_path):
    def refused(message: str, path: Path = saved, model: str = "llava", **changes: object) -> None:
        with pytest.raises(InputError, match=message):
            exporter.compress(recipe(tiny(model), questions, fold=NONE, **changes), tmp_path / "no", scores=path)
        assert not (tmp_path / "no").exists()

    refused(r"the scores are of another checkpoint than .*: .* differs from what was scored", model="qwen2_vl")
    refused(r"the scores are by tis, the recipe asks for random", localizer=Method("random"))
    refused(r"read from other questions than these \(6 of .*calibration.jsonl", seed=1)
    refused(r"the recipe names the layers to remove", budget=LayerBudget(layers=(1,)))
    refused(r"there is no file of scores .*: `lvlm-exporter score MODEL --save", tmp_path / "nothing.json")
    damaged = tmp_path / "damaged.json"
    damaged.write_text(saved.read_text().replace('"seed": 0', '"seed": "x"'))
    refused(r"damaged.json is damaged \('seed' is not a whole number", damaged)
    damaged.write_text("[]")
    refused(r"holds no scores", damaged)
    damaged.write_text(json.dumps(json.loads(saved.read_text()) | {"format": 9}))
    refused(r"has format 9, this version reads 1", damaged)
