"""A task that is kept for a last test: each use is counted beside it, a second one says so, nothing is chosen by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from exporter.cli.entry import main
from exporter.data.calibration import questions_of
from exporter.data.uses import uses_file, uses_of
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.recipe import CalibrationData, RunOptions

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "data"
TOKENS = {"max_new_tokens": 4, "options": RunOptions(batch_size=6), "update_cards": False}


@pytest.fixture
def once(task, tmp_path):
    path = Path(shutil.copy(task, tmp_path / "once.jsonl"))
    (tmp_path / "once.uses.jsonl").touch()
    return path


def uses(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".uses.jsonl").read_text().splitlines()]


def test_the_second_evaluation_says_that_it_is_the_second(once, tiny, tmp_path, capsys, caplog):
    model, page = str(tiny("llava")), tmp_path / "page"
    command = ["evaluate", model, "--task", str(once), "--no-card", "--quiet", "--json", str(tmp_path / "a.json")]
    assert main(command) == 0
    first = json.loads((tmp_path / "a.json").read_text())
    assert first["task_uses"]["earlier"] == [] and "used for the first time" in first["task_uses"]["sentence"]
    assert not caplog.records and "once.jsonl is used for the first time" in capsys.readouterr().out
    (used,) = uses(once)
    assert (used["by"], used["models"], used["questions"]) == ("evaluate", ["model"], 12)
    assert main([*command, "--report", str(page)]) == 0
    sentence = (
        "once.jsonl was used once before (evaluate of model on " + used["date"] + "): it is no fresh test any more"
    )
    second = json.loads((tmp_path / "a.json").read_text())
    assert sentence in second["task_uses"]["sentence"] and second["task_uses"]["earlier"] == [used]
    assert sentence in capsys.readouterr().out and sentence in caplog.text
    assert sentence in (page / "report.html").read_text() and len(uses(once)) == 2


def test_other_tasks_are_not_counted(task, tiny, tmp_path):
    done = evaluate([tiny("llava")], task, **TOKENS)
    assert done.uses is None and "task_uses" not in done.to_data() and uses_file(str(task)) is None
    assert uses_of("datasets:user/name") is None and uses_of("") is None
    (tmp_path / "there.uses.jsonl").touch()
    assert uses_of(str(tmp_path / "there.jsonl")) is None  # no such task


def test_a_broken_off_evaluation_is_no_use(once, tiny, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([tiny("llava")], once, progress=stop, **TOKENS)
    assert uses(once) == []


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [None, [1, 2]])
def test_a_comparison_is_one_use_however_often_it_goes_on(once, tiny, questions, seeds, tmp_path, caplog):
    recipe = {
        "model": str(tiny("llava")), "calibration": {"data": str(questions), "samples": 6},
        "tasks": {"even": {"data": str(once), "types": ["even"]}, "odd": {"data": str(once), "types": ["odd"]}},
        "localizers": ["block_influence"], "folds": ["none"], "drop_layers": [1],
    } | ({} if seeds is None else {"seeds": seeds})  # fmt: skip
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    for _ in range(2):
        assert main(["compare", str(path), "--out", str(out), "--quiet", "--batch-size", "6"]) == 0
    assert [one["by"] for one in uses(once)] == ["compare"] and not caplog.records
    assert "used for the first time" in (out / "table.md").read_text()
    assert main(["compare", str(path), "--out", str(tmp_path / "other"), "--quiet", "--batch-size", "6"]) == 0
    assert "once.jsonl was used once before (compare of model on" in caplog.text and len(uses(once)) == 2
    assert "no fresh test any more" in (tmp_path / "other" / "table.md").read_text()
    results = json.loads((tmp_path / "other" / "results.json").read_text())
    assert set(results["task_uses"]) == {"even", "odd"} and len(results["task_uses"]["odd"]["earlier"]) == 1


def test_nothing_is_calibrated_on_it_or_searched_by_it(once, tiny, questions, tmp_path, capsys):
    with pytest.raises(InputError, match=r"a last test, as once\.uses\.jsonl beside it says, and not for cali"):
        questions_of(CalibrationData(str(once)), 0)
    command = ["search", str(tiny("llava")), "--calibration", str(questions), "--task", str(once), "--speedup", "1.1"]
    assert main([*command, "--out", str(tmp_path / "found"), "--quiet"]) == 2
    assert "not for a search, which chooses by its task" in capsys.readouterr().err
    assert uses(once) == []


def test_a_damaged_record_of_uses(once, tiny):
    once.with_suffix(".uses.jsonl").write_text('{"date": 3}\n')
    with pytest.raises(InputError, match="line 1 does not say who used the questions"):
        evaluate([tiny("llava")], once, **TOKENS)


def test_a_use_that_can_not_be_written_is_said_and_costs_no_result(once, tiny, caplog, monkeypatch):
    real = Path.open

    def refuse(path, *arguments, **more):
        if path.name.endswith(".uses.jsonl") and arguments[:1] == ("a",):
            raise OSError(30, "Read-only file system")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert evaluate([tiny("llava")], once, **TOKENS).models[0].n == 12
    assert "can't be written (Read-only file system): this use is not counted" in caplog.text


def test_many_uses_are_counted_and_the_last_named(once):
    line = {"by": "evaluate", "models": ["a"], "questions": 12, "fingerprint": "f", "run": None}
    text = "".join(json.dumps(line | {"date": f"2026-11-{day:02}"}) + "\n" for day in range(1, 6))
    once.with_suffix(".uses.jsonl").write_text(text)
    said = uses_of(str(once)).sentence
    assert said.startswith("once.jsonl was used 5 times before (the last 3: evaluate of a on 2026-11-03; ")


def test_the_fresh_split_is_counted_and_shares_no_picture_with_the_others():
    assert uses_file(str(DIGITS / "fresh.jsonl")) is not None
    lines = [json.loads(line) for line in (DIGITS / "fresh.jsonl").read_text().splitlines()]
    assert len(lines) == 1200 and len({line["image"] for line in lines}) == 300
    seen = {path.read_bytes() for split in ("calibration", "validation", "test") for path in (DIGITS / split).iterdir()}
    assert not any((DIGITS / line["image"]).read_bytes() in seen for line in lines)
