"""Plans for published models: their configurations give the parameters that were published, and the table says so."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
sys.path[:0] = [str(RECIPES)]

import hollow  # noqa: E402
import plans  # noqa: E402

from exporter.checkpoints.weight_files import open_weights  # noqa: E402
from exporter.compression.estimate import Rates, estimate  # noqa: E402
from exporter.models.flops import active_parameters  # noqa: E402
from exporter.recipe import load_recipe  # noqa: E402

RATES = Rates(989e12 * 0.4, 3e9)  # the defaults, with which the table was made


def table() -> dict[str, list[str]]:
    """Return the cells of the table in the document, by recipe."""
    lines = re.findall(r"^\| \[([\w.-]+)\]\(.*?\) \| (.*) \|$", (RECIPES / "README.md").read_text(), flags=re.M)
    return {name: cells.split(" | ") for name, cells in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", plans.ROWS)
def test_parameters_and_bytes_are_those_of_the_published_model(name, tmp_path):
    """Parameters against the hub's figure; bytes against the files and what was built on the meta device."""
    folder = hollow.write_hollow(hollow.published(name), tmp_path / name)
    weights = open_weights(folder)
    assert f"{weights.num_parameters / 1e9:.3g}B" == plans.ROWS[name].published
    built = sum(parameter.numel() for parameter in hollow.meta_model(folder).parameters())  # tied ones once
    assert weights.num_parameters == built and weights.num_bytes == 2 * built
    files = [shard.path.stat() for shard in weights.shards]
    assert sum(file.st_size for file in files) >= weights.num_bytes
    assert sum(512 * file.st_blocks for file in files) < 2**20 + 2**13 * len(files)  # holes take no place
    cells = table()[name]
    assert cells[0] == f"{built / 1e9:,.2f}B" and cells[3] == f"{2 * built / 1e9:,.1f}"


@pytest.mark.slow
def test_a_row_of_the_table_is_what_the_command_prints(tmp_path):
    job = plans.hollow_job(plans.ROWS["smolvlm2-2.2b"], tmp_path, (1024, 768))
    guess = estimate(job, RATES)
    assert plans.line("smolvlm2-2.2b", job, guess) in (RECIPES / "README.md").read_text().splitlines()
    twice = estimate(job, Rates(2 * RATES.flops_per_second, 2 * RATES.bytes_per_second))
    assert twice.seconds == pytest.approx(guess.seconds / 2) and twice.flops == guess.flops


@pytest.mark.slow
def test_of_experts_those_count_that_run(tmp_path):
    """Qwen3-VL-235B-A22B is named after what a token runs through; 8 of 128 experts in each of 94 layers."""
    folder = hollow.write_hollow(hollow.published("qwen3-vl-235b-a22b"), tmp_path / "model")
    weights, config = open_weights(folder), AutoConfig.from_pretrained(folder)
    in_layers = re.compile(r"model\.language_model\.layers\.(\d+)\.")
    source = SimpleNamespace(
        num_layers=94,
        config=config,
        weights=weights,
        layer_of=lambda name: int(match[1]) if (match := in_layers.match(name)) else None,
    )
    idle = 94 * 120 * 3 * 4096 * 1536  # of gate, up and down in 120 experts
    inside = sum(entry.num_parameters for name, entry in weights.entries.items() if in_layers.match(name))
    assert sum(active_parameters(source)) == inside - idle
    active = (weights.num_parameters - idle) / 1e9
    assert round(active) in (22, 23) and table()["qwen3-vl-235b-a22b"][1] == f"{active:,.2f}B"
    assert all(cells[0] == cells[1] for name, cells in table().items() if name != "qwen3-vl-235b-a22b")


def test_each_recipe_has_a_row_and_says_the_memory_that_it_needs():
    for name, row in plans.ROWS.items():
        path = RECIPES / f"{name}.yaml"
        recipe, asks = load_recipe(path), re.search(r"--memory (\w+)(?: --batch-size (\d+))? --out", path.read_text())
        assert recipe.calibration.samples == 128 and (asks and asks[1]) == row.memory, name
        assert (asks and asks[2]) == (row.batch_size and str(row.batch_size)), name
        assert (table()[name][8] != "-") == (row.memory is not None)
        assert float(table()[name][7]) < plans.GPU_BYTES / 1e9, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl3-78b"])
def test_what_is_larger_than_a_gpu_fits_it_with_its_options(name, tmp_path):
    """By the real configuration; questions at a time count where a picture is thousands of tokens."""
    job = plans.hollow_job(plans.ROWS[name], tmp_path, (1024, 768))
    guess = estimate(job, RATES)
    assert guess.memory_bytes < plans.GPU_BYTES and plans.line(name, job, guess) in (
        (RECIPES / "README.md").read_text().splitlines()
    )
    by_eight = dataclasses.replace(job, options=dataclasses.replace(job.options, memory=plans.SHARE, batch_size=8))
    assert estimate(by_eight, RATES).memory_bytes > plans.GPU_BYTES
