"""A method is one file and one row: a dummy of each kind is added as CONTRIBUTING says, and runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from fixtures.checkpoints import not_verified

from exporter.cards.plots import plot_scores
from exporter.cli.entry import main
from exporter.comparison.grid import grid_from_data
from exporter.compression.estimate import forward_passes
from exporter.compression.job import prepare
from exporter.errors import InputError
from exporter.localize.scores import LayerScores
from exporter.methods import FOLDS, LOCALIZERS, LOSSES, Fold, Localizer, RouterLoss, resolve
from exporter.pipeline import route
from exporter.recipe import Method, RunOptions, recipe_from_data, router_from_data
from exporter.routing.training.losses import check_loss

ROOT = Path(__file__).parent.parent.parent
DUMMIES = """
from exporter.localize.scores import LayerScores, most_redundant


def middle(job, count, protect, *, power: float = 1.0):
    half = (job.num_layers - 1) / 2
    values = [1 / (1 + abs(layer - half) ** power) for layer in range(job.num_layers)]
    return LayerScores("middle", tuple(values), most_redundant(values, count, protect))


def louder(job, *, by: float = 1.5):
    name = f"{job.decoder.down_proj}.weight"
    return {(kept, name): job.read(kept, name) * by for kept in job.gaps}


def small_logits(batch, generator, *, share: float = 0.5):
    return share * (batch.token_logits.square().mean() + batch.layer_logits.square().mean())
"""


@pytest.fixture
def dummies(tmp_path, monkeypatch):
    """A localizer, a fold and a loss: a file with their functions, and a row each."""
    (tmp_path / "dummy_methods.py").write_text(DUMMIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dummy_methods", raising=False)
    row = Localizer("dummy_methods:middle", title="the middle", link="https://example.org/middle", passes=0.25)
    monkeypatch.setitem(LOCALIZERS, "middle", row)
    monkeypatch.setitem(FOLDS, "louder", Fold("dummy_methods:louder", title="shouting", link="https://example.org/l"))
    monkeypatch.setitem(LOSSES, "small", RouterLoss("dummy_methods:small_logits", title="rest", shares=("share",)))


def test_every_row_names_functions_that_there_are():
    for rows in (LOCALIZERS, FOLDS, LOSSES):
        for row in rows.values():
            assert callable(resolve(row.run))
            assert row.title
            passes = getattr(row, "passes", 0.0)
            assert isinstance(passes, float) or callable(resolve(passes))


def test_the_document_of_methods_is_written_from_the_rows():
    text = runpy.run_path(str(ROOT / "docs" / "write_methods.py"))["text"]()
    assert (ROOT / "docs" / "methods.md").read_text() == text, "run python docs/write_methods.py"


@pytest.mark.usefixtures("dummies", "unverified")
def test_a_new_localizer_and_fold_run_and_are_told(tiny, questions, tmp_path):
    arguments = ["compress", str(tiny("llava")), "--drop-layers", "2", "--calibration", str(questions), "--quiet"]
    arguments += ["--samples", "6", "--localizer", "middle", "--localizer-option", "power=2.0", "--fold", "louder"]
    arguments += ["--out", str(tmp_path / "small")]
    assert main([*arguments, "--dry-run"]) == 0
    assert main(arguments) == 0
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["scores"]["method"] == "middle"
    assert record["plan"]["drop"] == [2, 3]
    assert record["fold"]["tensors"] == ["layer 1's mlp.down_proj.weight"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "[the middle](https://example.org/middle)" in card
    assert "[shouting](https://example.org/l)" in card


@pytest.mark.usefixtures("dummies")
def test_a_new_localizer_has_a_cost_a_plot_and_a_place_in_comparisons(tiny, questions, tmp_path):
    data = {"model": str(tiny("llava")), "calibration": str(questions)}
    recipe = recipe_from_data({**data, "drop_layers": 2, "localizer": "middle", "fold": "none"})
    assert forward_passes(prepare(recipe, RunOptions("cpu", "float32")), 1e9) == pytest.approx(1.25)
    plot_scores(LayerScores("middle", (0.1, 0.2), (1,)), tmp_path / "scores.png")
    grid = grid_from_data(
        {**data, "task": str(questions), "localizers": ["middle"], "folds": ["louder"], "drop_layers": [1]}
    )
    assert grid.localizers[0].name == "middle"


@pytest.mark.usefixtures("dummies")
def test_a_new_loss_trains_a_router(tiny, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.routing.with_router.require", lambda *_: None)
    monkeypatch.setattr("exporter.pipeline.require", not_verified)
    asked = {"data": str(questions), "samples": 8, "answer_tokens": 2}
    router = {"calibration": asked, "steps": 1, "batch_size": 2, "loss": {"name": "small", "share": 0.25}}
    made = route(tiny("llava"), router_from_data(router), tmp_path / "routed", RunOptions("cpu", "float32"))
    record = json.loads((made / "compression.json").read_text())
    assert record["recipe"]["router"]["loss"] == {"name": "small", "share": 0.25}
    with pytest.raises(InputError, match=r"loss 'small': share=1.5 is a share, at most 1"):
        check_loss(Method("small", {"share": 1.5}))
