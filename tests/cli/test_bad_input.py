"""Wrong input gets one sentence and exit code 2, nothing is left behind, and the source is untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.checkpoints import picture, snapshot
from safetensors.torch import load_file, save_file

from exporter.checkpoints import safetensors_ranges, writer
from exporter.checkpoints.safetensors_ranges import write_shards
from exporter.cli.entry import main
from exporter.cli.exit_codes import reason_of
from exporter.errors import InputError
from exporter.recipe import recipe_from_data


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny("llava"), tmp_path / "model"))


@pytest.fixture
def sharded(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny("llava", max_shard_size="100KB"), tmp_path / "model"))


def refused(capsys, *arguments) -> str:
    """Run the command line; it must refuse in one line. Returns the line."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("lvlm-exporter: ")
    return lines[0]


def compress_refused(capsys, model, questions, *extra, budget=("--drop-layers", "2")) -> str:
    folder = Path(model).parent if Path(model).parent.is_dir() else Path(questions).parent
    before = snapshot(folder)
    message = refused(capsys, "compress", model, "--out", folder / "out", "--calibration", questions, *budget, *extra)
    assert snapshot(folder) == before
    return message


def test_missing_shard(capsys, sharded, questions):
    next(iter(sorted(sharded.glob("model-*.safetensors")))).unlink()
    assert "lacks 1 of its" in compress_refused(capsys, sharded, questions)


def test_truncated_shard(capsys, sharded, questions):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    assert "truncated" in compress_refused(capsys, sharded, questions)


def test_empty_and_garbled_weights(capsys, model, questions):
    (model / "model.safetensors").write_bytes(b"")
    assert "no safetensors file" in compress_refused(capsys, model, questions)
    (model / "model.safetensors").write_bytes(b"\x20" + b"\0" * 7 + b"{not json" + b" " * 40)
    assert "damaged safetensors header" in compress_refused(capsys, model, questions)


def test_wrong_index(capsys, sharded, questions):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    path.write_text(json.dumps(index))
    assert f"'{moved}' is not in {last}" in compress_refused(capsys, sharded, questions)
    del index["weight_map"][moved]
    path.write_text(json.dumps(index))
    assert "leaves out 1 tensors" in compress_refused(capsys, sharded, questions)
    path.write_text("{}")
    assert "no index" in compress_refused(capsys, sharded, questions)


def test_nan_weights(capsys, model, questions):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    message = compress_refused(capsys, model, questions)
    assert "NaN" in message
    assert "layers.3.mlp.down_proj.weight" in message


def test_pickle_only(capsys, model, questions):
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    assert "pickled weights only" in compress_refused(capsys, model, questions)


def test_no_checkpoint(capsys, tmp_path, questions):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in compress_refused(capsys, tmp_path / "empty", questions)
    assert "neither a folder nor a hub id" in compress_refused(capsys, tmp_path / "nowhere", questions)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "blip"}, "'blip' is not a family"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoModel": "m.M"}}, "needs remote code"),
        ({"text_config": {"model_type": "opt"}}, "can't lay out a llava model"),
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 7}}, "says 7 decoder layers"),
    ],
)
def test_unknown_family_and_wrong_config(change, expected, capsys, model, questions):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert expected in compress_refused(capsys, model, questions)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (("--drop-layers", "6"), "exceeds the 5 that may go (of 6"),
        (("--drop-layers", "-1"), "from 0"),
        (("--drop-ratio", "1.5"), "from 0 to below 1"),
        (("--target-params", "1K"), "can't be met"),
        (("--layers", "2,9"), "layer 9 does not exist"),
        (("--layers", "2,2"), "twice"),
        (("--layers", "1,2", "--protect", "2"), "layer 2 is protected"),
        (("--drop-layers", "4", "--protect", "0,1,2"), "exceeds the 3 that may go"),
        (("--drop-layers", "2", "--protect", "8"), "layer 8"),
        ((), "exactly one of"),
        (("--drop-layers", "2", "--localizer-option", "q=1"), "no option 'q'"),
        (("--drop-layers", "2", "--fold-option", "k"), "NAME=VALUE"),
        (("--drop-layers", "2", "--dtype", "float8"), "dtype 'float8'"),
        (("--drop-layers", "2", "--device", "cuda:7"), "cuda:7"),
        (("--drop-layers", "2", "--samples", "0"), "at least 1"),
        (("--drop-layers", "2", "--batch-size", "0"), "at least 1"),
    ],
)
def test_impossible_requests(budget, expected, capsys, model, questions):
    assert expected in compress_refused(capsys, model, questions, budget=budget)


