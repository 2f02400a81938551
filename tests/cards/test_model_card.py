"""Cards of checkpoints: figures under their own budget, a person's text through every subcommand, broken periods."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import build

from exporter.benchmark.bench import bench
from exporter.benchmark.figures import BenchOptions
from exporter.benchmark.workload import Workload
from exporter.cards.card_file import OUR_METRIC
from exporter.cards.model_card import sureness
from exporter.checkpoints.choice_types import FoldPart, JudgedPart, RunnerUp
from exporter.checkpoints.record import read_record, write_record
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.evaluation.metrics.task import Measure
from exporter.publishing.folder_kinds import card
from exporter.recipe import RunOptions
from exporter.routing.requests import BudgetGrid

pytestmark = pytest.mark.slow

TOKENS = {"max_new_tokens": 4, "options": RunOptions(batch_size=5)}
OWN = "\nThanks to everybody.\n"
QUICK = BenchOptions(device="cpu", new_tokens=1, rounds=2)


@pytest.fixture
def folder(routed_folder, tmp_path) -> Path:
    return Path(shutil.copytree(routed_folder, tmp_path / "routed"))


def results(folder: Path) -> dict[str | None, float]:
    """Of each budget the figure, as the hub reads the card."""
    found = ModelCard.load(folder / "README.md").data.eval_results or []
    assert len({result.unique_identifier for result in found}) == len(found)
    return {result.dataset_config: result.metric_value for result in found}


def test_every_figure_stands_under_its_own_budget_as_the_hub_reads_the_card(folder, tiny, task):
    done = evaluate([folder], task, budgets=BudgetGrid((6, 0.5), (4,), presets=("fast", "off")), **TOKENS)
    expected = {
        None if model.budget is None else model.label.partition("(")[2][:-1]: round(model.accuracy, 4)
        for model in done.models
    }
    assert len(expected) == 4 and results(folder) == expected
    for _ in range(2):
        evaluate([folder], task, budgets=BudgetGrid(presets=("fast",)), **TOKENS)
        assert results(folder) == expected


def test_tasks_of_one_name_and_several_references_stand_apart(folder, tiny, task, tmp_path):
    other = tmp_path / task.name
    lines = [json.loads(line) for line in task.read_text().splitlines()]
    other.write_text("".join(json.dumps(line | {"answer": "nothing like it"}) + "\n" for line in lines[1:]))
    evaluate([folder], task, reference=tiny("llava"), **TOKENS)
    evaluate([folder], other, reference=tiny("llava"), **TOKENS)
    found = ModelCard.load(folder / "README.md").data.eval_results
    assert [result.metric_value for result in found] == [0.5, 0.0]
    assert len({result.dataset_revision for result in found}) == 2
    copy = shutil.copytree(tiny("llava"), tmp_path / "another")
    evaluate([folder], task, reference=copy, **TOKENS)
    evaluate([folder], task, reference=copy, **TOKENS)  # replaces its own only
    entries = read_record(folder).to_data()["evaluations"]
    assert [entry["reference_name"] for entry in entries] == ["model", "model", "another"]
    text = (folder / "README.md").read_text()
    assert text.count(f"| {task.name} | 12 | 50.0 % (") == 2 and ", another |" in text and ", model |" in text
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == 2  # one figure of one task


def test_what_a_person_wrote_is_kept_by_every_subcommand(folder, tiny, task, capsys):
    path = folder / "README.md"
    text = path.read_text().replace("---\n\n<!--", "language: de\n---\n\n<!--", 1) + OWN
    path.write_text(text.replace("# routed\n", "# routed\n\nMade by me.\n"))
    assert main(["card", str(folder)]) == 0
    evaluate([folder], task, reference=tiny("llava"), **TOKENS)
    bench([folder], reference=tiny("llava"), workload=Workload(visual_tokens=25, text_tokens=20), options=QUICK)
    card(folder, "me/routed")
    text = path.read_text()
    assert text.endswith(OWN) and "# routed\n\nMade by me.\n" in text and "\nlanguage: de\n" in text
    assert "50.0 % (" in text and "How fast it is" in text and 'from_pretrained("me/routed"' in text
    card(folder)
    assert 'from_pretrained("me/routed"' in path.read_text()  # what the hub calls it stays


def test_a_folder_that_can_not_be_written_costs_no_result(folder, task, monkeypatch, caplog, capsys):
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system", "compression.json")

    before = (folder / "README.md").read_bytes()
    monkeypatch.setattr("exporter.evaluation.results.write_record", refuse)
    assert main(["evaluate", str(folder), "--task", str(task), "--preset", "fast", "--samples", "4", "--quiet"]) == 0
    assert "exact match" in capsys.readouterr().out
    assert f"{folder}: its record and its card were not updated (Read-only file system)" in caplog.text
    assert (folder / "README.md").read_bytes() == before
    bench([folder], workload=Workload(visual_tokens=25, text_tokens=20), budgets=[{"preset": "off"}], options=QUICK)


def test_a_card_that_is_a_link_is_refused_before_the_work(folder, task, tmp_path):
    (folder / "README.md").rename(tmp_path / "elsewhere.md")
    (folder / "README.md").symlink_to(tmp_path / "elsewhere.md")
    before = (tmp_path / "elsewhere.md").read_bytes()
    with pytest.raises(InputError, match=r"README\.md is a link that leads out of the folder"):
        evaluate([folder], task, samples=4, **TOKENS)
    assert (tmp_path / "elsewhere.md").read_bytes() == before


def test_a_card_says_how_far_the_runner_up_is_beyond_its_noise():
    chosen, without = JudgedPart(0.02, (0.01, 0.03), 64), JudgedPart(0.09, (0.05, 0.13), 64, 0.07, 0.01)
    near = RunnerUp(0.03, (0.01, 0.05), 64, 0.01, 0.008, name="scp")
    text = sureness(FoldPart("reconstruction", "", (), {}, chosen, without, near))
    assert "without a fold it would be 0.0900, with the runner-up, `scp`, 0.0300." in text
    assert "0.0100 ± 0.0080 nats a token more (paired, ± its standard error over pictures, within its noise)" in text
    text = sureness(
        FoldPart("none", "", (), {}, chosen, chosen, RunnerUp(0.01, (0.0, 0.02), 64, -0.01, 0.004, name="scp"))
    )
    assert "`scp` it would be 0.0100 ± 0.0040 nats a token less (paired, ± its standard error over pictures)." in text
    assert sureness(FoldPart("none", ": why", ())) == ""


@pytest.mark.parametrize("key", ["source", "plan", "scores", "fold", "measured", "evaluations", "versions"])
@pytest.mark.parametrize("value", [None, [], {}, 3, "gone"])
def test_a_damaged_record_is_one_sentence(key, value, folder):
    record = read_record(folder).to_data()
    if value == "gone":
        del record[key]
    else:
        record[key] = value
    write_record(folder, record)
    if (key, value) == ("evaluations", []):
        card(folder)
        return
    with pytest.raises(
        InputError, match=r"compression\.json is damaged \(.*\): take it from where the checkpoint was made"
    ):
        card(folder)


def test_the_card_says_how_each_program_passes_a_budget_and_what_was_run(folder):
    record = read_record(folder).to_data()
    presets = {"quality": {"keep_visual_tokens": 0.5}, "fast": {"keep_visual_tokens": 0.25, "keep_layers": 5}}
    record["router"] = {
        "parameters": 10, "questions": 8, "held_out": 2, "curve": [{"step": 1, "loss": 0.5, "KL": 0.1}],
        "settings": {"drop_at": 2, "presets": presets, "default": "quality", "candidates": [4, 5]},
        "reference": record["reference"],
    }  # fmt: skip
    write_record(folder, record)
    text = card(folder).read_text()
    for words in (
        'pipe(…, generate_kwargs={"preset": "fast"})',
        "--gen_kwargs preset=fast",
        'exporter.onnx.load(FOLDER).generate(**inputs, preset="fast")',
        'exporter.set_default(FOLDER, "fast")',
        "none: it runs the plain model",
        "version 0.32 on a CPU in November 2026, nine model families",
        "**Other engines**, SGLang among them, were not run.",
    ):
        assert words in text
    assert "SGLang load" not in text
    assert "leave the sequence and the key-value cache before layer 2. Layers" in text
    assert "past_key_values=cache, reversible=True)`, said in every turn, chooses them anew" in text
    record["router"]["settings"]["read_at"] = 0
    write_record(folder, record)
    assert "cache before layer 2; the router reads the embeddings. Layers" in card(folder).read_text()


def test_a_broken_period_is_warned_of_and_stands_in_the_card(questions, tmp_path, unverified, caplog, capsys):
    model = build("gemma3", tmp_path / "model")
    options = ["--calibration", str(questions), "--samples", "2", "--quiet"]
    out = tmp_path / "small"
    command = ["compress", str(model), "--out", str(out), *options, "--layers", "1"]
    assert main([*command, "--dry-run"]) == 0
    warning = "the kept layers break the period of 3 layers in layer_types: layer 1 (layer 2 of the base model) is"
    assert warning in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        assert main(command) == 0
    assert warning in caplog.text
    text = (out / "README.md").read_text()
    assert warning in text and "llama.cpp and mlx-vlm" in text
    dry = ["--drop-layers", "2", "--dry-run"]
    assert main(["compress", str(model), "--out", str(tmp_path / "b"), *options, *dry]) == 0
    assert "has a period of 3 layers, which the kept layers will break unless" in capsys.readouterr().err
    caplog.clear()
    whole = ["--layers", "0,1,2"]
    assert main(["compress", str(model), "--out", str(tmp_path / "c"), *options, *whole]) == 0
    assert "period" not in caplog.text and "the period of" not in (tmp_path / "c" / "README.md").read_text()


def test_a_figure_is_called_by_its_metric_everywhere(folder, tiny, task, questions, tmp_path, capsys):
    """POPE's accuracy is not called exact match in the card, the model-index, a comparison's table or its picture."""
    path = tmp_path / "pope.jsonl"
    lines = [json.loads(line) | {"category": "random"} for line in task.read_text().splitlines()]
    said = [line | {"answer": ("yes", "no")[number % 2]} for number, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    wanted = BudgetGrid(presets=("off", "fast"))
    evaluate([folder], path, reference=tiny("llava"), measure=Measure("pope"), budgets=wanted, **TOKENS)
    text = (folder / "README.md").read_text()
    assert "exact match" not in text and "Exact match" not in text
    assert "| pope.jsonl (POPE accuracy) | 12 |" in text and "*Kept* is this model's POPE accuracy" in text
    assert "| decoder FLOPs | POPE accuracy |" in text
    assert "What the metric of pope.jsonl (POPE accuracy) tells beside" in text and "| F1 |" in text
    (result, *_) = ModelCard.load(folder / "README.md").data.eval_results
    assert result.metric_type == "pope" and result.metric_name.startswith("POPE accuracy, n=12, ")
    assert OUR_METRIC.match("judge's score, n=3, 95% CI ")  # so that it is known for ours
    evaluate([folder], task, reference=tiny("llava"), **TOKENS)
    text = (folder / "README.md").read_text()
    assert "which stands in brackets behind the task where it is not exact match" in text
    assert f"| {task.name} | 12 |" in text and "*Kept* is this model's score as a share" in text
    recipe = tmp_path / "compare.yaml"
    grid = {"model": str(tiny("llava")), "calibration": {"data": str(questions), "samples": 4}, "drop_layers": [1],
            "localizers": ["block_influence"], "folds": ["none"]}  # fmt: skip
    pope = {"data": str(path), "metric": "pope"}
    for shape in ({"task": pope}, {"tasks": {"hallucinations": pope, "others": str(task)}}):
        recipe.write_text(yaml.safe_dump(grid | shape))
        out = tmp_path / next(iter(shape))
        assert main(["compare", str(recipe), "--out", str(out), "--quiet", "--batch-size", "6"]) == 0
        printed = capsys.readouterr().out
        assert "POPE accuracy %" in printed or "hallucinations (POPE accuracy)" in printed
        assert ("exact match" in printed) == ("tasks" in shape)
    assert json.loads((tmp_path / "task" / "results.json").read_text())["metric"] == "POPE accuracy"
