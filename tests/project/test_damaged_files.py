"""Files that were damaged in one way or another: each a sentence. Found by the fuzzer, kept here one by one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jinja2.sandbox
import pytest
from fixtures.made_folders import edit

from exporter.cards.card_file import front_matter
from exporter.checkpoints.config_file import check_generation_config
from exporter.checkpoints.router_entry import read_settings
from exporter.checkpoints.shapes import Misfit
from exporter.checkpoints.source import open_source
from exporter.clean_room import PromptError, processing
from exporter.cli.exit_codes import complain
from exporter.comparison.cells_file import CellsFile
from exporter.comparison.grid import Comparison, cell_from_data, grid_from_data
from exporter.comparison.routes import row_from_data, tables_from_data
from exporter.comparison.saved import write_all
from exporter.comparison.zoo import zoo_from_data
from exporter.data.tables import open_table
from exporter.errors import InputError
from exporter.onnx.manifest import differing_facts, model_facts
from exporter.onnx.rows import SUPPORTED
from exporter.onnx.support import cache_kind, support_of
from exporter.pipeline import score
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RunOptions, load_recipe
from exporter.routing.settings import default_settings

GOOD = "model: m\ncalibration: q.jsonl\ndrop_layers: 1\n"
GRID = {"model": "m", "calibration": "q", "task": "t", "localizers": ["first"], "folds": ["none"], "drop_layers": [1]}
CELL = {
    "localizer": "first", "fold": "none", "drop": [1], "parameters": 10, "n": 2, "accuracy": 0.5,
    "interval": [0.1, 0.9],
    "kept": 1.0, "by_type": {"all": 0.5}, "kl": 0.1, "agreement": 0.9, "wrong": [0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("when: 2026-13-45\n", "is no YAML: month must be in 1..12"),
        ("seed: soon\n", "seed must be a whole number from 0 to 4294967295, not 'soon'"),
        ("seed: true\n", "seed must be a whole number from 0 to 4294967295, not True"),
        ("revision: 3\n", "revision must be a text, not 3"),
        ("protect: [true]\n", "protect must be a list of layer numbers"),
        ("1: 2\n", "has no key '1'"),
        ("drop_ratio: .nan\n", "drop_ratio must be a number, not nan"),
        ("calibration: {data: q, columns: {image: 3}}\n", "columns must map texts to texts"),
        ("x: &x [*x]\n", "has no key 'x'"),
    ],
)
def test_recipes(more, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    key = more.partition(":")[0]
    path.write_text("".join(line for line in GOOD.splitlines(True) if not line.startswith(f"{key}:")) + more)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)


def test_what_is_no_recipe_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "latin").write_bytes(b"model: caf\xe9\n")
    for name, expected in (
        ("pipe", "no regular file"),
        ("zeros", "no regular file"),
        ("latin", "no YAML"),
        ("", "a folder"),
    ):
        with pytest.raises(InputError, match=expected):
            load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task_samples": "3"}, "task_samples must be a whole number"),
        ({"task_samples": None}, None),
        ({"task": ["t"]}, "task must be a mapping"),
        ({"seed": -1}, "seed must be a whole number from 0 up"),
    ],
)
def test_comparisons(change, expected):
    if expected is None:
        assert grid_from_data(GRID | change).task_samples is None
        return
    with pytest.raises(InputError, match=expected):
        grid_from_data(GRID | change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"calibration": 3}, "calibration must be a text or null"),
        ({"rows": [{"name": ["a"]}]}, "name must be a text"),
        ({"rows": [{"name": "a", "drop_at": "2"}]}, "drop_at must be a whole number"),
        ({"budgets": [{"keep_layers": [1]}]}, "keep_layers must be a whole number"),
        ({"oracle": {"swaps": None}}, "swaps must be a whole number"),
    ],
)
def test_comparisons_of_routes(change, expected):
    data = {"model": "m", "task": "t", "rows": [{"name": "a", "rule": "random"}], "budgets": [{"keep_layers": 2}]}
    with pytest.raises(InputError, match=expected):
        tables_from_data(data | change)


@pytest.mark.parametrize("name", ["../out", "a/b", "", "x\0", 3, ["a"]])
def test_a_model_of_the_zoo_has_the_name_of_a_folder(name):
    with pytest.raises(InputError, match="a model of the zoo is called"):
        zoo_from_data({"models": [{"name": name, **GRID}]})


# --- what long runs keep ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"localizer": 3}, "cell 1 \\('localizer' is not a text\\)"),
        ({"wrong": [None]}, "'wrong\\[0\\]' is not a whole number"),
        ({"kl": float("nan")}, "'kl' is not a number from 0 up"),
    ],
)
def test_a_damaged_cell_is_named(change, expected, tmp_path):
    path = tmp_path / "out" / "cells.jsonl"
    CellsFile(path, "asked").add([CELL])
    assert [cell.localizer for cell in CellsFile(path, "asked").read(cell_from_data)] == ["first"]
    path.unlink()
    CellsFile(path, "asked").add([CELL | change])
    with pytest.raises(InputError, match=expected):
        list(CellsFile(path, "asked").read(cell_from_data))
    with pytest.raises(Misfit, match=r"'cells\[0\].budget' is no JSON object"):
        row_from_data({"row": "a", "cells": [{"row": "a", "column": 0, "budget": 3}]})


def test_a_cell_that_says_something_else_than_what_was_written_is_refused(tmp_path):
    """Whatever the change: of a legal value into another one as well."""
    path = tmp_path / "out" / "cells.jsonl"
    CellsFile(path, "asked").add([CELL, CELL | {"fold": "scp"}])
    first, second = path.read_text().splitlines()
    for change in (("0.1,", "0.2,"), ('"all"', '"allx"'), ('"index": 0', '"index": 5'), ('"none"', '"scp"')):
        path.write_text(first.replace(*change, 1) + f"\n{second}\n")
        assert change[0] in first
        with pytest.raises(InputError, match="line 1 is not what was written, its checksum is another: take the line"):
            CellsFile(path, "asked")
    path.write_text(second + "\n")  # as the message says: that cell alone is done again, and none is lost by it
    kept = CellsFile(path, "asked")
    kept.add([CELL])
    assert [cell["fold"] for cell in CellsFile(path, "asked").cells] == ["scp", "none"]


def test_cells_of_an_earlier_version_have_no_checksum(tmp_path):
    path = tmp_path / "out" / "cells.jsonl"
    CellsFile(path, "asked").add([CELL])
    path.write_text(path.read_text().partition(', "checksum"')[0] + "}\n")
    assert CellsFile(path, "asked").cells == [CELL]


def test_results_whose_best_cell_is_none_of_the_cells_are_made_again(tmp_path):
    data = {
        "original": {"n": 2, "accuracy": 0.5, "interval": [0.1, 0.9]}, "parameters": 20, "cells": [CELL],
        "seconds": 1.0, "naive_seconds": 1.0, "best": {"1": CELL}, "num_layers": 2, "counts": [1], "ratios": [],
        "refused": {}, "metric": "exact", "task_uses": None,
    }  # fmt: skip
    assert Comparison.from_data(data, tmp_path).best[1].wrong == (0,)
    for best in ({"1": CELL | {"wrong": [1]}}, {"2": CELL}):
        with pytest.raises(Misfit, match="is none of its cells"):
            Comparison.from_data(data | {"best": best}, tmp_path)


def test_results_that_cannot_be_written_are_said_and_cost_nothing(tmp_path, caplog):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING):
        assert not write_all(tmp_path / "out", {"table.md": "x"}, {"accuracy.png": full}, {})
    assert f"{tmp_path / 'out'} can't be written: No space left on device" in caplog.text
    (tmp_path / "out" / "results.json").mkdir()
    assert not write_all(tmp_path / "out", {}, {}, {})
    assert f"{tmp_path / 'out' / 'results.json'} can't be written: Is a directory" in caplog.text
    (tmp_path / "out" / "results.json").rmdir()
    assert not (tmp_path / "out" / "results.json").exists()
    assert write_all(tmp_path / "out", {"table.md": "x"}, {}, {"a": 1})
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"a": 1}


# --- settings of models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": "2"}', "generation_config.json"),
        ('{"eos_token_id": [2, true]}', "generation_config.json"),
        ('{"bos_token_id": -1}', "generation_config.json"),
        ("{", "generation_config.json"),
        ("[]", "generation_config.json"),
    ],
)
def test_generation_settings(content, expected, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=expected):
        check_generation_config("model", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3], "pad_token_id": -1}')
    check_generation_config("model", tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"candidates": None}, "'router.candidates' is not a list"),
        ({"bottleneck": "8"}, "'router.bottleneck' is not a whole number from 1 up"),
        ({"presets": {"fast": []}}, "'router.presets.fast' is no JSON object"),
        ({"presets": {"balanced": {"keep_layers": 99}}}, "keep_layers=99 is out of range"),
        ({"drop_at": 99}, "read_at=2 and drop_at=99 must be ordered"),
        ({"unknown": 1}, "router has no setting 'unknown'"),
    ],
)
def test_router_settings(change, expected, tiny):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny("llava"))
    config.router = default_settings(config)
    assert read_settings(config, "model").drop_at == 2
    config.router = config.router | change
    with pytest.raises(InputError, match=expected):
        read_settings(config, "model")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_std": [0.5, float("inf"), 0.5]}, "image_std=\\[0.5, inf, 0.5\\]; finite numbers above 0 are needed"),
        ({"image_mean": ["0.5"]}, "image_mean=\\['0.5'\\]; finite numbers are needed"),
        ({"rescale_factor": 0}, "rescale_factor=0; finite numbers above 0"),
    ],
)
def test_numbers_that_images_are_scaled_by(change, expected, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llava"), tmp_path / "model"))
    edit(folder / "preprocessor_config.json", lambda settings: settings.update(change))
    with pytest.raises(InputError, match=expected):
        open_source(str(folder))


@pytest.mark.parametrize("layer", [99, -8, "2", [1, 99], True])
def test_layers_of_the_vision_tower_that_there_are_not(layer, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llava"), tmp_path / "model"))
    edit(folder / "config.json", lambda config: config.update(vision_feature_layer=layer))
    with pytest.raises(InputError, match="vision_feature_layer"):
        open_source(str(folder))


def test_a_template_that_takes_hours_is_broken_off(monkeypatch):
    monkeypatch.setattr(processing, "TEMPLATE_S", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    rendered = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(loops)
    processor = SimpleNamespace(chat_template=loops, apply_chat_template=lambda chat, **_: rendered.render())
    with pytest.raises(PromptError, match=r"the chat template fails .TimeoutError: it takes over 0\.05 s"):
        processing.render(processor, [])
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_card_whose_metadata_hold_themselves(tmp_path):
    card = "---\nlicense: &a [*a]\n---\n# By hand\n"
    assert front_matter(card) == {}


def test_a_message_has_an_end(capsys):
    assert complain("x" * 10_000, 2) == 2
    assert len(capsys.readouterr().err) < 1300


def test_a_message_is_one_line_that_a_terminal_shows_as_it_is(capsys):
    """Names come out of files: with line ends, colours, or marks that turn the direction of writing."""
    assert complain("'a\u202e\u2028b\x1b[31m\nc\ud800é\t' is no name.", 2) == 2
    assert capsys.readouterr().err == "lvlm-exporter: 'a\\u202e b\\x1b[31m c\\ud800é\\t' is no name.\n"


@pytest.mark.parametrize("family", SUPPORTED)
def test_an_onnx_manifest_says_what_config_json_says(family, tiny):
    from transformers import AutoConfig

    folder = tiny(family)
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    facts = {
        **model_facts(config, support_of(config)),
        "layers": 6,
        "heads": text.num_key_value_heads,
        "head_size": 16,
        "dtype": "float32",
        "device": "cpu",
        "cache": cache_kind(config, "float32", "cpu"),
    }
    manifest = json.loads(json.dumps(facts))
    assert differing_facts(folder, manifest) == []
    told = differing_facts(folder, manifest | {"layers": 5, "vision": {}})
    assert len(told) == 2
    assert "onnx.json says layers=5, config.json 6" in told[1]


def test_a_parquet_file_without_rows_is_one_sentence(tmp_path, capfd):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    table = pyarrow.table(
        {"image": pyarrow.array([], pyarrow.string()), "question": pyarrow.array([], pyarrow.string())}
    )
    parquet.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(InputError):
        open_table(str(tmp_path / "q.parquet"), {}, None, None)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_longest_parts_of_the_default_localizer_have_bars(tiny, questions):
    shown: dict[str, int] = {}

    def progress(items, what, total):
        for item in items:
            shown[what] = shown.get(what, 0) + 1
            yield item

    recipe = Recipe(str(tiny("llava")), CalibrationData(str(questions)), LayerBudget(drop_layers=2))
    score(recipe, RunOptions(batch_size=4), progress)
    assert shown["leave layers out"] >= 3  # batches of each time that sets are judged
    assert shown["fold sets of layers"] >= 2  # sets
