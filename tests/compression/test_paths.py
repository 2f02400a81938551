"""Paths may be text or Path in every entry point of the Python API."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import exporter
from exporter.comparison.grid import load_grid
from exporter.comparison.routes import RouteTables, Row
from exporter.onnx import ExportOptions
from exporter.outcome.goal import SearchRecipe
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Method, TaskData

QUICK = exporter.BenchOptions(device="cpu", new_tokens=1, rounds=2)
ENTRY_POINTS = [
    getattr(exporter, name)
    for name in exporter.__all__
    if not name[0].isupper() and name not in ("onnx", "__version__")
] + [exporter.onnx.export, exporter.onnx.load]
PATHS = frozenset(  # names of parameters that are paths, wherever they stand
    "calibration folder healed model out path paths predictions reference save scores task vision_tower".split()
)
QUESTIONS = CalibrationData("questions.jsonl")
TASK = TaskData("task.jsonl")


@pytest.fixture(scope="module")
def task(questions, tmp_path_factory) -> Path:
    lines = [json.loads(line) | {"answer": "red"} for line in questions.read_text().splitlines()]
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    lines = [line | {"image": str(questions.parent / line["image"])} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.clean_process
@pytest.mark.parametrize("kind", [str, Path])
def test_every_entry_point_takes_text_and_paths(kind, tiny, questions, task, tmp_path, unverified, monkeypatch):
    monkeypatch.setattr("exporter.routing.with_router.require", lambda *_: None)
    model = shutil.copytree(tiny("llava"), tmp_path / "model")
    data = CalibrationData(kind(questions), samples=2)
    recipe = exporter.Recipe(kind(model), data, LayerBudget(layers=(1,)), fold=Method("none"))
    assert recipe.model == str(model) and recipe.calibration.data == str(questions)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe.to_data()))
    assert exporter.load_recipe(kind(tmp_path / "my.yaml")) == recipe

    small = exporter.compress(recipe, kind(tmp_path / "small"))
    assert exporter.score(recipe)[1].drop == (1,)
    again = exporter.reproduce(kind(small), kind(tmp_path / "again"), model=kind(model), calibration=kind(questions))
    assert again.identical
    assert exporter.card(kind(small)).name == "README.md"
    verified = exporter.verify(kind(small))
    assert verified.folder == small

    router = exporter.RouterRecipe(CalibrationData(kind(questions), samples=None), steps=1, batch_size=2)
    monkeypatch.setattr("exporter.routing.with_router.routed_reference", lambda *_: {"tokens": [5], "margins": [0.5]})
    assert exporter.route(kind(small), router, kind(tmp_path / "routed")) == tmp_path / "routed"

    options = exporter.RunOptions(batch_size=4)
    kept = kind(tmp_path / "kept.jsonl")
    done = exporter.evaluate(
        kind(small), kind(task), reference=kind(model), samples=4, max_new_tokens=2, predictions=kept, options=options
    )  # fmt: skip
    assert len(done.models) == 2 and Path(kept).exists()
    timed = exporter.bench(kind(small), reference=kind(model), workload=exporter.Workload(kind(task)), options=QUICK)
    assert len(timed.models) == 2

    rows = {"model": str(model), "calibration": {"data": str(questions), "samples": 2}, "task": str(task),
            "task_samples": 2, "localizers": ["last"], "folds": ["none"], "drop_layers": [1]}  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(rows))
    grid = load_grid(kind(tmp_path / "grid.yaml"))
    assert grid.task.data == str(task)
    assert exporter.compare(grid, kind(tmp_path / "comparison"), options).out == tmp_path / "comparison"
    assert exporter.onnx.ExportOptions(calibration=kind(questions)).calibration == str(questions)


@pytest.mark.parametrize("function", ENTRY_POINTS, ids=lambda function: function.__name__)
def test_entry_points_take_text_and_paths(function):
    for parameter in inspect.signature(function).parameters.values():
        kinds = set(re.findall(r"\w+", str(parameter.annotation)))
        assert ("Path" in kinds) <= ("str" in kinds), parameter
        if parameter.name in PATHS:
            assert {"Path", "str"} <= kinds, parameter


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: CalibrationData(path), "data"),
        (lambda path: TaskData(path), "data"),
        (lambda path: exporter.HealRecipe(teacher=path), "teacher"),
        (lambda path: exporter.Recipe(path, QUESTIONS, LayerBudget(drop_layers=1)), "model"),
        (lambda path: exporter.Workload(task=path), "task"),
        (lambda path: ExportOptions(calibration=path), "calibration"),
        (lambda path: SearchRecipe(path, QUESTIONS, TASK), "model"),
        (
            lambda path: exporter.Grid(path, QUESTIONS, TASK, (Method("tis"),), (Method("none"),), drop_layers=(1,)),
            "model",
        ),
        (lambda path: RouteTables(path, TASK, (Row("a"),), ()), "model"),
        (lambda path: RouteTables("model", TASK, (Row("a"),), (), calibration=path), "calibration"),
    ],
)
def test_records_keep_paths_as_text(make: Any, name: str):
    kept = getattr(make(Path("folder/name")), name)
    assert kept == getattr(make("folder/name"), name) == "folder/name"
