"""A small slice of the fuzzer; `make fuzz` runs all of it, and `make kills` ends runs at random moments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = 40


def test_damaged_files_give_the_right_result_or_one_sentence(tmp_path):
    command = [sys.executable, "-m", "faults.fuzz", "--cheap", "--cases", str(CASES), "--workers", "1"]
    ran = subprocess.run(
        [*command, "--work", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert f"| **all** | {CASES} |" in ran.stdout
