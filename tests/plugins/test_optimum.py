"""Our subcommands in optimum-cli."""

from __future__ import annotations

import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["lvlm", "onnx", "--help"], 0, "--quantize"),
        (["export", "lvlm-onnx", "no/such/folder/at-all", "--out", "x"], 2, "neither a folder nor a hub id"),
    ],
)
def test_verbs_are_found_by_optimum(arguments, code, said, monkeypatch, capsys):
    optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    with pytest.raises(SystemExit) as end:
        optimum_cli.main()
    assert end.value.code == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
