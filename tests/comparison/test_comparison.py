"""The grid: every cell is what compress + evaluate would give, computed together."""

from __future__ import annotations

import json

import pytest
import yaml
from PIL import Image

from exporter.cli.entry import main
from exporter.comparison.cells_file import CellsFile
from exporter.comparison.grid import Cell, Comparison, grid_from_data, load_grid
from exporter.comparison.layers import compare
from exporter.comparison.routes import tables_from_data
from exporter.comparison.zoo import compare_zoo, zoo_from_data, zoo_in_folder
from exporter.data.task import load_task
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.evaluation.scoring import Rate, pareto_front
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Method, Recipe, RunOptions


@pytest.fixture
def grid(tiny, questions, task):
    return {
        "model": str(tiny("llava")),
        "calibration": {"data": str(questions), "samples": 6},
        "task": str(task),
        "localizers": ["tis", "angular", "greedy", "random"],
        "folds": ["none", {"name": "scp", "k": 4}, "least_squares"],
        "drop_layers": [1, 2],
    }


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_cells_are_what_compress_and_evaluate_give(grid, questions, task, tmp_path):
    options = RunOptions(batch_size=6)
    done = compare(grid_from_data(grid), tmp_path / "out", options)
    assert len(done.cells) == 4 * 3 * 2
    cell = next(c for c in done.cells if (c.localizer, c.fold, len(c.drop)) == ("tis", "scp k=4", 2))
    recipe = Recipe(
        grid["model"],
        CalibrationData(str(questions), samples=6),
        LayerBudget(drop_layers=2),
        localizer=Method("tis"),
        fold=Method("scp", {"k": 4}),
    )
    folder = compress(recipe, tmp_path / "small", options)
    alone = evaluate([folder], task, reference=grid["model"], options=options).models
    assert tuple(sorted(cell.drop)) == tuple(json.loads((folder / "compression.json").read_text())["plan"]["drop"])
    assert cell.accuracy == alone[1].accuracy
    assert cell.kl == pytest.approx(alone[1].kl, rel=1e-3)
    assert cell.agreement == pytest.approx(alone[1].agreement)
    assert cell.parameters == alone[1].parameters
    assert done.original.accuracy == alone[0].accuracy
    assert len(cell.wrong) == cell.n - round(cell.accuracy * cell.n)
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["p_value"] for one in data["cells"]] == [done.p_value(one) for one in done.cells]
    assert all(done.p_value(best) == 1 for best in done.best.values())
    for name in ("results.json", "table.md", "accuracy.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.slow
def test_a_broken_off_comparison_goes_on(grid, tmp_path):
    small = grid | {"localizers": ["tis"], "folds": ["none"], "drop_layers": [1, 2]}
    first = compare(grid_from_data(small), tmp_path / "out")
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert compare(grid_from_data(small), tmp_path / "out") == first  # as it was read from its results
    results = tmp_path / "out" / "results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"counts": []}))  # made again from the cells
    assert compare(grid_from_data(small), tmp_path / "out").counts == first.counts
    (tmp_path / "out" / "cells.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (tmp_path / "out" / "results.json").write_text('{"out": ')
    again = compare(grid_from_data(small), tmp_path / "out")
    assert again.cells == first.cells
    with pytest.raises(InputError, match="holds another comparison"):
        compare(grid_from_data(small | {"seed": 1}), tmp_path / "out")


def test_mistakes_in_a_grid(grid, tmp_path):
    def refused(**changes):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (grid | changes).items() if v is not None}))
        with pytest.raises(InputError) as caught:
            load_grid(path)
        return str(caught.value)

    assert "needs 'task'" in refused(task=None)
    assert "did you mean 'folds'" in refused(fold=["scp"])
    assert "localizers must be a list" in refused(localizers="tis")
    assert "localizer 'tsi' is not known" in refused(localizers=["tsi"])
    assert "no option 'kk'" in refused(folds=[{"name": "scp", "kk": 1}])
    assert "task has no key 'splits': did you mean 'split'" in refused(task={"data": "q.jsonl", "splits": "test"})
    assert "task needs 'data'" in refused(task={"split": "test"})
    assert "task: split must be text, not 3" in refused(task={"data": "datasets:a/b", "split": 3})
    with pytest.raises(InputError, match="there is no recipe"):
        load_grid(tmp_path / "none.yaml")


def test_tasks_are_named_as_evaluate_takes_them(grid, tmp_path):
    pytest.importorskip("datasets").Dataset.from_dict(
        {"img": [str(tmp_path / "a.png")], "question": ["what?"], "label": ["red"]}
    ).save_to_disk(tmp_path / "saved")
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    saved = {"data": f"datasets:{tmp_path / 'saved'}", "columns": {"image": "img", "answer": "label"}}
    routes = {"model": "m", "task": saved, "rows": [{"name": "a", "rule": "router"}], "budgets": [{"keep_layers": 3}]}
    for read in (grid_from_data(grid | {"task": saved}).task, tables_from_data(routes).task):
        assert load_task(read, None, 0).samples[0].answers == ("red",)
    assert (
        grid_from_data(grid).task.data == str(grid["task"])
        and tables_from_data(routes | {"task": "q"}).task.data == "q"
    )


