"""A compression that was killed within a pass over layers on disk goes on behind the last finished layer."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.checkpoints import recipe

import exporter
from exporter.checkpoints.files import hashes
from exporter.checkpoints.source import open_source
from exporter.fold import reconstruction
from exporter.models import journal, loading, sweep
from exporter.models.journal import Bookmark, Journal, digest, flat, nested
from exporter.models.loading import PartSizes
from exporter.recipe import Method, RunOptions

pytestmark = pytest.mark.usefixtures("unverified")
KILLED = """
import os, signal, sys
from exporter import compress
from exporter.models import journal, loading
from exporter.recipe import RunOptions, load_recipe
loading.AT_ONCE, journal.EVERY_S, journal.SHARE = 1, 0.0, 0
keep, left = journal.Bookmark.keep_if_due, [int(sys.argv[4])]
def keeping(self, told, **keywords):
    keep(self, told, **keywords)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Bookmark.keep_if_due = keeping
compress(load_recipe(sys.argv[1]), sys.argv[2], RunOptions(memory=sys.argv[3]))
"""


class MachineWentAwayError(RuntimeError):
    """The machine went away."""


@pytest.fixture(autouse=True)
def kept_at_each_layer(monkeypatch) -> None:
    """Keep where a pass is behind each layer, of models that have few."""
    monkeypatch.setattr(loading, "AT_ONCE", 1)
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    monkeypatch.setattr(journal, "SHARE", 0)


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, int]]:
    """What is done in which layer, in its order."""
    done: list[tuple[str, int]] = []
    through, refit = vars(sweep)["_through"], vars(reconstruction)["_refit"]

    def passing(model, layer_idx, **keywords):
        done.append(("through", layer_idx))
        return through(model, layer_idx, **keywords)

    def refitting(job, layer_idx, *args, **keywords):
        done.append(("refit", layer_idx))
        return refit(job, layer_idx, *args, **keywords)

    monkeypatch.setattr(sweep, "_through", passing)
    monkeypatch.setattr(reconstruction, "_refit", refitting)
    return done


def run_options(folder: Path) -> RunOptions:
    return RunOptions(memory=f"{PartSizes.of(open_source(str(folder)), 4).least / 1000 + 1:.0f}KB")


def asked(tiny, questions, samples: int = 4, **changes: object):
    """Return a recipe whose questions get short answers."""
    made = recipe(tiny("llava"), questions, **changes)
    calibration = dataclasses.replace(made.calibration, samples=samples, answer_tokens=3)
    return dataclasses.replace(made, calibration=calibration)


def work(out: Path) -> Path:
    return out.parent / f".{out.name}.compressing"


def broken_off(monkeypatch, asked, out: Path, options: RunOptions, after: int) -> None:
    """Run a compression up to the given number of finished layers."""
    keep, left = Bookmark.keep_if_due, [after]

    def keeping(self, told, **keywords):
        keep(self, told, **keywords)
        left[0] -= 1
        if not left[0]:
            raise MachineWentAwayError

    with monkeypatch.context() as patch:
        patch.setattr(Bookmark, "keep_if_due", keeping)
        with pytest.raises(MachineWentAwayError):
            exporter.compress(asked, out, options)


@pytest.mark.slow
@pytest.mark.clean_process
def test_a_killed_pass_is_gone_on_with(tiny, questions, tmp_path, ran):
    """Rankings are killed behind their second layer; the next run begins at the third, and ends in the same bytes."""
    compression = asked(tiny, questions, localizer=Method("tis"), fold=Method("reconstruction"))
    options = run_options(tiny("llava"))
    whole = exporter.compress(compression, tmp_path / "whole", options)
    from_scratch = ran.copy()
    path, out = tmp_path / "recipe.yaml", tmp_path / "small"
    path.write_text(yaml.safe_dump(compression.to_data()))
    command = [sys.executable, "-c", KILLED, str(path), str(out), options.memory, "2"]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ran.clear()
    exporter.compress(compression, out, options)
    assert from_scratch[:2] == [("through", 0), ("through", 1)] and ran == from_scratch[2:]
    assert hashes(out) == hashes(whole)
    read = [json.loads((made / "compression.json").read_text())["measured"]["bytes_read"] for made in (out, whole)]
    assert read[0] > 0 and not work(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("localizer", "fold"), [("best_of", "auto"), pytest.param("tis", "scp_both", marks=pytest.mark.long_tail)]
)
def test_a_run_that_is_broken_off_again_and_again_comes_to_its_end(
    localizer, fold, tiny, questions, tmp_path, monkeypatch, ran
):
    """Rankings, sets, folds of sets, gaps beside a reconstruction and judgements, each in several runs."""
    compression = asked(tiny, questions, samples=12, localizer=Method(localizer), fold=Method(fold), protect=())
    options = dataclasses.replace(run_options(tiny("llava")), batch_size=2)
    whole = exporter.compress(compression, tmp_path / "whole", options)
    from_scratch, out = len(ran), tmp_path / "small"
    ran.clear()
    for _ in range(40):
        try:
            broken_off(monkeypatch, compression, out, options, after=4)
        except pytest.fail.Exception:  # it came to its end
            break
    assert hashes(out) == hashes(whole) and not work(out).exists()
    assert len(ran) <= 1.25 * from_scratch


@pytest.fixture
def broken(tiny, questions, tmp_path, monkeypatch) -> Path:
    """The result's place, beside which a run has left its rankings behind the second layer."""
    compression = asked(tiny, questions, localizer=Method("tis"), fold=Method("none"))
    broken_off(monkeypatch, compression, tmp_path / "small", run_options(tiny("llava")), after=2)
    return tmp_path / "small"


