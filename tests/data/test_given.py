"""Answers that the original gave elsewhere: found by their questions, or refused in one sentence with the numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from fixtures.checkpoints import recipe

import exporter
from exporter.compression.job import prepare
from exporter.data.calibration import load_calibration
from exporter.data.given import given_answers, question_key
from exporter.data.samples import Sample
from exporter.errors import InputError
from exporter.models import questions as of_models
from exporter.recipe import (
    HealRecipe,
    Method,
    Recipe,
    RouterRecipe,
    RunOptions,
    calibration_from_data,
    recipe_from_data,
)

pytestmark = pytest.mark.usefixtures("unverified")


def lines_of(questions: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    names = 2 * "cat dog bird cup ball car".split()
    return [line | {"answer": f"it is a {name}"} for line, name in zip(lines, names, strict=True)]


@pytest.fixture
def beside(questions, tmp_path) -> Path:
    """A folder with the images of the questions, where files of answers name them."""
    for image in questions.parent.glob("*.png"):
        shutil.copy(image, tmp_path / image.name)
    return tmp_path


def written(folder: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(model: Path, questions: Path, answers: Path, **changes: object) -> Recipe:
    made = recipe(model, questions, localizer=Method("tis"), fold=Method("scp_both"), **changes)
    return dataclasses.replace(
        made, calibration=dataclasses.replace(made.calibration, samples=None, answers=str(answers))
    )


def samples_of(questions: Path) -> tuple[Sample, ...]:
    return load_calibration(questions, samples=None).samples


def test_answers_are_found_by_their_questions_in_any_order(questions, beside):
    lines, samples = lines_of(questions), samples_of(questions)
    whole = given_answers(str(written(beside, lines)), samples)
    assert whole.texts == tuple(line["answer"] for line in lines)
    as_turns = [
        {"image": line["image"], "messages": [{"role": "user", "content": line["question"]}], "answer": line["answer"]}
        for line in lines
    ]
    assert given_answers(str(written(beside, as_turns[::-1])), samples[3:]).texts == whole.texts[3:]
    by_key = [{"key": question_key(sample), "answer": text} for sample, text in zip(samples, whole.texts, strict=True)]
    assert given_answers(str(written(beside, [*by_key, by_key[0]])), samples).texts == whole.texts
    assert len({question_key(sample) for sample in samples}) == len(samples)


def test_the_model_does_not_answer_what_was_answered_elsewhere(tiny, questions, beside, monkeypatch):
    def answering(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked")

    for name in ("answered", "answered_together"):
        monkeypatch.setattr(of_models, name, answering)
    answers = written(beside, lines_of(questions))
    wanted = asked(tiny("llava"), questions, answers)
    made = exporter.compress(wanted, beside / "small")
    record = json.loads((made / "compression.json").read_text())
    given = record["calibration"]["answers"]
    assert given["file"] == str(answers) and given["sha256"] in (made / "README.md").read_text()
    assert recipe_from_data(record["recipe"]) == wanted
    assert record["calibration"]["answer_tokens"] == 5 * len(samples_of(questions))  # four words and an end

    monkeypatch.setattr("exporter.models.loading.AT_ONCE", 1)
    least = exporter.models.loading.PartSizes.of(prepare(wanted, RunOptions()).source, 4).least
    streamed = exporter.compress(wanted, beside / "streamed", RunOptions(memory=f"{least / 1000 + 1:.0f}KB"))
    shards = [(folder / "model.safetensors").read_bytes() for folder in (made, streamed)]
    assert shards[0] == shards[1]

    answers.write_text(answers.read_text().replace("is a cat", "is a dog"))
    with pytest.raises(InputError, match="does not hold the answers that the checkpoint was made by"):
        exporter.reproduce(made, beside / "again")


def test_predictions_of_evaluate_are_such_a_file(tiny, questions, beside):
    path = written(beside, lines_of(questions))
    kept = beside / "predictions.jsonl"
    done = exporter.evaluate([tiny("llava")], path, predictions=kept, max_new_tokens=3, update_cards=False)
    said = done.models[0].answers
    samples = [sample for sample, text in zip(samples_of(questions), said, strict=True) if text]
    assert given_answers(str(kept), samples).texts == tuple(text for text in said if text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[2:],
            r"answers to 10 questions; of the 12 calibration questions 2 have none \(.* line 1\)",
        ),
        (lambda lines: [*lines, lines[0] | {"answer": "no"}], "of the 12 calibration questions 1 have different ones"),
        (lambda lines: [lines[0] | {"answer": " "}, *lines[1:]], "questions 1 have an empty one"),
        (lambda lines: [line | {"question": "why?"} for line in lines], "12 have none .*the same words about the same"),
        (lambda lines: [{"image": "0.png", "question": "why?"}], "line 1: 'answer' must be a text, what the original"),
        (lambda lines: [{"key": 3, "answer": "a"}], "line 1: 'key' must be the text that `evaluate --predictions`"),
        (lambda lines: [{"index": 0, "answer": "a", "correct": True}], "does not say which question it answers"),
    ],
)
def test_answers_that_do_not_fit_are_one_sentence(change, message, questions, beside):
    path = written(beside, change(lines_of(questions)))
    with pytest.raises(InputError, match=message):
        given_answers(str(path), samples_of(questions))


def test_a_missing_file_says_how_one_is_made(tiny, questions, tmp_path):
    with pytest.raises(InputError, match=r"there is no file of answers .*`evaluate --predictions FILE` makes one"):
        prepare(asked(tiny("llava"), questions, tmp_path / "none.jsonl"), RunOptions())


def test_a_placeholder_of_an_image_is_no_answer(tiny, questions, beside):
    lines = lines_of(questions)
    lines[3]["answer"] = "a <image> of it"
    with pytest.raises(InputError, match="line 4 holds the model's placeholder of an image: take it out"):
        exporter.score(asked(tiny("llava"), questions, written(beside, lines)))


def test_what_is_trained_on_other_answers_takes_none(questions, beside):
    data = asked(Path("model"), questions, written(beside, lines_of(questions))).calibration
    with pytest.raises(
        InputError, match="heal: whole distributions are learnt, also of questions to other images, so that no answers"
    ):
        HealRecipe(calibration=data)
    with pytest.raises(
        InputError, match="router: it learns from the answers of the smaller model, so that no answers can be given"
    ):
        RouterRecipe(calibration=data)
    assert HealRecipe(calibration=data.unanswered).calibration == dataclasses.replace(data, answers=None)
    with pytest.raises(InputError, match="calibration: answers must be text, not 3"):
        calibration_from_data({"data": data.data, "answers": 3})
