"""Several seeds: calibration questions drawn anew, the task's stay; means, spread, and p-values over all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from fixtures.checkpoints import not_verified

from exporter.cli.entry import main
from exporter.comparison.grid import Cell, Comparison, grid_from_data
from exporter.comparison.layers import compare
from exporter.comparison.routes import tables_from_data
from exporter.comparison.seeds import compare_seeds, over_seeds
from exporter.comparison.task_rows import TaskRow
from exporter.comparison.task_rows import over_seeds as tasks_over_seeds
from exporter.compression.steps import fold_job, localize
from exporter.data.batches import make_batches
from exporter.errors import InputError
from exporter.evaluation.scoring import Rate, holm, mcnemar
from exporter.recipe import RunOptions

OPTIONS = RunOptions(batch_size=6)


@pytest.fixture
def grid(tiny, questions, task):
    return {
        "model": str(tiny("llava")), "calibration": {"data": str(questions), "samples": 4}, "task": str(task),
        "task_samples": 8, "localizers": ["random"], "folds": ["none", {"name": "scp", "k": 4}], "drop_layers": [1],
    }  # fmt: skip


@pytest.mark.slow
def test_each_seed_is_the_comparison_of_that_seed(grid, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid | {"seeds": [1, 2, 3]}))
    command = ["compare", str(path), "--out", str(tmp_path / "out"), "--quiet", "--batch-size", "6"]
    assert main([*command, "--report", str(tmp_path / "page"), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "drawn by the seeds 1, 2, 3" in printed and "exact match %" in printed
    alone = compare(grid_from_data(grid | {"seed": 2, "task_seed": 0}), tmp_path / "alone", OPTIONS)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads((tmp_path / "a.json").read_text())
    assert [row["accuracy"][1] for row in results["rows"]] == [cell.accuracy for cell in alone.cells]
    assert [tuple(row["drops"][1]) for row in results["rows"]] == [cell.drop for cell in alone.cells]
    assert len({tuple(drop) for drop in results["rows"][0]["drops"]}) > 1  # the random layers differ by seed
    for row in results["rows"]:
        assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 3)
    assert "over seeds" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.slow
def test_the_task_stays_the_same_and_is_answered_once(grid, tmp_path, monkeypatch):
    asked = []
    place = "exporter.comparison.grid_judge.make_batches"  # of all questions, which the original answers
    monkeypatch.setattr(place, lambda *a: asked.append(1) or make_batches(*a))
    done = compare_seeds(grid_from_data(grid | {"seeds": [1, 2]}), tmp_path / "out", OPTIONS)
    assert len(asked) == 1
    assert {one.original.n for one in done.of_seed} == {8}


@pytest.mark.slow
def test_layers_are_chosen_and_folded_once_for_all_tasks(grid, task, tmp_path, monkeypatch):
    chosen, folded = [], []
    place = "exporter.comparison.grid_runner"
    monkeypatch.setattr(f"{place}.localize", lambda *a: chosen.append(1) or localize(*a))
    monkeypatch.setattr(f"{place}.fold_job", lambda *a, **k: folded.append(1) or fold_job(*a, **k))
    one = str(task)
    del grid["task"], grid["task_samples"]
    tasks = {"even": {"data": one, "types": ["even"]}, "odd": {"data": one, "types": ["odd"]}, "all": one}
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(grid | {"tasks": tasks, "localizers": ["greedy"], "seeds": [1, 2]}))
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--quiet", "--batch-size", "6"]) == 0
    assert len(chosen) == 2 and len(folded) == 4  # a greedy search and two folds a seed, whatever the tasks
    text = (tmp_path / "out" / "table.md").read_text()
    assert " ± " in text and "standard deviation over the seeds 1, 2" in text
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows[1]["by_seed"]["even"]) == 2 and "right" not in rows[1]
    alone = json.loads((tmp_path / "out" / "even" / "seed-2" / "results.json").read_text())["cells"][0]
    assert rows[1]["by_seed"]["even"][1] == alone["accuracy"]


def cell(fold: str, wrong: set[int], n: int = 20) -> Cell:
    share = 1 - len(wrong) / n
    return Cell("tis", fold, (3,), 10, n, share, (0.0, 1.0), share, {}, 0.1, 0.9, tuple(sorted(wrong)))


def comparison(*cells: Cell) -> Comparison:
    best = {1: max(cells, key=lambda one: one.accuracy)}
    return Comparison(Path("out"), Rate(20, 1.0, (0.8, 1.0)), 12, cells, 1.0, 1.0, best)


def test_p_is_the_largest_over_the_seeds_and_corrected_by_holm():
    """Seed 1 tells `none` from `auto` by ten questions, seed 2 by three: what is claimed is what both show."""
    first = comparison(cell("auto", {0}), cell("none", set(range(11))), cell("scp", set(range(8))))
    second = comparison(cell("auto", set()), cell("none", {0, 1, 2}), cell("scp", set(range(9))))
    done = over_seeds(Path("out"), (1, 2), (first, second))
    auto, none, scp = done.rows
    assert auto.p_corrected is None and auto.accuracy == (0.95, 1.0)
    assert none.p_value == mcnemar([True] * 3, [False] * 3)[2] == 0.25
    assert scp.p_value == mcnemar([True] * 7, [False] * 7)[2] == 2 / 2**7
    assert [none.p_corrected, scp.p_corrected] == holm([0.25, 2 / 2**7]) == [0.25, 4 / 2**7]


def test_rows_of_several_tasks_are_tested_on_all_of_their_questions():
    def row(method, even, odd, table="one"):
        right = {"even": tuple(even), "odd": tuple(odd)}
        return TaskRow(table, method, accuracy={k: sum(v) / len(v) for k, v in right.items()}, right=right)

    rows = [TaskRow("one", "original", accuracy={"even": 1.0, "odd": 1.0}), row("a", [1] * 6, [1] * 6),
            row("b", [0] * 3 + [1] * 3, [0] * 3 + [1] * 3), TaskRow("one", "c", reason="not here")]  # fmt: skip
    original, a, b, c = tasks_over_seeds([rows])
    assert original.p_value is None and a.p_value is None and c.p_value is None
    assert b.p_value == b.p_corrected == 2 / 2**6
    again = [*rows[:2], row("b", [1] * 6, [0] + [1] * 5), rows[3]]
    both = tasks_over_seeds([rows, again])
    assert both[2].p_value == 1.0 and both[2].by_seed == {"even": (0.5, 1.0), "odd": (0.5, 5 / 6)}
    assert both[2].accuracy["even"] == 0.75


@pytest.mark.slow
def test_routers_are_trained_for_each_seed(tiny, questions, task, tmp_path, monkeypatch):
    for place in ("exporter.pipeline.require", "exporter.routing.with_router.require"):
        monkeypatch.setattr(place, not_verified)
    recipe = {
        "model": str(tiny("llava")), "calibration": str(questions), "tasks": {"all": str(task)}, "task_samples": 4,
        "routers": {"joint": {"steps": 1, "batch_size": 4}}, "rows": [{"name": "router", "folder": "joint"}],
        "budgets": [{"keep_visual_tokens": 0.5}], "equal": "budget", "seeds": [1, 2],
        "tables": {"one": [{"row": "router", "budget": 0}]},
    }  # fmt: skip
    path, out = tmp_path / "routes.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["compare", str(path), "--out", str(out), "--quiet", "--batch-size", "6"]) == 0
    for seed in (1, 2):
        made = json.loads((out / "routers" / f"seed-{seed}" / "joint" / "compression.json").read_text())
        assert made["recipe"]["router"]["seed"] == seed
    row = json.loads((out / "results.json").read_text())["rows"][1]
    assert len(row["by_seed"]["all"]) == 2


def test_mistakes(grid, tmp_path, capsys):
    for seeds in ([1], [1, 1], [-1, 2], [], "1"):
        with pytest.raises(InputError, match="seeds"):
            grid_from_data(grid | {"seeds": seeds})
    with pytest.raises(InputError, match="leave 'seeds' out"):
        compare(grid_from_data(grid | {"seeds": [1, 2]}), tmp_path / "out")
    routes = {"rows": [{"name": "FastV", "rule": "fastv"}], "budgets": [{"keep_visual_tokens": 0.5}], "seeds": [1, 2]}
    assert tables_from_data({"model": grid["model"], "task": grid["task"], **routes}).seeds == (1, 2)
    path = tmp_path / "routes.yaml"
    path.write_text(yaml.safe_dump({"model": grid["model"], "task": grid["task"], **routes}))
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "with 'tasks' and 'routers'" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(grid | {"seeds": [1, 2], "calibration": "nowhere.jsonl"}))
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert not (tmp_path / "out").exists()
