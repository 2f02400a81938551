"""What examples/serving compares on a trained folder, with transformers' answers in the place of vLLM's.

`make serve-test` asks vLLM itself.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from exporter.data.task import Task

SERVING = Path(__file__).parents[2] / "examples" / "serving"
MODULES = ("against_vllm", "ask_vllm", "environment", "in_transformers", "rows", "tiny_folders", "trained")
QUESTIONS = 9  # one of each budget
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def serving():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVING))
        import against_vllm

        yield against_vllm
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rows(serving, tiny, task, tmp_path_factory):
    """The rows of a tiny folder with a serving router, answered in as many tokens as the task's answers have."""
    place = tmp_path_factory.mktemp("serving")
    folder = Path(shutil.copytree(tiny("llava"), place / "model"))
    patch = pytest.MonkeyPatch()
    patch.setattr(Task, "longest", lambda *_: 4)
    asked = list(
        serving.trained_rows("tiny", serving.add_router(folder), task, QUESTIONS, work=place, budgets=serving.BUDGETS)
    )
    for row in asked:
        row.engine()
        row.ask_transformers()
        row.vllm = {"rounds": [[dict(answer) for answer in row.torch] for _ in range(row.times)]}
    yield asked
    patch.undo()


def test_questions_are_put_under_every_budget_and_every_preset(serving, rows):
    mixed, presets = rows
    assert [set(q.budget) for q in mixed.questions] == [set(budget) for budget in serving.BUDGETS]
    assert all(q.budget["question_ids"] != [33, 52] for q in mixed.questions if "question_ids" in q.budget)  # its own
    assert [preset.name for preset in presets.presets] == ["off", "serve-accurate", "serve-balanced", "serve-fast"]
    assert [q.budget for q in presets.questions[:QUESTIONS]] == [{"preset": "off"}] * QUESTIONS


def test_equal_answers_are_rated_as_evaluate_rates_them(rows):
    mixed, presets = rows
    assert mixed.holds and presets.holds
    assert mixed.lines() == [
        f"| tiny, budgets in turn | {QUESTIONS} of {QUESTIONS} | {QUESTIONS} of {QUESTIONS} | – | – |"
    ]
    lines = presets.lines()
    assert [preset.right for preset in presets.presets] == [preset.evaluated for preset in presets.presets]
    assert 0 < presets.presets[0].right < 1
    assert lines[0].startswith(f"| tiny, off | {QUESTIONS} of {QUESTIONS} | – | ")


def test_one_other_answer_is_seen(rows):
    mixed, presets = rows
    mixed.vllm["rounds"][1][3]["tokens"] = []
    presets.vllm["rounds"][0][QUESTIONS]["tokens"] = []
    assert not mixed.holds and f"{QUESTIONS - 1} of {QUESTIONS} | – | – |" in mixed.lines()[0]
    assert not presets.holds and f"serve-accurate | {QUESTIONS - 1} of {QUESTIONS}" in presets.lines()[1]


def test_gemma_has_to_answer_as_with_causal_attention_and_not_as_without(serving, tiny, tmp_path):
    row = serving.Row("plain", "gemma3", tiny("gemma3"), list(serving.asked("gemma3", 4, tmp_path)))
    row.ask_transformers()
    assert [one["prompt"] for one in row.torch] == [one["prompt"] for one in row.causal]
    row.vllm = {"rounds": [[dict(answer) for answer in row.causal]]}
    assert row.holds and row.lines()[0].endswith("of 4; 4 of 4 with causal attention |")
    row.vllm = {"rounds": [[dict(answer) for answer in row.torch]]}
    assert not row.holds and "| 4 of 4 | 4 of 4; " in row.lines()[0]
    row.vllm = {"rounds": [[{**answer, "tokens": []} for answer in row.causal]]}
    assert not row.holds


def test_routers_of_tiny_folders_are_of_the_form_that_is_trained(serving, tiny, tmp_path):
    from transformers import AutoConfig

    from exporter.modeling.served_router import ServingSettings
    from exporter.routing.serving.settings import serving_settings

    folder = serving.add_router(Path(shutil.copytree(tiny("llava"), tmp_path / "model")))
    config = AutoConfig.from_pretrained(folder)
    trained = {**serving_settings(config, question_aware=True), "bottleneck": 32, "num_heads": 4}
    assert ServingSettings.of(config) == ServingSettings(**trained)


def test_a_folder_and_its_questions_belong_together(serving, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["against_vllm.py", "--folder", "model"])
    with pytest.raises(SystemExit):
        serving.main()
    assert "--folder and --task belong together" in capsys.readouterr().err
