"""A compression that was broken off: the next run ends in the same bytes, and does nothing again that was finished."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fixtures.checkpoints import recipe

import exporter
from exporter.checkpoints.files import hashes
from exporter.cli.entry import main
from exporter.compression import steps
from exporter.compression.job import prepare
from exporter.compression.stages import fingerprint_of
from exporter.errors import CheckFailed, InputError
from exporter.models.questions import PORTIONS, Questions
from exporter.plan import LayerBudget
from exporter.recipe import NO_QUESTIONS, CalibrationData, Method, Recipe, RunOptions

STEPS = ("answers", "localize", "fold_gaps", "_reference")  # in their order
KILLED = """
import os, signal, sys
from exporter import compress
from exporter.compression import steps
from exporter.recipe import load_recipe
steps.fold_gaps = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
compress(load_recipe(sys.argv[1]), sys.argv[2])
"""


class MachineWentAwayError(RuntimeError):
    """The machine went away."""


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Count how often each step is computed."""
    counts: Counter = Counter()

    def count(owner, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def counting(*args, **keywords):
            if name != "answers" or args[1]:  # asked for none, it gives none
                counts[name] += 1
            return original(*args, **keywords)

        monkeypatch.setattr(owner, attribute, counting)

    for name in STEPS[1:]:
        count(steps, name, name)
    count(Questions, "_answers_to", "answers")
    return counts


def work(out: Path) -> Path:
    return out.parent / f".{out.name}.compressing"


def record_of(folder: Path) -> dict:
    """Return the record, without what tells how the run went."""
    record = json.loads((folder / "compression.json").read_text())
    for name in ("seconds", "bytes_read"):
        record["measured"].pop(name, None)
    return record


@pytest.fixture(scope="module")
def asked(tiny, questions):
    return recipe(tiny("llava"), questions, localizer=Method("tis"), fold=Method("scp"))


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory) -> Path:
    """What a run that is not broken off makes."""
    from fixtures.checkpoints import without_verification

    with without_verification():
        return exporter.compress(asked, tmp_path_factory.mktemp("whole") / "small")


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("broken_in", ["run_localizer", "fold_gaps", "_reference", "write_checkpoint"])
def test_the_next_run_ends_in_the_same_bytes(broken_in, asked, whole, counted, tmp_path, monkeypatch, caplog):
    out = tmp_path / "small"
    owner = "exporter.pipeline" if broken_in == "write_checkpoint" else "exporter.compression.steps"

    def break_off(*args, **_):
        if broken_in == "run_localizer":  # it has read questions, which were answered for that
            list(args[1].questions.batches("score layers"))
        raise MachineWentAwayError

    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{broken_in}", break_off)
        with pytest.raises(MachineWentAwayError):
            exporter.compress(asked, out)
    assert not out.exists() and work(out).is_dir()
    counted.clear()
    exporter.compress(asked, out)
    assert hashes(out) == hashes(whole) and record_of(out) == record_of(whole)
    finished = {"run_localizer": 1, "fold_gaps": 2, "_reference": 3, "write_checkpoint": 4}[broken_in]
    assert set(counted) == set(STEPS[finished:]), counted
    assert "goes on behind what a run before has finished: answers" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_where_layers_lie_on_disk_guesses_go_on_too(tiny, questions, counted, tmp_path, monkeypatch):
    """What answers are guessed from decides how many tokens a pass takes, and so the last bits of the margins."""
    run = RunOptions(memory="700KB")
    asked = recipe(tiny("llava"), questions, localizer=Method("tis"))
    whole = exporter.compress(asked, tmp_path / "whole", run)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_reference", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exporter.compress(asked, tmp_path / "small", run)
    counted.clear()
    small = exporter.compress(asked, tmp_path / "small", run)
    assert dict(counted) == {"_reference": 1}
    assert hashes(small) == hashes(whole) and record_of(small) == record_of(whole)
    read = [json.loads((made / "compression.json").read_text())["measured"]["bytes_read"] for made in (small, whole)]
    assert read[0] >= read[1] > 0  # those of both runs


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("at", (0, 1))
def test_sets_of_layers_are_judged_once(at, tiny, questions, tmp_path, monkeypatch):
    """By default many sets are judged, then the best few, folded, in two rounds: here one of these is broken off."""
    from exporter.fold.held_out import HeldOut
    from exporter.models.answers import StateError

    data = CalibrationData(str(questions), samples=12)
    asked = Recipe(str(tiny("llava")), data, LayerBudget(drop_layers=2), fold=Method("none"))
    monkeypatch.setitem(PORTIONS, "judge_sets", (0.01, 1))
    whole = exporter.compress(asked, tmp_path / "whole")
    rounds = json.loads((whole / "compression.json").read_text())["scores"]["details"]["rounds"]
    judge = HeldOut.judge
    calls: list[int] = []
    losses: list[str] = []

    def judging(self, variants, *args, **keywords):
        calls.append(len(variants))
        if len(calls) == at + 1 and not losses:
            raise MachineWentAwayError
        return judge(self, variants, *args, **keywords)

    monkeypatch.setattr(HeldOut, "judge", judging)
    with pytest.raises(MachineWentAwayError):
        exporter.compress(asked, tmp_path / "small")
    monkeypatch.setattr(StateError, "of_sets", lambda *_: 1 / 0)
    calls.clear()
    losses.append("are not judged again")
    small = exporter.compress(asked, tmp_path / "small")
    assert calls == [len(entry["sets"]) for entry in rounds][at:]
    assert hashes(small) == hashes(whole) and record_of(small) == record_of(whole)


