"""Several tasks in one table, in the form of the papers': a row a method, a column a task, what is missing by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from fixtures.checkpoints import not_verified

from exporter.cli.entry import main
from exporter.comparison.tasks_recipe import TasksRecipe, tasks_from_data
from exporter.comparison.theory import Shape, fastv_tflops
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.recipe import RunOptions, TaskData, from_yaml, task_from_data

PAPERS = Path(__file__).parents[2] / "examples" / "papers"
RUN = ["--quiet", "--batch-size", "6"]


@pytest.fixture
def tasks(task):
    return {"even": {"data": str(task), "types": ["even"]}, "all": str(task)}


@pytest.fixture
def grid(tiny, questions, tasks):
    return {
        "model": str(tiny("llava")), "calibration": {"data": str(questions), "samples": 6}, "tasks": tasks,
        "localizers": ["tis"], "folds": ["none", {"name": "scp", "k": 4}], "drop_layers": [1, 2],
        "speed": {"samples": 1, "rounds": 1, "new_tokens": 2},
        "tables": {"out of reach": [{"row": "another", "reason": "it is not here"}]},
    }  # fmt: skip


@pytest.fixture
def routes(tiny, questions, tasks):
    return {
        "model": str(tiny("llava")), "calibration": str(questions), "tasks": tasks, "task_samples": 4,
        "routers": {"joint": {"steps": 1, "batch_size": 4, "loss": {"name": "preference", "actions": 2}}},
        "rows": [{"name": "router", "folder": "joint"}, {"name": "FastV", "rule": "fastv"}],
        "budgets": [{"keep_visual_tokens": 0.5, "keep_layers": 5}, {"keep_visual_tokens": 15}],
        "equal": "budget",
        "tables": {
            "one": [{"row": "router", "budget": 0}, {"row": "FastV", "budget": 1, "name": "a rule"}],
            "two": [{"row": "router", "budget": 0}, {"row": "another", "reason": "it is not here"}],
        },
    }  # fmt: skip


def run(data, tmp_path, *more):
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return main(["compare", str(path), "--out", str(tmp_path / "out"), *RUN, *more])


@pytest.mark.slow
def test_layers_on_two_tasks(grid, task, tmp_path, capsys):
    assert run(grid, tmp_path, "--report", str(tmp_path / "page")) == 0
    printed = capsys.readouterr().out
    assert "samples/s" in printed and "– it is not here" in printed and "tis + scp k=4" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    original, first = results["rows"][:2]
    both = evaluate([grid["model"]], task, options=RunOptions(batch_size=6), update_cards=False).models[0]
    assert original["accuracy"]["all"] == both.accuracy
    assert (first["method"], first["layers"]) == ("tis + none", original["layers"] - 1)
    assert first["tflops"] == pytest.approx(original["tflops"] * first["layers"] / original["layers"])
    assert first["parameters"] < original["parameters"] and first["speed"][0] > 0
    assert (tmp_path / "out" / "accuracy.png").stat().st_size and (tmp_path / "page" / "report.html").stat().st_size
    alone = json.loads((tmp_path / "out" / "even" / "results.json").read_text())["cells"][0]
    assert alone["accuracy"] == first["accuracy"]["even"] and alone["n"] < both.n == 12


@pytest.mark.slow
def test_routers_are_trained_and_stand_beside_rules(routes, tmp_path, capsys, monkeypatch):
    for place in ("exporter.pipeline.require", "exporter.routing.with_router.require"):
        monkeypatch.setattr(place, not_verified)  # `route` is tested elsewhere
    assert run(routes, tmp_path) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["table"], row["method"]): row for row in results["rows"]}
    assert list(rows) == [("one", "original"), ("one", "router"), ("one", "a rule"),
                          ("two", "original"), ("two", "router"), ("two", "another")]  # fmt: skip
    assert rows["two", "another"]["reason"] == "it is not here"
    assert rows["one", "router"]["layers"] == 5 and rows["one", "router"]["visual_tokens"] == 0.5
    assert rows["one", "a rule"]["visual_tokens"] == 15 / 25  # a count, told as a share of what the prompts have
    assert rows["one", "router"]["flops_share"] < rows["one", "a rule"]["flops_share"] < 1
    assert 0 < rows["one", "router"]["tflops"] < rows["one", "a rule"]["tflops"] < rows["one", "original"]["tflops"]
    router = tmp_path / "out" / "routers" / "joint" / "model.safetensors"
    before = router.stat().st_mtime_ns
    assert run(routes, tmp_path) == 0 and router.stat().st_mtime_ns == before  # goes on from what is there
    routes["routers"]["joint"]["steps"] = 2
    assert run(routes, tmp_path) == 2
    assert "a router that was trained otherwise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "q.jsonl"}, "'task' or 'tasks', not both"),
        ({"tasks": []}, "tasks must be a mapping"),
        ({"tasks": {"../a": "q"}}, r"is called '\.\./a'"),
        ({"tables": {"one": []}}, "must be a list of lines"),
        ({"tables": {"one": [{"row": "FastW", "budget": 0}]}}, "there is no row 'FastW': did you mean 'FastV'"),
        ({"tables": {"one": [{"row": "FastV", "budget": 7}]}}, "budget 7: give a number from 0 to 1"),
        ({"tables": None}, "tables must be a mapping"),
        ({"budgets": [{"flops": 0.5}, {"keep_layers": 5}]}, "flops and quality are for routers alone"),
        ({"speed": True}, "speed is timed for fewer layers"),
        ({"routers": {"joint": {"step": 3}}}, "did you mean 'steps'"),
    ],
)
def test_mistakes(routes, change, sentence):
    with pytest.raises(InputError, match=sentence):
        tasks_from_data(routes | change)


def test_mistakes_in_a_grid(grid):
    with pytest.raises(InputError, match="rounds=0: a whole number"):
        tasks_from_data(grid | {"speed": {"rounds": 0}})
    with pytest.raises(InputError, match="no 'routers'"):
        tasks_from_data(grid | {"routers": {"a": True}})
    with pytest.raises(InputError, match="types must be a list of texts"):
        task_from_data({"data": "q", "types": "even"})
    assert task_from_data({"data": "q", "types": ["even"]}) == TaskData("q", types=("even",))


def test_a_type_that_no_question_has(grid, tmp_path, capsys):
    grid["tasks"]["even"]["types"] = ["odd", "prime"]
    assert run(grid, tmp_path) == 2
    assert "no question is of type 'prime'; there are even, odd." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_formula_is_that_of_fastv():
    """LLaVA-1.5-7B's layer with 576 tokens: 4 n d^2 + 2 n^2 d + 2 n d m."""
    shape = Shape(layers=32, hidden=4096, intermediate=11008, tokens=576, visual=576)
    layer = 4 * 576 * 4096**2 + 2 * 576**2 * 4096 + 2 * 576 * 4096 * 11008
    assert fastv_tflops(shape, 32) == pytest.approx(32 * layer / 1e12)
    few = 4 * 144 * 4096**2 + 2 * 144**2 * 4096 + 2 * 144 * 4096 * 11008
    assert fastv_tflops(shape, 28, 0.25, 2) == pytest.approx((2 * layer + 26 * few) / 1e12)
    assert fastv_tflops(Shape(32, 4096, None, 576, 576), 32) is None


@pytest.mark.parametrize("name", ["short-lvlm.yaml", "par-tables.yaml"])
def test_the_papers_recipes_can_be_read(name):
    read = from_yaml(PAPERS / name, tasks_from_data)
    assert isinstance(read, TasksRecipe) and len(read.tasks) > 1


def test_a_row_of_pars_own_settings_can_be_added():
    """As the papers' README spells it, to the recipe of its tables."""
    (more,) = re.findall(r"```yaml\n(.*?)```", (PAPERS / "README.md").read_text(), flags=re.S)
    added, tables = yaml.safe_load(more), yaml.safe_load((PAPERS / "par-tables.yaml").read_text())
    tables["routers"] |= added["routers"]
    tables["rows"] += added["rows"]
    read = tasks_from_data(tables)
    router = read.routers["as-published"]
    assert (router.read_at, router.loss.options["noise_on"]) == (0, "heads")
