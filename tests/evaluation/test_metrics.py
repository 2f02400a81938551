"""Metrics as the benchmarks define them: worked out by hand, and equal to lmms-eval's on the same predictions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from fixtures.lmms_eval import record

from exporter.data.samples import sample_from
from exporter.errors import InputError
from exporter.evaluation.metrics import choices, judged, vqa, yes_no
from exporter.evaluation.metrics.metric import questions_for
from exporter.evaluation.metrics.table import METRICS, chosen

RECORDED = json.loads((Path(record.__file__).parent / "values.json").read_text())


def samples_of(lines, text_only=False):
    """Return lines as samples; the images are not opened."""
    return [
        sample_from({"image": "x.png"} | line, f"line {n}", Path(), text_only=text_only)
        for n, line in enumerate(lines, 1)
    ]


def made(name):
    """Return the questions of a recorded metric as the metric puts them, and the predictions."""
    data = RECORDED["made"][name]
    lines = [line | {"image": None} if line.get("text") else line for line in data["lines"]]
    return questions_for(name, METRICS[name], samples_of(lines, text_only=True)), data["predictions"]


def values_of(name):
    questions, said = made(name)
    return [METRICS[name].value(question, answer) for question, answer in zip(questions, said, strict=True)]


# --- equal to lmms-eval -----------------------------------------------------------------------------------------------


def test_what_was_recorded_is_what_the_script_makes():
    assert json.loads(json.dumps(record.made())) == RECORDED["made"]
    assert all(len(data["predictions"]) >= 50 for data in RECORDED["made"].values())


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_what_was_recorded_is_what_lmms_eval_says():
    assert record.measured(record.made()) == RECORDED["values"]


def test_pope_is_lmms_evals():
    figures, wanted = METRICS["pope"].figures(*made("pope")), RECORDED["values"]["pope"]
    assert sum(values_of("pope")) / 90 == pytest.approx(wanted["accuracy"])
    ours = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1_score": "F1"}
    ours |= {"yes_ratio": "yes ratio of the right answers"}  # which lmms-eval prints as the yes ratio
    assert {name: figures[own] for name, own in ours.items()} == pytest.approx(wanted)
    assert figures["neither yes nor no"] > 0


def test_mme_is_lmms_evals():
    figures = METRICS["mme"].figures(*made("mme"))
    for name, wanted in RECORDED["values"]["mme"].items():
        assert figures[f"{name} (points)"] == pytest.approx(wanted)


def test_mmbench_is_lmms_evals():
    figures, wanted = METRICS["mmbench"].figures(*made("mmbench")), RECORDED["values"]["mmbench"]
    assert figures["circular"] == pytest.approx(wanted["overall"])
    assert {name: figures[f"circular ({name})"] for name in wanted["categories"]} == pytest.approx(wanted["categories"])


def test_seed_is_lmms_evals():
    assert sum(values_of("seed")) / 60 == pytest.approx(RECORDED["values"]["seed"])


@pytest.mark.parametrize("name", ["scienceqa", "vqa", "textvqa"])
def test_each_answer_is_worth_what_lmms_eval_says(name):
    assert values_of(name) == pytest.approx(RECORDED["values"][name])


def test_relative_scores_are_lmms_evals():
    questions, reviews = made("llava-bench")
    ratings = judged.Ratings(tuple(tuple(judged.ratings_in(review)) for review in reviews))
    figures, wanted = ratings.figures(questions), dict(RECORDED["values"]["llava-bench"])
    assert 100 * figures["relative score"] == pytest.approx(wanted.pop("all"), abs=0.051)  # it rounds
    for category, value in wanted.items():
        assert 100 * figures[f"relative score ({category})"] == pytest.approx(value, abs=0.051)
    assert figures["without a rating"] == 0


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_pope_by_hand():
    wanted = ("yes", "yes", "no", "no", "yes", "no")
    said = ("Yes", "no", "yes", "No", "perhaps", "no")
    splits = ("random", "random", "random", "popular", "popular", "popular")
    lines = [{"question": "q", "answer": a, "category": c} for a, c in zip(wanted, splits, strict=True)]
    figures = yes_no.pope_figures(samples_of(lines), said)
    assert figures["accuracy"] == 3 / 6 and figures["precision"] == 1 / 2 and figures["recall"] == 1 / 2
    assert figures["F1"] == 1 / 2 and figures["yes ratio"] == 2 / 6 and figures["neither yes nor no"] == 1 / 6
    assert figures["accuracy (random)"] == 1 / 3 and figures["accuracy (popular)"] == 2 / 3
    assert figures["precision (popular)"] == 0 == figures["F1 (popular)"]


def test_mme_by_hand():
    """Of two pictures of one task one is right twice, the other once: 75 % and 50 %, 125 points."""
    lines = [
        {"question": "q", "answer": a, "category": c, "question_id": i}
        for c, i in (("count", "1"), ("count", "2"), ("code_reasoning", "1"))
        for a in ("Yes", "No")
    ]
    figures = yes_no.mme_figures(samples_of(lines), ["yes", "no, none", "Yes.", "yes", "no", "y"])
    assert figures["count (points)"] == figures["perception (points)"] == 125
    assert figures["cognition (points)"] == 0
    assert figures["accuracy"] == 3 / 6 and figures["accuracy+"] == 1 / 3


def test_soft_accuracy_by_hand():
    """Two of ten said so: left out one of the two, one other is left (1/3); the eight see both (2/3)."""
    line = {"question": "q", "answers": ["two"] * 2 + ["The 3"] * 8}
    (sample,) = samples_of([line])
    assert vqa.value(sample, "2") == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa.value(sample, "3") == pytest.approx(1.0)
    assert vqa.value(sample, "4") == 0
    assert vqa.plain("It is the man's hat, isnt it?") == "it is man's hat isn't it"
    assert vqa.plain_textvqa("the man's hat") == "man 's hat"
    assert vqa.plain("1,000.5 m.") == "1000.5 m"


def test_every_turn_of_the_options_has_to_be_right():
    line = {"question": "Which?", "choices": ["red", "blue", "green"], "answer": 1, "index": 7, "category": "color"}
    questions = questions_for("mmbench", METRICS["mmbench"], samples_of([line]))
    assert [question.choices[0] for question in questions] == ["red", "blue", "green"]
    assert [choices.right_letters(question) for question in questions] == ["B", "A", "C"]
    text = questions[1].messages[0]["content"]
    assert text.startswith("Which? There are several options:\nA. blue\nB. green\nC. red\n")
    assert text.endswith("Answer with the option's letter from the given choices directly.")
    right = choices.mmbench_figures(questions, ["B", "A.", "(C)"])
    assert right == {"circular": 1.0, "each turn": 1.0, "circular (color)": 1.0}
    wrong = choices.mmbench_figures(questions, ["B", "A", "A"])
    assert wrong["circular"] == 0 and wrong["each turn"] == pytest.approx(2 / 3)
    (chinese, _) = questions_for(
        "mmbench", METRICS["mmbench"], samples_of([line | {"question": "哪个?", "choices": ["红", "蓝"]}])
    )
    assert "有如下几个选项" in chinese.messages[0]["content"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("B.", "B"), ("(B)", "B"), ("It is blue", "B"), ("A dog in the park", ""), ("", ""), ("E", "E"),
     ("The answer is B, not A", "B")],
)  # fmt: skip
def test_letters_are_read_out_of_answers(answer, letter):
    assert choices.read_letter(answer, ["red", "blue"]) in (letter, "A" if answer.startswith("A dog") else letter)


def test_options_are_put_once():
    line = {"question": "Which?\nA. red\nB. blue", "choices": ["red", "blue"], "answer": "B"}
    (question,) = choices.put(samples_of([line])[0])
    assert question.messages[0]["content"] == line["question"]
    hinted = {"question": "Which?", "choices": ["red", "blue"], "answer": 0, "hint": "Look."}
    (question,) = choices.put_scienceqa(samples_of([hinted])[0])
    assert question.messages[0]["content"].startswith("Context: Look.\nWhich?\nA. red\nB. blue\n")


def test_direct_answers_by_hand():
    given = "['cab', 'taxi', 'taxi', 'Taxi', 'car', 'bus', 'bus', 'van', 'suv', 'jeep']"
    line = {"question": "q", "choices": ["taxi", "bus"], "correct_choice_idx": 0, "direct_answers": given}
    (sample,) = samples_of([line])
    assert [choices.direct_value(sample, said) for said in ("taxi ", "bus", "cab", "tram")] == [1, 2 / 3, 1 / 3, 0]
    assert choices.right_letters(sample) == "A"


@pytest.mark.parametrize(
    ("line", "metric"),
    [
        ({"answer": "yes", "category": "popular"}, "pope"),
        ({"answer": "yes", "category": "count", "question_id": "1"}, "mme"),
        ({"answer": "A", "A": "red", "B": "blue", "index": 3}, "mmbench"),
        ({"answer": "A", "choice_a": "red", "choice_b": "blue", "data_type": "image"}, "seed"),
        ({"answer": 0, "choices": ["red", "blue"], "hint": ""}, "scienceqa"),
        ({"correct_choice_idx": 0, "choices": ["red", "blue"], "direct_answers": ["red"]}, "aokvqa"),
        ({"answers": ["red"] * 10}, "vqa"),
        ({"gpt_answer": "a dog", "caption": "a dog", "category": "conv"}, "llava-bench"),
        ({"answer": "red", "choices": ["red", "blue"]}, "exact"),
        ({"answer": "red", "category": "color"}, "exact"),
        ({"answers": ["red", "crimson"]}, "exact"),
    ],
)
def test_columns_say_which_metric(line, metric):
    assert chosen(None, samples_of([{"question": "q"} | line] * 2)) == metric


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("pope", {"answer": "red"}, "line 1: the answer 'red' is neither yes nor no: the metric 'pope' is not for"),
        (
            "mme",
            {"answer": "yes"},
            r"line 1 has no 'category', which the metric 'mme' needs: .* --columns category=NAME",
        ),
        ("mme", {"answer": "yes", "category": "x", "question_id": 1}, "the category 'x' is none of MME's"),
        ("mme", {"answer": "yes", "category": "count", "question_id": 1}, "judges 2 lines together, and here are 1"),
        ("choice", {"answer": "yes"}, "there are 0 choices where two or more are needed"),
        ("vqa", {"answer": "yes"}, "'answer' is no list of several people's answers"),
        ("aokvqa-direct", {"answer": "yes"}, "has no 'direct_answers'"),
        ("llava-bench", {"answer": "yes"}, "has no 'reference'"),
    ],
)
def test_tasks_that_are_not_for_a_metric(name, line, message):
    with pytest.raises(InputError, match=message):
        questions_for(name, METRICS[name], samples_of([{"question": "q"} | line]))


def test_metrics_that_there_are_not():
    with pytest.raises(InputError, match=r"metric 'popes' is not known: .*pope"):
        chosen("popes", [])
