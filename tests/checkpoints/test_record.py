"""compression.json and what is wrong with it: one sentence each, before anybody uses any of it."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fixtures.checkpoints import not_verified, recipe

from exporter.benchmark.figures import BenchOptions, Figures
from exporter.benchmark.workload import Workload
from exporter.cards import model_card
from exporter.cards.model_card import body, metadata, template
from exporter.checkpoints.measurement_types import BatchFigures, BenchOptionsPart, EvaluationEntry, WorkloadPart
from exporter.checkpoints.record import CheckpointRecord, read_record
from exporter.checkpoints.record_types import HealedHeldOut
from exporter.checkpoints.shapes import (
    COUNT,
    DIVERGENCE,
    HASHES,
    INNER_PATH,
    LARGEST,
    NUMBER,
    SHARE,
    SIZE,
    TEXT,
    ListOf,
    MapOf,
    Maybe,
    Misfit,
    TextOr,
    check,
    one_of,
)
from exporter.checkpoints.typed import from_data, shape_of
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.evaluation.results import ModelResult, figures
from exporter.models.divergence import Divergence
from exporter.pipeline import compress

WRONG_VALUES: tuple[Any, ...] = (None, -1, 3, float("nan"), 10**400, "x", [], [None], {"x": None})
RATE = {"n": 10, "accuracy": 0.5, "interval": [0.2, 0.8], "by_type": {name: {"n": 5, "accuracy": 1.0} for name in "ab"}}
BUDGET = {"preset": "fast", "keep_visual_tokens": 0.25, "keep_layers": 3, "rule": "router", "drop_at": None}
TIMES = {"batch": 1, "visual_tokens": 4, "text_tokens": 8, "prefill_ms": 2.0, "decode_ms": 1.0}


@pytest.fixture(scope="module")
def made(tiny, questions, tmp_path_factory) -> Path:
    """A compressed checkpoint, its record with everything in it that a record may hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.pipeline.require", not_verified)
        folder = compress(recipe(tiny("llava"), questions), tmp_path_factory.mktemp("record") / "small")
    record = json.loads((folder / "compression.json").read_text())
    share = {"task": "t", "fingerprint": "f", **RATE, "kl": 0.1, "agreement": 0.9, "reference": RATE}
    record["evaluations"] = [
        share | {"budget": None},
        share | {"budget": BUDGET, "flops_share": 0.5, "decoder_flops_share": 0.4},
    ]
    ratios = {"prefill_ms": 0.5, "flops": None, "achieved": {"prefill": 0.9, "decode": None}}
    record["benchmarks"] = [
        {
            "workload": {"task": None},
            "options": {"new_tokens": 8, "rounds": 2},
            "hardware": {"device": "cpu", "threads": 1},
            "budget": None,
            "runtime": "torch",
            "date": "2026-11-28",
            "versions": {"torch": "2", "transformers": "5"},
            "reference_is_this_model": False,
            "batches": [TIMES | {"ratio_to_reference": ratios}],
            "reference": [TIMES],
        }
    ]
    record["router"] = {
        "settings": {"drop_at": 1, "candidates": [3], "presets": {"fast": {"keep_layers": 3}}, "default": "fast"},
        "parameters": 10,
        "questions": 8,
        "held_out": 2,
        "curve": [{"step": 0, "loss": 1.0, "KL": 0.5}],
        "reference": {"tokens": [1], "margins": [0.5]},
    }
    judged = {"kl": 0.1, "interval": [0.0, 0.2], "questions": 8}
    compared = judged | {"more": 0.05, "error": 0.01}
    record["fold"] |= {"held_out": judged, "without": compared, "runner_up": compared | {"name": "scp"}}
    drop = sorted(record["plan"]["drop"])
    sets = [judged | {"drop": drop, "more": 0.0, "error": 0.0}, compared | {"drop": [0]}]
    record["scores"]["details"]["rounds"] = [{"chosen": drop, "sets": sets}]
    record["routes"] = [{"file": "assets/route_1.png", "question": "which?"}]
    (folder / "compression.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def record(made) -> dict[str, Any]:
    return read_record(made).to_data()


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data; of lists and of maps of hashes the first two entries."""
    inner = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    found = [path] if path else []
    few = isinstance(data, list) or path[-1:] == ("files",)
    for key, value in inner[:2] if few else inner:
        found += places(value, (*path, key))
    return found


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any = ...) -> dict[str, Any]:
    """The record with another value in one place; without the place where none is given."""
    record = copy.deepcopy(record)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return record


def read_and_told(folder: Path) -> str:
    """Why a record is refused; '' where it is not: then a card can be made from it."""
    try:
        read = read_record(folder)
    except InputError as error:
        return str(error)
    body(read, "name")
    metadata(read, "name")
    return ""


@pytest.mark.slow
def test_damage_anywhere_is_a_sentence_or_does_no_harm(made, record, tmp_path, monkeypatch):
    """Each part is taken out, and put in as something else: what can still be read can still be told in a card."""
    monkeypatch.setattr(model_card, "template", functools.cache(template))
    (tmp_path / "small").mkdir()
    refused = 0
    for path in places(record):
        for value in (..., *WRONG_VALUES):
            (tmp_path / "small/compression.json").write_text(json.dumps(changed(record, path, value)))
            said = read_and_told(tmp_path / "small")
            refused += bool(said)
            assert said == "" or ("compression.json " in said and "\n" not in said), (path, value)
    assert refused > 1000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("protect",), ..., "it has no 'protect'"),
        (("plan", "keep"), [0, 0, 1], "'plan' does not keep or drop each of its 6 layers once"),
        (("scores", "values"), [1.0], "'scores.values' has 1 numbers for 6 layers"),
        (("scores", "values", 0), float("nan"), "it holds NaN"),
        (("reference", "margins"), [], "'reference' has 12 tokens and 0 margins"),
        (("reference", "dtype"), "int8", "'reference.dtype' is not 'float32' or"),
        (("measured", "files"), {"../../etc/passwd": "0" * 64}, "which is not a file below the folder"),
        (("measured", "files"), {"/etc/passwd": "0" * 64}, "which is not a file below the folder"),
        (("measured", "files"), {"config.json": "abc"}, "'measured.files.config.json' is not a SHA-256"),
        (("source", "files"), {"a\\b": "0" * 64}, "which is not a file below the folder"),
        (("measured", "parameters"), 10**400, "'measured.parameters' is not a whole number"),
        (("fold", "held_out", "interval"), [0.1], "'fold.held_out.interval'"),
        (("fold", "without"), ..., "'fold' was chosen by held-out questions and has no 'without'"),
        (("scores", "details", "rounds", 0, "sets", 0, "more"), "x", "'rounds[0].sets[0].more' is not a finite number"),
        (("reference", "margins", 0), -0.5, "'reference.margins[0]' is not a number from 0 up"),
        (("recipe", "calibration"), 1.5, "'recipe.calibration' is neither a text nor a JSON object"),
        (("recipe", "localizer"), {"k": 3}, "'recipe.localizer' has no 'name'"),
        (("recipe", "seed"), "0", "'recipe.seed' is not a whole number"),
        (("calibration", "held_out"), 0.0, "'calibration.held_out' is not a whole number"),
        (("evaluations", 0, "agreement"), -0.125, "'evaluations[0].agreement' is not a number from 0 to 1"),
        (("evaluations", 0, "kl"), -0.5, "'evaluations[0].kl' is not a number from 0 up"),
        (("evaluations", 0, "reference", "budget"), "x", "'evaluations[0].reference.budget' is no JSON object"),
        (
            ("evaluations", 0, "by_type", "a", "interval"),
            [[0, 1]],
            "'evaluations[0].by_type.a.interval' is not a list of",
        ),
        (("evaluations", 1, "flops_share"), -0.9, "'evaluations[1].flops_share' is not a number from 0 up"),
        (("evaluations", 1, "answers_kept"), "x", "'evaluations[1].answers_kept' is not a number from 0 to 1"),
        (("benchmarks", 0, "workload", "seed"), [[]], "'benchmarks[0].workload.seed' is not a whole number"),
        (("format",), 2, "has format 2, this version of lvlm-exporter reads 1: upgrade"),
        (("router", "curve"), [], "'router.curve' has a point without"),
        (("evaluations", 1, "flops_share"), None, "'evaluations[1]' is under a budget"),
        (("evaluations", 0, "kl"), None, "'evaluations[0]' has one of 'kl' and 'agreement'"),
        (("evaluations", 0, "reference", "by_type", "b"), ..., "'evaluations[0].reference.by_type' has no 'b'"),
        (("benchmarks", 0, "batches"), [], "'benchmarks[0].batches' is not a list that is not empty"),
    ],
)
def test_what_is_wrong_is_named(path, value, message, record, tmp_path):
    (tmp_path / "compression.json").write_text(json.dumps(changed(record, path, value)))
    with pytest.raises(InputError, match=re.escape(message)):
        read_record(tmp_path)


def unnamed(data: Any, shape: Any, where: str = "") -> list[str]:
    """Every part of a record that no annotation names, and that is checked by nobody therefore."""
    if isinstance(shape, Maybe):
        return [] if data is None else unnamed(data, shape.shape, where)
    if isinstance(shape, ListOf):
        return [place for item in data for place in unnamed(item, shape.shape, f"{where}[]")]
    if isinstance(shape, MapOf):
        return [place for item in data.values() for place in unnamed(item, shape.shape, f"{where}.*")]
    if not isinstance(shape, dict):
        return []
    known = {key.removesuffix("?"): inner for key, inner in shape.items()}
    found = [f"{where}.{key}" for key in data if key not in known]
    return found + [p for key, v in data.items() if key in known for p in unnamed(v, known[key], f"{where}.{key}")]


def test_every_part_that_is_written_has_a_type(record):
    assert unnamed(record, shape_of(CheckpointRecord)) == [".format"]  # which is read before all else
    assert {f.name for f in fields(Figures)} <= {f.name for f in fields(BatchFigures)}
    assert {f.name for f in fields(Workload)} <= {f.name for f in fields(WorkloadPart)}
    assert {f.name for f in fields(BenchOptions)} <= {f.name for f in fields(BenchOptionsPart)}
    told = figures(ModelResult("m", None, 2, 0.5, (0.1, 0.9), {}, 0.1, 0.9, 8, None, 1, 1, 0.1, 1.0, 1.0, (), ()))
    assert told.keys() <= {f.name for f in fields(EvaluationEntry)}


def test_a_divergence_of_one_picture_has_no_interval(record, tmp_path):
    """Its error is not known, and JSON has no infinite numbers: a record with one could not be read again."""
    held_out = Divergence(kl=(0.1, 0.3), tokens=(4, 4), pictures=(0, 0), follows=(True, False)).to_data()
    assert held_out["interval"] is None
    record["fold"] |= {"name": "none", "held_out": held_out, "without": held_out, "runner_up": None}
    (tmp_path / "compression.json").write_text(json.dumps(record, allow_nan=False))
    assert "is 0.0500 nats a token." in body(read_record(tmp_path), "name")
    assert from_data(HealedHeldOut, held_out | {"pictures": 1}).interval is None
    two = Divergence(kl=(0.1, 0.3), tokens=(4, 4), pictures=(0, 1)).to_data()
    assert two["interval"][0] < two["kl"] < two["interval"][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged (Expecting value"),
        (b"\xff\xfe", "is damaged ('utf-8' codec can't decode"),
        (b"[" * 100_000, "is damaged (maximum recursion depth"),
        (b'{"recipe": {}}', "is damaged (it has no 'run'"),
        (b"[1]", "it has no 'recipe'"),
        (b'{"recipe": Infinity}', "it holds Infinity, which is no number of JSON"),
    ],
)
def test_bytes_that_are_no_record(content, message, tmp_path):
    (tmp_path / "compression.json").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_record(tmp_path)


def test_a_byte_order_mark_and_capital_hashes_do_no_harm(record, tmp_path):
    files = {name: digest.upper() for name, digest in record["measured"]["files"].items()}
    record["measured"]["files"] = files
    (tmp_path / "compression.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    assert read_record(tmp_path).measured.files == files


def test_a_record_that_is_a_folder(tmp_path):
    (tmp_path / "compression.json").mkdir()
    with pytest.raises(InputError, match="is a folder, not a record of lvlm-exporter"):
        read_record(tmp_path)


@pytest.mark.parametrize("words", [["verify"], ["card"], ["push", "a/b", "--dry-run"], ["reproduce", "--out", "again"]])
def test_every_subcommand_refuses_a_damaged_record(words, record, tmp_path, capsys):
    (tmp_path / "compression.json").write_text(json.dumps(changed(record, ("protect",))))
    assert main([words[0], str(tmp_path), *words[1:]]) == 2
    assert "compression.json is damaged (it has no 'protect')" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["evaluate", "bench"])
def test_a_damaged_record_is_refused_before_the_work(
    subcommand, made, record, tmp_path, questions, capsys, monkeypatch
):
    import shutil

    folder = Path(shutil.copytree(made, tmp_path / "small"))
    (folder / "compression.json").write_text(json.dumps(changed(record, ("protect",))))
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"image": str(questions.parent / "0.png"), "question": "which?", "answer": "a"}) + "\n")
    monkeypatch.setattr("exporter.evaluation.loaded.load", None)
    monkeypatch.setattr("exporter.benchmark.bench.open_subjects", None)
    assert main([subcommand, str(folder), "--task", str(task)]) == 2
    assert "compression.json is damaged (it has no 'protect')" in capsys.readouterr().err


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shape"),
    [(3, COUNT), (0.5, NUMBER), ("x", TextOr({"data": TEXT})), (1, SHARE), (2.5, SIZE), (-1e-9, DIVERGENCE),
     (None, Maybe(COUNT)), ([1, 2], ListOf(COUNT, 2)), ({"a": 1}, {"a": COUNT, "b?": COUNT}),
     ("router/model.safetensors", INNER_PATH), ({"a": 1}, MapOf(COUNT)), ("a", one_of("a", "b"))],
)  # fmt: skip
def test_what_fits(value, shape):
    check(value, shape)


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (True, COUNT, "it is not a whole number"),
        (LARGEST, COUNT, "it is not a whole number"),
        (float("inf"), NUMBER, "it is not a finite number"),
        ([1], ListOf(COUNT, 2), "it is not a list of 2"),
        ([1, "x"], ListOf(COUNT), r"'\[1\]' is not a whole number"),
        ({"a": {"b": "x"}}, {"a": {"b": COUNT}}, "'a.b' is not a whole number"),
        ({"a": {}}, {"a": {"b": COUNT}}, "'a' has no 'b'"),
        ([], {"a": COUNT}, "it is no JSON object"),
        ({"../x": "0" * 64}, HASHES, "names '../x', which is not a file below the folder"),
        ({"a//b": "0" * 64}, HASHES, "names 'a//b'"),
        ({"C:/x": "0" * 64}, HASHES, "names 'C:/x'"),
        (["a"], one_of("a", "b"), "it is not 'a' or 'b'"),
        (1.5, TextOr({"data": TEXT}), "it is neither a text nor a JSON object"),
        ({"data": 3}, TextOr({"data": TEXT}), "'data' is not a text"),
        (1.01, SHARE, "it is not a number from 0 to 1"),
        (-0.01, SIZE, "it is not a number from 0 up"),
        (-0.01, DIVERGENCE, "it is not a number from 0 up"),
    ],
)
def test_what_does_not_fit_is_named(value, shape, message):
    with pytest.raises(Misfit, match=message):
        check(value, shape)
