"""Results are never lost: a place for them is checked before the work, and what can't be written is printed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.cli.entry import main
from exporter.cli.outputs import save_json


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work must not begin."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    kinds = "publishing.folder_kinds"
    for name in (
        "evaluation.evaluate.evaluate",
        "pipeline.score",
        "benchmark.bench.bench",
        f"{kinds}.card",
        f"{kinds}.verify",
    ):
        monkeypatch.setattr(f"exporter.{name}", begun)


COMMANDS = {
    "score": ["score", "model", "--calibration", "c.jsonl"],
    "evaluate": ["evaluate", "model", "--task", "task.jsonl"],
    "bench": ["bench", "model"],
    "card": ["card", "model"],
    "verify": ["verify", "model"],
}


@pytest.mark.parametrize(
    ("name", "flag"), [*((name, "json") for name in COMMANDS), ("score", "plot"), ("evaluate", "predictions")]
)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none/out.png", "none is no folder: make it first, or name another file"),
        (".", "is a folder: name a file"),
        ("file/out.png", "file is no folder"),
        ("/proc/out.png", "can't be written"),
    ],
)
def test_a_place_for_results_is_checked_first(name, flag, place, message, early, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main([*COMMANDS[name], f"--{flag}", place]) == 2
    error = capsys.readouterr().err
    assert f"--{flag} {place}" in error and message in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["file"]


def test_a_result_takes_no_other_file_s_place(early, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("task.jsonl").write_text("{}")
    Path("link").symlink_to("task.jsonl")
    for place in ("task.jsonl", str(tmp_path / "task.jsonl"), "link"):
        assert main([*COMMANDS["evaluate"], "--json", place]) == 2
        assert f"--json {place} is the file of --task too: name another one" in capsys.readouterr().err
    assert main([*COMMANDS["evaluate"], "--json", "a", "--predictions", "a"]) == 2
    assert "--predictions a is the file of --json too" in capsys.readouterr().err


def test_a_file_that_is_not_writable(early, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main([*COMMANDS["card"], "--json", str(tmp_path / "out")]) == 2
    assert "is there already and not writable" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_what_can_not_be_written_at_the_end_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("exporter.publishing.folder_kinds.card", lambda folder: Path("README.md"))
    assert main(["card", "model", "--json", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert "/dev/full can't be written (No space left on device)" in err
    data, end = json.JSONDecoder().raw_decode(out)
    assert data == {"path": "README.md"} and out[end:] == "\n\nREADME.md\n"


def test_a_file_of_an_earlier_run_is_not_cut_short(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    assert save_json(path, {"a": 1}) and json.loads(path.read_text()) == {"a": 1}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not save_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"a": 1} and json.loads(capsys.readouterr().out) == {"b": 2}
    assert os.listdir(tmp_path) == ["out.json"]


def test_devices_and_links_are_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert save_json(tmp_path / "link", {}) and (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "{}\n"
    assert save_json(Path("/dev/null"), {}) and not Path("/dev/null").is_file()


def test_a_plot_that_can_not_be_drawn_costs_no_result(tiny, questions, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporter.cards.plots.plot_scores", full)
    command = ["score", str(tiny("llava")), "--calibration", str(questions), "--samples", "2", "--localizer", "last"]
    out = tmp_path / "out.json"
    assert main([*command, "--quiet", "--plot", str(tmp_path / "a.png"), "--json", str(out)]) == 2
    printed, err = capsys.readouterr()
    assert "a.png can't be written (No space left on device)" in err and "drawn" not in printed
    assert "redundancy (last)" in printed and json.loads(out.read_text())["method"] == "last"


def test_answers_that_can_not_be_kept_are_judged_all_the_same(tiny, questions, tmp_path, monkeypatch, caplog):
    from exporter.evaluation.evaluate import evaluate

    lines = [json.loads(line) | {"answer": "x"} for line in questions.read_text().splitlines()]
    task = tmp_path / "task.jsonl"
    task.write_text(
        "".join(json.dumps(line | {"image": str(questions.parent / line["image"])}) + "\n" for line in lines)
    )
    kept = tmp_path / "kept.jsonl"
    opened = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any):
        if path == kept and "a" in mode:
            raise OSError(28, "No space left on device")
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    model = shutil.copytree(tiny("llava"), tmp_path / "model")
    done = evaluate([model], task, samples=4, max_new_tokens=2, predictions=kept)
    assert done.models[0].n == 4 and "entries are no longer kept" in caplog.text
