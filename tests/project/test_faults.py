"""A small slice of the fuzzer; `make fuzz` runs all of it, and `make kills` ends runs at random moments."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from faults import damages
from PIL import Image

from exporter.data.images import open_image

TESTS = Path(__file__).parents[1]
CASES = 40


@pytest.mark.clean_process
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


def test_every_kind_of_picture_can_be_made(tmp_path):
    """A damage that fails is a case that was never tried."""
    made = set()
    for seed in range(200):
        path = tmp_path / "x.png"
        Image.new("RGB", (8, 8), (128, 128, 128)).save(path)
        made.add(said := damages.image_changed(random.Random(seed), path))
        if said in ("mode I;16", "mode I", "mode F"):
            assert abs(open_image(path, "x").getpixel((0, 0))[0] - 128) <= 1, said
    assert {f"mode {mode}" for mode in ("L", "1", "P", "LA", "RGBA", "I;16", "I", "F")} <= made


def test_numbers_are_alike_whichever_type_json_reads_them_as():
    assert damages.same_form(b'{"a": 1.5}', b'{"a": 2}', "x.json")
    assert not damages.same_form(b'{"a": 1}', b'{"a": 1.5}', "x.json")
    assert not damages.same_form(b'{"a": 1.5}', b'{"a": true}', "x.json")


def test_what_nobody_reads_of_a_question_may_be_anything():
    before = b'{"image": "a.png", "question": "q", "answer": "a", "type": "t"}\n'
    for change, alike in (
        ((b"type", b"tipe"), True),
        ((b'"t"', b"[1]"), True),
        ((b'"a"', b"3"), False),
        ((b'"a.png"', b'["a.png", "a.png"]'), True),
    ):
        assert damages.same_form(before, before.replace(*change), "x.jsonl") is alike


def test_a_record_may_have_nothing_measured():
    record = b'{"benchmarks": [{"batch": 1}], "plan": {"drop": [3]}}'
    assert damages.same_form(record, record.replace(b'[{"batch": 1}]', b"[]"), "compression.json")
    assert not damages.same_form(record, record.replace(b"[3]", b"[]"), "compression.json")


def test_names_that_two_tensors_of_one_shape_swap_are_another_input():
    a, b = ({"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]} for start in (0, 8))
    wide = {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]}

    def file(header):
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(16)

    before = file({"x": a, "y": b})
    assert damages.same_form(before, file({"x": b, "y": a}), "m.safetensors")
    assert not damages.same_form(before, file({"x": a, "y": wide}), "m.safetensors")
    assert not damages.same_form(before, file({"x": a, "z": b}), "m.safetensors")
