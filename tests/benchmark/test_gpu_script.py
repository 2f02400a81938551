"""The script for a GPU, dry: its model can be opened and timed, and what can't be measured is named."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter.cli.entry import main

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_script"]


@pytest.mark.slow
def test_steps_that_ran_and_steps_that_did_not(gpu, tmp_path, monkeypatch):
    def in_this_process(command, **_):
        if command[3] != "bench" or "--compile" in command:
            return SimpleNamespace(returncode=2, stderr="lvlm-exporter: it can't be\n", stdout="")
        return SimpleNamespace(returncode=main(command[3:]), stderr="", stdout="")

    stand_in = SimpleNamespace(run=in_this_process, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu, "subprocess", stand_in)
    (tmp_path / "work").mkdir()
    report = gpu.Report(tmp_path)
    gpu.measure_all(gpu.Steps(report, gpu.TINY, "cpu", time.monotonic() + 600), tmp_path / "work", torch.float32)
    told = [(step, what) for step, what, _ in report.rows]
    assert ("compress (tis, scp)", "not measured") in told and ("flash attention", "not measured") in told
    assert "exit code 2: lvlm-exporter: it can't be" in report.markdown()
    assert ("bench", "whole, torch, sdpa, float32: prefill, batch 1") in told
    assert "of the ideal" in report.markdown()


def test_the_time_ends_and_the_table_is_there(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--minutes", "0", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(gpu, "measure_roofline", lambda *_: gpu.Roofline(1e12, 1e10, "float32"))
    assert gpu.main() == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| best copy | float32 | 10 GB/s |" in table and "| bench | not measured | the time was up |" in table
    assert not (tmp_path / "out" / "work").exists()
    assert gpu.main() == 2 and "name another folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2 and "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
