"""A flag that can't be read is one sentence and exit code 2, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from exporter.cli.entry import main

SCORE = ("score", "m", "--calibration", "c")
EVALUATE = ("evaluate", "m", "--task", "t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SCORE, "--samples", "0"), "--samples: 0: at least 1 is needed"),
        ((*SCORE, "--samples", "-1"), "--samples: -1: at least 1 is needed"),
        ((*SCORE, "--samples", "nan"), "--samples: 'nan' is no whole number"),
        ((*SCORE, "--samples", "9" * 5000), "is no whole number"),
        ((*SCORE, "--samples", "9" * 50), "is out of range: at most 1,000,000,000,000"),
        ((*SCORE, "--seed", "-1"), "--seed: a number from 0 to 4294967295"),
        ((*SCORE, "--seed", str(2**70)), "--seed: a number from 0 to 4294967295"),
        ((*SCORE, "--seed", "x"), "--seed: 'x' is no whole number"),
        ((*SCORE, "--memory", "x"), "--memory: 'x' is no size like 12GB"),
        ((*SCORE, "--memory", "-3GB"), "--memory"),
        ((*SCORE, "--batch-size", "0"), "--batch-size: 0: at least 1"),
        ((*SCORE, "--protect", "a"), "--protect: 'a' is no list of layers like 8,9,10"),
        ((*SCORE, "--layers", "1,x"), "--layers: '1,x' is no list of layers"),
        ((*SCORE, "--drop-ratio", "nan"), "--drop-ratio: 'nan' is no finite number"),
        ((*SCORE, "--drop-ratio", "x"), "--drop-ratio: 'x' is no number"),
        ((*SCORE, "--drop-layers", "1.5"), "--drop-layers: '1.5' is no whole number"),
        ((*SCORE, "--target-params", "infB"), "--target-params: 'infB' is no number of parameters"),
        ((*SCORE, "--target-params", "nan"), "--target-params: 'nan' is no number of parameters"),
        ((*SCORE, "--target-params", ""), "--target-params: '' is no number of parameters"),
        ((*SCORE, "--localizer-option", "p=["), "--localizer-option p=[: what follows the equals sign is no YAML"),
        ((*SCORE, "--localizer-option", "p"), "--localizer-option p: NAME=VALUE is needed"),
        ((*SCORE, "--columns", "image"), "--columns image: ROLE=NAME is needed"),
        ((*SCORE, "--columns", "=x"), "--columns =x: ROLE=NAME is needed"),
        ((*SCORE, "--columns", "image=a", "--columns", "image=b"), "the column for 'image' is named twice"),
        ((*SCORE, "--localizer", "tiss"), "--localizer: invalid choice"),
        ((*SCORE, "--drop-layers", "1", "--drop-ratio", "0.5"), "not allowed with"),
        (("score", "m"), "the following arguments are required: --calibration"),
        (("scroe",), "invalid choice: 'scroe'"),
        ((), "the following arguments are required: SUBCOMMAND"),
        ((*EVALUATE, "--samples", "0"), "--samples: 0: at least 1"),
        ((*EVALUATE, "--max-new-tokens", "0"), "--max-new-tokens: 0: at least 1"),
        ((*EVALUATE, "--keep-visual-tokens", "x"), "--keep-visual-tokens: 'x' is no list of counts or shares"),
        ((*EVALUATE, "--keep-visual-tokens", "1.0.0"), "'1.0.0' is no list of counts or shares"),
        ((*EVALUATE, "--keep-layers", "1.5"), "--keep-layers: '1.5' is no list of numbers of layers"),
        ((*EVALUATE, "--columns", "image"), "ROLE=NAME is needed"),
        (("bench", "m", "--batch", "a"), "--batch: 'a' is no list of numbers of rows like 1,8"),
        (("bench", "m", "--rounds", "x"), "--rounds: 'x' is no whole number"),
        (("bench", "m", "--new-tokens", "0"), "--new-tokens: 0: at least 1"),
        (("bench", "m", "--columns", "image"), "ROLE=NAME is needed"),
        (("route", "m", "--out", "o", "--calibration", "c", "--learning-rate", "inf"), "'inf' is no finite number"),
        (("route", "m", "--out", "o", "--calibration", "c", "--steps", "0"), "--steps: 0: at least 1"),
        (
            ("compress", "m", "--recipe", "r", "--out", "o", "--answers", "a", "--drop-layers", "2"),
            "--recipe says everything: take out --answers, --drop-layers, MODEL, or the recipe.",
        ),
        (("onnx", "m", "--out", "o", "--opset", "x"), "--opset: 'x' is no whole number"),
        (("onnx", "m", "--out", "o", "--device", "tpu"), "--device: invalid choice"),
    ],
)
def test_one_sentence(arguments, message, capsys):
    assert main(list(arguments)) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told and told.startswith("lvlm-exporter: ") and len(told) < 600


@pytest.mark.clean_process
def test_nothing_heavy_is_imported_for_it():
    code = (
        "import sys; from exporter.cli import main; main(['bench', 'm', '--batch', 'a']); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "False"