def test_what_is_not_what_was_written_is_not_used(broken, tiny, questions, ran, caplog):
    (path,) = work(broken).glob("pass-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    exporter.compress(asked(tiny, questions, localizer=Method("tis"), fold=Method("none")), broken,
                      run_options(tiny("llava")))  # fmt: skip
    assert ran[0] == ("through", 0)
    assert "is not what was written there: this pass over the layers begins anew" in caplog.text


@pytest.mark.parametrize("other", ["recipe", "code", "index"])
def test_what_another_run_kept_is_not_used(other, broken, tiny, questions, ran, caplog, monkeypatch):
    fold = Method("scp" if other == "recipe" else "none")
    if other == "code":
        monkeypatch.setattr("exporter.compression.stages.code_hash", lambda: "another")
    if other == "index":
        (work(broken) / "passes.json").write_text('{"passes": {')
    exporter.compress(asked(tiny, questions, localizer=Method("tis"), fold=fold), broken, run_options(tiny("llava")))
    assert ran[0] == ("through", 0)
    assert "is of another recipe, model or version, or damaged: it is not used" in caplog.text


def test_a_nest_comes_back_and_is_known_by_its_numbers(tmp_path):
    nest = {1: [torch.arange(3), None, (2.5, "a")], "b": {"c": torch.zeros(0)}}
    tensors: dict[str, torch.Tensor] = {}
    back = nested(json.loads(json.dumps(flat(nest, tensors))), tensors.__getitem__)
    assert back[1][0].equal(nest[1][0]) and back[1][1:] == [None, [2.5, "a"]] and not back["b"]["c"].numel()
    assert digest(nest) == digest(back) != digest({**nest, 1: [torch.arange(3) + 1, None, (2.5, "a")]})
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, 1))


def test_a_pass_is_kept_seldom(tmp_path, monkeypatch):
    """At first after a while, then after ten times as long as it took to keep it; files that nothing names go."""
    now = [0.0]
    monkeypatch.setattr(journal, "EVERY_S", 30.0)
    monkeypatch.setattr(journal, "SHARE", 10)
    monkeypatch.setattr("exporter.models.journal.time.monotonic", lambda: now[0])

    def told():
        now[0] += 7
        return {"next": now[0]}

    bookmark, kept_at = Journal(tmp_path, "run").begin("sweep", ["all"]), []
    for second in range(0, 200, 10):
        now[0] = max(now[0], float(second))
        before = now[0]
        bookmark.keep_if_due(told)
        if now[0] > before:
            kept_at.append(second)
    assert kept_at == [30, 110, 190] and len(list(tmp_path.glob("pass-*"))) == 1
    assert Journal(tmp_path, "run").begin("sweep", ["all"]).read() == {"next": 197.0}
    assert Journal(tmp_path, "run").begin("sweep", ["others"]).read() is None
    Journal(tmp_path, "another")
    assert not list(tmp_path.glob("pass-*"))