def test_pareto_front():
    points = [(10, 0.9), (8, 0.9), (8, 0.7), (6, 0.95), (4, 0.1), (5, 0.05)]
    assert pareto_front(points) == [(4, 0.1), (6, 0.95)]


def zoo_folder(folder):
    """Make what `make zoo` leaves, but for the contents: a and b are there, c is not finished."""
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        if name != "c":
            (folder / name / "config.json").touch()
        (folder / f"{name}-data").mkdir()
    return folder


def test_shares_of_the_layers_are_counts_of_each_model(grid, tmp_path):
    asked = {k: v for k, v in grid.items() if k != "drop_layers"} | {"localizers": ["tis"], "folds": ["none"]}
    done = compare(grid_from_data(asked | {"drop_ratios": [0.2, 0.4]}), tmp_path / "out")
    assert done.counts == tuple(round(ratio * done.num_layers) for ratio in (0.2, 0.4))
    assert tuple(len(cell.drop) for cell in done.cells) == done.counts
    with pytest.raises(InputError, match="'drop_layers', or 'drop_ratios'"):
        grid_from_data(asked)
    with pytest.raises(InputError, match=r"drop_ratios: 2: a share of the layers"):
        grid_from_data(asked | {"drop_ratios": [2]})


def test_a_fold_that_a_family_does_not_take_is_left_out_and_said(tiny, grid, tmp_path):
    asked = grid | {"model": str(tiny("gemma3")), "localizers": ["tis"], "folds": ["none", "scp"], "drop_layers": [1]}
    done = compare(grid_from_data(asked), tmp_path / "out")
    assert [cell.fold for cell in done.cells] == ["none"]
    assert "not exact for this family" in done.refused["scp"]


def test_a_zoo_is_one_table_with_means_worst_cases_and_what_was_left_out(grid, tmp_path):
    shared = {key: grid[key] for key in ("localizers", "folds", "drop_layers")}
    own = {key: grid[key] for key in ("model", "calibration", "task")}
    zoo = zoo_from_data(
        {**shared, "models": [own | {"name": "a", "in_view": True}, own | {"name": "b"}, own | {"name": "c"}]}
    )
    kept = {"a": (1.0, 0.9), "b": (0.8, 0.95), "c": (0.9, 0.9)}

    def one(asked, out, options, progress):
        out.mkdir()
        cells = tuple(
            Cell(name, "none", (1, 2), 10, 10, share, (0, 1), share, {}, 0.0, 1.0, ())
            for name, share in zip(("tis", "greedy"), kept[out.name], strict=True)
        )
        return Comparison(out, Rate.of([True]), 10, cells, 1.0, 1.0, {}, 6)

    tables = compare_zoo(zoo, tmp_path / "zoo", compare_one=one)
    first, second = tables["all"]
    assert (first.localizer, first.models, first.worst, first.worst_model) == ("greedy", 3, 0.9, "a")
    assert first.below_best == pytest.approx(10)
    assert (second.worst, second.worst_model) == (0.8, "b")
    assert second.below_best == pytest.approx(15)
    assert second.mean == pytest.approx(0.9)
    assert {row.models for row in tables["left out"]} == {2}
    assert "below the best" in (tmp_path / "zoo" / "table.md").read_text()
    for_all = zoo_in_folder({**shared, "in_view": ["b"], "calibration": {"samples": 6}}, zoo_folder(tmp_path / "all"))
    assert [(m.name, m.in_view, m.grid.calibration.samples) for m in zoo_from_data(for_all)] == [
        ("a", False, 6),
        ("b", True, 6),
    ]
    with pytest.raises(InputError, match="leave out 'task'"):
        zoo_in_folder({**shared, "task": "x"}, tmp_path / "all")
    with pytest.raises(InputError, match="in_view names 'c'"):
        zoo_in_folder({**shared, "in_view": ["c"]}, tmp_path / "all")
    with pytest.raises(InputError, match="holds no model NAME with its questions"):
        zoo_in_folder(shared, tmp_path / "zoo")
    with pytest.raises(InputError, match="two models are called 'a'"):
        zoo_from_data({**shared, "models": [own | {"name": "a"}, own | {"name": "a"}]})
    with pytest.raises(InputError, match="did you mean 'calibration'"):
        zoo_from_data({**shared, "models": [own | {"calibraton": "x"}]})


def test_a_damaged_file_of_cells_is_a_sentence(tmp_path):
    path = tmp_path / "out" / "cells.jsonl"
    first = CellsFile(path, {"seed": 0})
    first.add([{"drop": [1]}, {"drop": [2]}])
    assert CellsFile(path, {"seed": 0}).cells == [{"drop": [1]}, {"drop": [2]}]
    with pytest.raises(InputError, match="holds another comparison"):
        CellsFile(path, {"seed": 1})
    path.write_text(path.read_text() + '{"index": 2}\n')
    with pytest.raises(InputError, match=r"cells.jsonl line 3 is no cell of a comparison: name another file"):
        CellsFile(path, {"seed": 0})


@pytest.mark.slow
def test_results_that_are_not_kept_are_printed_with_a_sentence_and_another_exit_code(grid, tmp_path, capsys):
    small = grid | {"localizers": ["tis"], "folds": ["none"], "drop_layers": [1]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(small))
    command = ["compare", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 0
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "results.json").mkdir()
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "tis + none" in printed.out
    assert printed.err.splitlines()[-1].endswith("does not hold these results: they are printed only.")