@pytest.mark.slow
def test_fold_that_is_not_exact_is_refused(capsys, tiny, questions, tmp_path):
    model = Path(shutil.copytree(tiny("gemma3"), tmp_path / "model"))
    assert "a norm follows the MLP" in compress_refused(capsys, model, questions, "--fold", "scp")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{broken", "line 2 is no JSON"),
        ("[1]", "line 2 holds a list"),
        ('{"image": "0.png"}', "line 2: neither 'question' nor 'messages'"),
        ('{"image": "none.png", "question": "what?"}', "line 2: there is no image"),
        ('{"image": "zero.png", "question": "what?"}', "can't be read as an image (0 bytes)"),
        ('{"image": "text.png", "question": "what?"}', "can't be read as an image (5 bytes)"),
        ('{"image": 3, "question": "what?"}', "an image is a path, not 3"),
        ('{"image": "0.png", "messages": [{"role": "robot", "content": "x"}]}', "'messages' must be"),
        (
            '{"image": "0.png", "messages": [{"role": "user", "content": '
            '[{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]}]}',
            "place 2 images, the line names 1",
        ),
    ],
)
def test_bad_lines_are_named(line, expected, capsys, model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    picture(data / "0.png")
    (data / "zero.png").write_bytes(b"")
    (data / "text.png").write_text("hello")
    (data / "q.jsonl").write_text('{"image": "0.png", "question": "what is this?"}\n' + line + "\n")
    assert expected in compress_refused(capsys, model, data / "q.jsonl")


def test_empty_data(capsys, model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no lines" in compress_refused(capsys, model, tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    assert "holds no images" in compress_refused(capsys, model, tmp_path / "folder")
    assert "no file or folder" in compress_refused(capsys, model, tmp_path / "missing.jsonl")


def test_targets_that_cannot_be_made(capsys, model, questions, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep me")
    budget = ("--drop-layers", 1, "--calibration", questions)
    assert "exists already" in refused(capsys, "compress", model, "--out", taken, *budget)
    assert (taken / "mine.txt").read_text() == "keep me"
    assert "is no folder" in refused(capsys, "compress", model, "--out", tmp_path / "a" / "b", *budget)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_target(capsys, model, questions, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    budget = ("--drop-layers", 1, "--calibration", questions)
    assert "not writable" in refused(capsys, "compress", model, "--out", locked / "out", *budget)


@pytest.mark.slow
@pytest.mark.clean_process
def test_full_disk_before_and_during(capsys, model, questions, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "GB free" in compress_refused(capsys, model, questions)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_ranges, "write_shard", full)
    before = {path.name for path in tmp_path.iterdir()}
    arguments = ["compress", model, "--out", tmp_path / "out", "--drop-layers", "2", "--calibration", questions]
    message = refused(capsys, *arguments)
    assert "is full; nothing was kept of out. Free some space." in message
    assert {path.name for path in tmp_path.iterdir()} - before == {".out.compressing"}, "no part of a checkpoint"
    monkeypatch.undo()
    assert main([*map(str, arguments), "--quiet"]) == 0
    assert not (tmp_path / ".out.compressing").exists()


def test_recipe_mistakes(capsys, model, questions, tmp_path):
    recipe = tmp_path / "r.yaml"
    good = f"model: {model}\ncalibration: {questions}\n"

    def answer(text: str) -> str:
        recipe.write_text(text)
        return refused(capsys, "compress", "--recipe", recipe, "--out", tmp_path / "out")

    assert "did you mean 'drop_layers'" in answer(good + "drop_layer: 2\n")
    assert "localizer 'tiss' is not known: did you mean 'tis'" in answer(good + "drop_layers: 2\nlocalizer: tiss\n")
    assert "no option 'kk'" in answer(good + "drop_layers: 2\nfold: {name: scp, kk: 3}\n")
    assert "needs 'model'" in answer("drop_layers: 2\n")
    assert "is no YAML" in answer("a: [")
    assert "must be a mapping" in answer("- a\n")
    assert "whole number" in answer(good + "drop_layers: many\n")
    assert "exactly one" in answer(good + "drop_layers: 2\ndrop_ratio: 0.5\n")
    assert "no recipe" in refused(capsys, "compress", "--recipe", tmp_path / "no.yaml", "--out", tmp_path / "out")


def test_folders_that_are_not_ours(capsys, model, tmp_path):
    for name in ("verify", "card"):
        assert "no compression.json" in refused(capsys, name, model)
    assert "neither a folder nor a hub id" in refused(capsys, "verify", tmp_path / "none")
    assert "there is no folder" in refused(capsys, "card", tmp_path / "none")
    assert "no compression.json" in refused(capsys, "reproduce", model, "--out", tmp_path / "again")


# --- interruptions ----------------------------------------------------------------------------------------------------


def start(model: Path, questions: Path, out: Path) -> subprocess.Popen[str]:
    """`compress` in a process of its own that stops for a long time in the middle of writing."""
    code = (
        "import time, sys\n"
        "from exporter import cli\n"
        "from exporter.checkpoints import safetensors_ranges\n"
        "def slow(*args):\n"
        "    print('writing', flush=True); time.sleep(600)\n"
        "safetensors_ranges.write_shard = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["compress", model, "--out", out, "--drop-layers", "1", "--calibration", questions, "--samples", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background has it ignored
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.clean_process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_checkpoint(number, model, questions, tmp_path):
    process = start(model, questions, tmp_path / "out")
    before = {path.name for path in tmp_path.iterdir()}
    assert any(".out.partial-" in name for name in before)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "lvlm-exporter: interrupted; the same command goes on from what is saved."
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", ".out.compressing"}, "steps that were finished, and no part of a checkpoint"


@pytest.mark.clean_process
def test_rerun_after_a_kill_needs_no_cleaning(model, questions, tmp_path):
    process = start(model, questions, tmp_path / "out")
    other = start(model, questions, tmp_path / "out2")  # alive: its stage must survive
    process.kill()
    process.wait()
    left = [path for path in tmp_path.iterdir() if ".out.partial-" in path.name]
    assert left
    assert not (tmp_path / "out").exists()
    arguments = ["--drop-layers", "1", "--calibration", str(questions), "--samples", "2"]
    assert main(["compress", str(model), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert not left[0].exists()
    assert [path for path in tmp_path.iterdir() if ".out2.partial-" in path.name]
    other.kill()
    other.wait()


@pytest.mark.clean_process
def test_a_failed_verification_leaves_no_folder(capsys, model, questions, tmp_path, monkeypatch):
    original = write_shards

    def damaged(folder, *arguments):
        original(folder, *arguments)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["language_model.model.layers.0.mlp.down_proj.weight"] *= -1
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(writer, "write_shards", damaged)
    arguments = ["--drop-layers", "1", "--calibration", str(questions), "--samples", "2"]
    assert main(["compress", str(model), "--out", str(tmp_path / "out"), *arguments]) == 1
    assert "lvlm-exporter: out does not verify: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.clean_process
def test_usage_errors_import_no_torch():
    code = "import sys; from exporter.cli import main; print(main(['compress', '--nonsense']), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "2 False\n" and ran.stderr.startswith("lvlm-exporter: the following arguments are required")


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"seed": "x"}, "seed must be a whole number from 0 to"),
        ({"seed": True}, "seed must be a whole number from 0 to"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"revision": 123}, "revision must be a text, not 123: put it in quotes"),
        ({"base_model": "a b"}, r"base_model must be a name on the hub \(USER/NAME\), not 'a b'"),
        ({"base_model": ["a"]}, "base_model must be a name on the hub"),
        ({"model": None}, "model must be a folder or a hub id, not None"),
        ({"drop_layers": True}, "drop_layers must be a whole number, not True"),
        ({"drop_layers": None, "drop_ratio": True}, "drop_ratio must be a number, not True"),
        ({"drop_layers": None, "layers": [True]}, "layers must be a list of layer numbers"),
        ({"calibration": {"data": "q.jsonl", "columns": {"image": 3}}}, "columns must map texts to texts"),
    ],
)
def test_entries_of_a_recipe_that_are_of_another_kind(entries, expected):
    data = {"model": "m", "calibration": "q.jsonl", "drop_layers": 1} | entries
    if entries.get("drop_layers", 1) is None:
        del data["drop_layers"]
    with pytest.raises(InputError, match=expected):
        recipe_from_data(data)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--layers", ""), "'' is no list of layers"),
        (("--layers", "1,,2"), "'1,,2' is no list of layers"),
        (("--layers", "1", "--calibration", ""), "no file or folder ''"),
        (("--layers", "1", "--calibration", "datasets:"), "names no data set"),
        (("--layers", "1", "--base-model", "a b"), "base_model must be a name on the hub"),
    ],
)
def test_empty_flags_are_no_silent_choice(flags, expected, capsys, model, questions, tmp_path):
    given = () if "--calibration" in flags else ("--calibration", questions)
    assert expected in refused(capsys, "compress", model, "--out", tmp_path / "out", *given, *flags)


def test_too_little_memory_is_one_sentence():
    """torch has a class for it on GPUs only."""
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), _refused_allocation()):
        assert "out of memory: lower --batch-size" in (reason_of(error) or "")
    assert reason_of(RuntimeError("another")) is None


def _refused_allocation() -> RuntimeError:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("no machine has an exabyte")