@pytest.mark.clean_process
def test_a_killed_run_is_gone_on_from(asked, whole, counted, tmp_path, monkeypatch):
    out, path = tmp_path / "small", tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked.to_data()))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(out)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr("exporter.pipeline.require", lambda *_, **__: None)
    monkeypatch.setattr("exporter.pipeline.write_verified", lambda *_: None)
    exporter.compress(asked, out)
    assert set(counted) == {"fold_gaps", "_reference"} and hashes(out) == hashes(whole)


@pytest.fixture
def broken(asked, tmp_path, monkeypatch, unverified) -> Path:
    """The result's place, beside which a broken-off run has left all but the fold."""
    with monkeypatch.context() as patch:
        patch.setattr(steps, "fold_gaps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exporter.compress(asked, tmp_path / "small")
    return tmp_path / "small"


def test_what_another_run_left_is_not_used(broken, tiny, questions, counted, caplog):
    other = recipe(tiny("llava"), questions, localizer=Method("block_influence"), fold=Method("scp"))
    exporter.compress(other, broken)
    assert set(counted) == set(STEPS)
    assert "is of another recipe, model or version, or damaged: it is not used, and all is done anew" in caplog.text


def test_a_step_that_is_not_what_was_written_is_done_again(broken, asked, whole, counted, caplog):
    path = work(broken) / "scores.safetensors"
    path.write_bytes(path.read_bytes().replace(b"tis", b"sit"))
    exporter.compress(asked, broken)
    assert set(counted) == {"localize", "fold_gaps", "_reference"} and hashes(broken) == hashes(whole)
    assert "is not what was written there: this step is done again" in caplog.text


def test_a_damaged_index_is_not_used(broken, asked, whole, counted):
    (work(broken) / "stages.json").write_text('{"fingerprint": [')
    exporter.compress(asked, broken)
    assert set(counted) == set(STEPS) and hashes(broken) == hashes(whole)


def test_two_runs_at_once_are_refused_and_wrong_input_leaves_nothing(broken, asked, monkeypatch):
    with (work(broken) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another run is compressing in .*\.small\.compressing: wait for it"):
            exporter.compress(asked, broken)
    monkeypatch.setattr(steps, "fold_gaps", lambda *_: (_ for _ in ()).throw(InputError("NaN")))
    with pytest.raises(InputError, match="NaN"):
        exporter.compress(asked, broken)
    assert not work(broken).exists()
    work(broken).write_text("mine")
    with pytest.raises(InputError, match=r"is no folder, and a run keeps there what it goes on from: move it away"):
        exporter.compress(asked, broken)


def test_labels_are_among_what_the_answers_are_guessed_from(broken, tiny, questions, tmp_path, counted):
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    other = questions.with_name("relabelled.jsonl")
    other.write_text("".join(json.dumps({**line, "answer": "another"}) + "\n" for line in lines))
    same = recipe(tiny("llava"), questions, localizer=Method("tis"), fold=Method("scp"))
    jobs = [prepare(dataclasses.replace(same, calibration=dataclasses.replace(same.calibration, data=str(path))),
                    RunOptions()) for path in (questions, other)]  # fmt: skip
    assert jobs[0].calibration.fingerprint == jobs[1].calibration.fingerprint
    jobs[1] = dataclasses.replace(jobs[1], recipe=jobs[0].recipe)
    assert fingerprint_of(jobs[0]) != fingerprint_of(jobs[1])


@pytest.mark.usefixtures("unverified")
def test_the_folder_lies_where_the_result_will(asked, whole, tmp_path, monkeypatch):
    """A link is followed: its own place may not be writable. And what is no run's is not removed."""
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "small").symlink_to(tmp_path / "disk" / "empty")
    kept = tmp_path / "disk" / ".empty.compressing"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "fold_gaps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exporter.compress(asked, tmp_path / "small")
    assert kept.is_dir() and sorted(path.name for path in tmp_path.iterdir()) == ["disk", "small"]
    (kept / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds mine\.txt, which no run has left there, and would be removed with it"):
        exporter.compress(asked, tmp_path / "small")
    (kept / "mine.txt").unlink()
    assert hashes(exporter.compress(asked, tmp_path / "small")) == hashes(whole) and not kept.exists()


@pytest.mark.usefixtures("unverified")
def test_a_full_disk_ends_no_run_that_has_room_for_its_result(asked, whole, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("exporter.compression.stages.replace_tensors", full)
    assert hashes(exporter.compress(asked, tmp_path / "small")) == hashes(whole)
    assert "fold.safetensors can't be kept, since the disk is full" in caplog.text


@pytest.mark.usefixtures("unverified")
def test_where_the_result_has_no_room_the_steps_are_kept(asked, whole, counted, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("exporter.pipeline.write_checkpoint", full)
        with pytest.raises(InputError, match="is full; nothing was kept of small"):
            exporter.compress(asked, tmp_path / "small")
    counted.clear()
    assert hashes(exporter.compress(asked, tmp_path / "small")) == hashes(whole) and not counted


@pytest.mark.usefixtures("unverified")
def test_what_the_system_refuses_is_gone_on_from(asked, whole, tmp_path, monkeypatch):
    def full(*_):
        raise InputError("/tmp is full: the states between layers take over it") from OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "fold_gaps", full)
        with pytest.raises(InputError, match="the states between layers take over it"):
            exporter.compress(asked, tmp_path / "small")
    assert work(tmp_path / "small").is_dir()
    assert hashes(exporter.compress(asked, tmp_path / "small")) == hashes(whole)


@pytest.mark.usefixtures("unverified")
def test_what_fails_its_check_is_not_gone_on_from(asked, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise CheckFailed("another answer")

    monkeypatch.setattr("exporter.pipeline.require", fails)
    with pytest.raises(CheckFailed, match="another answer"):
        exporter.compress(asked, tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unverified")
def test_what_another_run_holds_is_not_removed(broken, tiny):
    """A run that needs no model has the same name for its result, and keeps nothing itself."""
    plain = Recipe(str(tiny("llava")), NO_QUESTIONS, LayerBudget(layers=(2,)), fold=Method("none"))
    with (work(broken) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        exporter.compress(plain, broken)
        assert work(broken).is_dir()


def test_an_interrupted_command_says_so(tiny, questions, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "fold_gaps", interrupted)
    command = ["compress", str(tiny("llava")), "--calibration", str(questions), "--drop-layers", "2"]
    assert main([*command, "--localizer", "tis", "--out", str(tmp_path / "small")]) == 130
    assert "interrupted; the same command goes on from what is saved." in capsys.readouterr().err
