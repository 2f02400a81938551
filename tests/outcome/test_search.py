"""A search on a tiny model: what it leaves, what it goes on from, and what it says where a goal is not met."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
from fixtures.checkpoints import verify_in_this_process

import exporter
from exporter.cli.entry import main
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.outcome import workshop
from exporter.outcome.candidate import Candidate, Mix
from exporter.outcome.goal import SearchGoal, SearchRecipe
from exporter.outcome.job import prepare_search
from exporter.outcome.search import search
from exporter.outcome.step_costs import StepCosts
from exporter.outcome.workshop import Workshop
from exporter.publishing.folder_kinds import verify
from exporter.recipe import CalibrationData, RunOptions, TaskData, load_recipe

pytestmark = pytest.mark.slow

OPTIONS = RunOptions("cpu", batch_size=6)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    verify_in_this_process(monkeypatch)
    monkeypatch.setattr(workshop, "ROUNDS", 2)
    monkeypatch.setattr("exporter.data.task.Task.longest", lambda self, processor: 4)  # as the task was made


@pytest.fixture
def asked(tiny, questions, task):
    def make(**changes) -> SearchRecipe:
        model = str(tiny("llava"))
        parameters = exporter_parameters(model)
        goal = changes.pop("goal", SearchGoal(params=parameters - 1))
        given = {"without": ("heal", "router", "int8"), "max_loss": 100.0} | changes
        return SearchRecipe(model, CalibrationData(str(questions), samples=12), TaskData(str(task)), goal, **given)

    return make


def exporter_parameters(model: str) -> int:
    from exporter.checkpoints.source import open_source

    return open_source(model).weights.num_parameters


def steps(out) -> list[dict]:
    return [json.loads(line)["cell"] for line in (out / "steps.jsonl").read_text().splitlines()]


def test_a_search_writes_what_it_chose_and_the_others_as_recipes(asked, tmp_path):
    out = tmp_path / "found"
    done = search(asked(), out, OPTIONS)
    assert done.met and done.chosen == out / "chosen"
    assert [one.candidate for one in done.candidates] == [Candidate(1)]
    assert verify(out / "chosen").holds
    told = json.loads((out / "search.json").read_text())
    assert told["met"] and told["complete"] and "1 layer gone" in told["verdict"]
    assert told["candidates"][0]["figures"]["parameters"] == exporter_parameters(str(out / "chosen"))
    assert sum(told["candidates"][0]["figures"]["ms"].values()) > 0
    assert load_recipe(out / "recipes" / "drop1.yaml").budget.drop_layers == 1
    assert (out / "front.png").stat().st_size > 1000 and "| 1 layer gone |" in (out / "table.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        "answers.jsonl", "chosen", "front.png", "recipes", "search.json", "steps.jsonl", "table.md"
    }  # fmt: skip
    before = steps(out)
    again = search(asked(), out, OPTIONS)  # nothing is looked at a second time
    assert steps(out) == before and again.verdict == done.verdict and verify(out / "chosen").holds
    with pytest.raises(InputError, match="holds another search: name another folder"):
        search(asked(max_loss=50.0), out, OPTIONS)


def test_a_search_that_was_interrupted_goes_on(asked, tmp_path, monkeypatch):
    out = tmp_path / "found"
    measured: list[Any] = []
    wanted = asked(goal=SearchGoal())
    real = Workshop.measure

    def once(self, candidate, answer_tokens):
        if measured:
            raise KeyboardInterrupt
        measured.append(candidate)
        return real(self, candidate, answer_tokens)

    monkeypatch.setattr(Workshop, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        search(wanted, out, OPTIONS)
    assert [step["step"] for step in steps(out)] == ["begun", "original", "measured"]
    monkeypatch.setattr(Workshop, "measure", lambda *all: measured.append(all[1]) or real(*all))
    done = search(wanted, out, OPTIONS)
    assert len(measured) == len(set(measured)) == len(done.candidates) > 1


def test_a_time_that_is_too_short_is_said_and_the_next_call_goes_on(asked, tmp_path):
    out = tmp_path / "found"
    done = search(asked(), out, OPTIONS, minutes=1e-6)
    assert not done.met and done.open == ("1 layer gone",) and done.chosen is None
    assert "1 more were not reached in the time" in done.verdict
    assert search(asked(), out, OPTIONS).met
    with pytest.raises(InputError, match="minutes above 0"):
        search(asked(), out, OPTIONS, minutes=-1)


def test_what_can_not_be_made_is_left_out_and_said(asked, tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("no such thing.")

    monkeypatch.setattr(Workshop, "_make", refuse)
    done = search(asked(goal=SearchGoal()), tmp_path / "found", OPTIONS)
    assert not done.candidates and not done.met and set(done.failed.values()) == {"no such thing."}


def test_what_loses_far_too_much_is_healed_before_it_is_measured(asked, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(Workshop, "held_out", lambda self, one: {"same_answers": 1.0 if one.mix.healed else 0.5})
    made = []
    monkeypatch.setattr(workshop, "heal", lambda base, *_, out, **__: made.append(base) or shutil.copytree(base, out))
    done = search(asked(without=("router", "int8"), max_loss=10.0), tmp_path / "found", OPTIONS)
    assert done.passed == {"1 layer gone": 50.0}
    assert next(one.candidate for one in done.candidates) == Candidate(1, Mix(healed=True))
    assert made[0].endswith("drop1")


def test_a_goal_that_is_not_met_is_exit_code_1_with_the_nearest(asked, tmp_path, capsys, monkeypatch):
    wanted = asked()
    monkeypatch.setattr(Workshop, "correct", lambda self, folder, candidate: [False] * 12)
    out = tmp_path / "found"
    arguments = ["search", wanted.model, "--calibration", wanted.calibration.data, "--samples", 12, "--out", out]
    arguments += ["--task", wanted.task.data, "--params", wanted.goal.params, "--max-loss", 1, "--quiet"]
    code = main([str(one) for one in (*arguments, "--without", "heal,router,int8", "--json", tmp_path / "told.json")])
    said = capsys.readouterr()
    assert code == 1
    assert "lvlm-exporter: none of 1 candidates is" in said.err and "the nearest: 1 layer gone" in said.err
    assert "points lost" in said.out
    assert verify(out / "nearest").holds and not (out / "chosen").exists()
    assert not json.loads((tmp_path / "told.json").read_text())["met"]


def test_a_dry_run_shows_candidates_and_costs_and_writes_nothing(asked, tmp_path, capsys):
    wanted, out = asked(), tmp_path / "found"
    arguments = ["search", wanted.model, "--calibration", wanted.calibration.data, "--out", out, "--task"]
    arguments += [wanted.task.data, "--speedup", "1.2", "--without", "router", "--dry-run"]
    assert main([str(one) for one in (*arguments, "--json", tmp_path / "ahead.json")]) == 0
    said = capsys.readouterr().out
    assert "gone, healed" in said or "heal, left out" in said
    assert "minutes for all of them" in said and not out.exists()
    ahead = json.loads((tmp_path / "ahead.json").read_text())
    assert ahead["candidates"][0]["expected"]["speedup"] >= 1.2 and ahead["left_out"]["router"]


def test_mistakes_are_one_sentence(asked, tmp_path, capsys, questions):
    wanted = asked()

    def refused(*arguments) -> str:
        given = ["search", wanted.model, "--calibration", wanted.calibration.data, *arguments]
        given += [] if "--out" in arguments else ["--out", tmp_path / "found"]
        assert main([str(one) for one in (*given, "--without", "heal,router,int8")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    task = ("--task", wanted.task.data)
    assert "not allowed with argument" in refused(*task, "--speedup", 2, "--params", 5)
    assert "a number above 1 is needed" in refused(*task, "--speedup", 1)
    assert "can't be met: without any of" in refused(*task, "--params", 5)
    assert "which is no more" in refused(*task, "--params", "9B")
    assert "weights take" in refused(*task, "--memory", "1KB")
    assert "is no size like 12GB" in refused(*task, "--memory", "much")
    assert "has no 'answer'" in refused("--task", questions)
    assert "minutes above 0" in refused(*task, "--time", 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "exists already" in refused(*task, "--out", tmp_path / "other")
    assert not (tmp_path / "found").exists()


def test_a_damaged_file_of_steps_is_a_sentence(asked, tmp_path):
    out = tmp_path / "found"
    search(asked(), out, OPTIONS, minutes=1e-6)
    path = out / "steps.jsonl"
    damaged = path.read_text().replace('"answer_tokens"', '"tokens"')
    path.write_text(damaged)
    with pytest.raises(InputError, match="line 2 is not what was written, its checksum is another: take the line out"):
        search(asked(), out, OPTIONS, minutes=1e-6)
    path.write_text(re.sub(', "checksum": "[0-9a-f]+"', "", damaged))  # as an earlier version wrote it
    with pytest.raises(InputError, match=r"damaged in its cell 2 \(it has no 'answer_tokens'\)"):
        search(asked(), out, OPTIONS)


def test_graphs_answer_the_task_as_the_model_does(exported, task, asked, tmp_path):
    source, graphs = exported("llava")
    wanted = asked()
    job = prepare_search(wanted, OPTIONS)
    shop = Workshop(job, tmp_path / "work", tmp_path / "answers.jsonl", StepCosts({}), lambda items, *_: items)
    torch_says = evaluate([source], wanted.task.data, options=OPTIONS, update_cards=False).models[0].correct
    assert tuple(shop._onnx_correct(graphs)) == torch_says


def test_it_is_a_verb_of_the_package():
    assert exporter.search is search and exporter.SearchGoal is SearchGoal
