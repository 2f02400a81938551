"""Answers that the original gave elsewhere: found by their questions, or refused in one sentence with the numbers."""

from __future__ import annotations

import codecs
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from fixtures.checkpoints import recipe

import exporter
from exporter.clean_room import load_processor
from exporter.cli import main
from exporter.compression.job import load_for, prepare
from exporter.data import remote_images
from exporter.data.calibration import load_calibration
from exporter.data.given import given_answers, question_key
from exporter.data.samples import Sample
from exporter.errors import InputError
from exporter.models import questions as of_models
from exporter.models.answers import answer_end
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
    beside_them = [{"image": "none.png", "question": "and this?", "answer": "no"}, {"question": "who?", "answer": "I"}]
    more = given_answers(str(written(beside, [*beside_them, *lines])), samples)
    assert more.texts == whole.texts  # neither a picture that is not here matters then, nor a question without one
    by_key = [{"key": question_key(sample), "answer": text} for sample, text in zip(samples, whole.texts, strict=True)]
    assert given_answers(str(written(beside, [*by_key, by_key[0]])), samples).texts == whole.texts
    assert len({question_key(sample) for sample in samples}) == len(samples)


def test_a_file_of_another_system_is_read_all_the_same(questions, beside):
    path, samples = written(beside, lines_of(questions)), samples_of(questions)
    texts = given_answers(str(path), samples).texts
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert given_answers(str(path), samples).texts == texts


def test_pictures_on_the_web_are_fetched_where_that_is_allowed(questions, beside, monkeypatch):
    lines = lines_of(questions)
    monkeypatch.setattr(remote_images, "fetched", lambda address: (beside / address.rpartition("/")[2]).read_bytes())
    path = written(beside, [line | {"image": f"https://example.org/{line['image']}"} for line in lines])
    with pytest.raises(InputError, match="is on the web, and nothing is fetched unasked"):
        given_answers(str(path), samples_of(questions))
    wanted = recipe(beside, questions)
    data = dataclasses.replace(wanted.calibration, samples=None, answers=str(path), allow_urls=True)
    found = load_for(dataclasses.replace(wanted, calibration=data)).answers
    assert found is not None and found.texts == tuple(line["answer"] for line in lines)


@pytest.mark.slow
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
    answers = given_answers(str(kept), samples)
    assert answers.texts == tuple(text for text in said if text)
    assert answers.num_layers == {6} and not any(answers.ended)  # by random weights, after three tokens
    answers.check_layers(6)


def test_an_answer_that_was_cut_off_has_no_end(tiny, questions, beside):
    """`evaluate` asks for few tokens by default: what the model has not ended is not ended here."""
    samples, lines = samples_of(questions), lines_of(questions)
    by_key: list[dict[str, object]] = [
        {"key": question_key(sample), "answer": line["answer"]} for sample, line in zip(samples, lines, strict=True)
    ]
    by_key[0] |= {"ended": False}
    by_key[1] |= {"ended": True}
    job = prepare(asked(tiny("llava"), questions, written(beside, by_key)), RunOptions())
    model, _ = job.load_model()
    kept = job.questions(model)
    kept.answer([0, 1, 2])
    assert [len(kept.answers[index]) for index in (0, 1, 2)] == [4, 5, 5]
    whole = [*by_key, by_key[0] | {"ended": True}]
    assert given_answers(str(written(beside, whole)), samples).ended[0]


def test_answers_of_a_model_of_another_depth_are_refused(tiny, questions, beside):
    """Those of the smaller model itself, say. Lines that nobody says it of are taken as they are."""
    samples, lines = samples_of(questions), lines_of(questions)
    by_key = [{"key": question_key(sample), "answer": "no", "layers": 4} for sample in samples]
    with pytest.raises(InputError, match="holds the answers of a model of 4 layers, and this one has 6: what the orig"):
        prepare(asked(tiny("llava"), questions, written(beside, by_key)), RunOptions())
    given_answers(str(written(beside, lines)), samples).check_layers(6)
    both = [*by_key, *(line | {"layers": 6} for line in by_key)]
    given_answers(str(written(beside, both)), samples).check_layers(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[2:],
            r"answers 10 questions, and leaves of the 12 calibration questions 2 without an answer \(the first is .* l",
        ),
        (
            lambda lines: [*lines, lines[0] | {"answer": "no"}],
            r"questions 1 with different answers \(the first is .* line 1\)\. Each needs one answer, to the same words",
        ),
        (
            lambda lines: [line | {"run": run, "answer": run} for run in ("a", "b") for line in lines],
            r"12 with different answers .*It holds 2 runs of `evaluate`: keep that of the original model\. Each needs",
        ),
        (
            lambda lines: [lines[0] | {"answer": " "}, *lines[1:]],
            "questions 1 with an empty answer .*; leave out a question to which the model says nothing",
        ),
        (lambda lines: [line | {"question": "why?"} for line in lines], "12 without an answer .*the same words about"),
        (lambda lines: [{"image": "0.png", "question": "why?"}], "line 1: 'answer' must be a text, what the original"),
        (lambda lines: [{"key": 3, "answer": "a"}], "line 1: 'key' must be the text that `evaluate --predictions`"),
        (
            lambda lines: [{"index": 0, "answer": "a", "correct": True}],
            "does not say which question it answers: .* with the name of a new file for `evaluate --predictions`",
        ),
    ],
)
def test_answers_that_do_not_fit_are_one_sentence(change, message, questions, beside):
    path = written(beside, change(lines_of(questions)))
    with pytest.raises(InputError, match=message):
        given_answers(str(path), samples_of(questions))


def test_a_missing_file_says_how_one_is_made(tiny, questions, tmp_path):
    with pytest.raises(InputError, match=r"there is no file of answers .*`evaluate --predictions FILE` makes one"):
        prepare(asked(tiny("llava"), questions, tmp_path / "none.jsonl"), RunOptions())


def test_answers_to_no_questions_are_refused(tiny, questions, beside, capsys):
    answers = str(written(beside, lines_of(questions)))
    flags = ["compress", str(tiny("llava")), "--out", str(beside / "out"), "--answers", answers]
    assert main([*flags, "--layers", "1,2", "--fold", "none"]) == 2
    assert "--answers belong to questions: name --calibration FILE too, or leave them out." in capsys.readouterr().err


def test_an_answer_ends_as_the_chat_template_ends_it(tiny):
    """Gemma 3 knows two end tokens, and its tokenizer names the one that ends a text, not a turn."""
    processor = load_processor(tiny("gemma3"))
    text_end, turn_end = processor.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert answer_end(processor, {text_end, turn_end}) == turn_end
    assert answer_end(processor, {text_end}) == text_end
    assert answer_end(processor, {turn_end + 5, turn_end + 4}) == turn_end + 4
    assert answer_end(processor, ()) is None
    one_question = load_processor(tiny("paligemma"))
    assert answer_end(one_question, {7, text_end}) == one_question.tokenizer.eos_token_id


def test_a_placeholder_of_an_image_is_no_answer(tiny, questions, beside):
    lines = lines_of(questions)
    lines[3]["answer"] = "a <image> of it"
    with pytest.raises(InputError, match="line 4 holds the model's placeholder of an image: take it out"):
        exporter.score(asked(tiny("llava"), questions, written(beside, lines)))


def test_what_is_trained_on_other_answers_takes_none(questions, beside):
    data = asked(Path("model"), questions, written(beside, lines_of(questions))).calibration
    with pytest.raises(InputError, match="heal: it learns from the distributions behind the original's answers, wh"):
        HealRecipe(calibration=data)
    with pytest.raises(InputError, match=r"router: it learns from the distributions .* take 'answers' out of its c"):
        RouterRecipe(calibration=data)
    assert HealRecipe(calibration=data.unanswered).calibration == dataclasses.replace(data, answers=None)
    with pytest.raises(InputError, match="calibration: answers must be text, not 3"):
        calibration_from_data({"data": data.data, "answers": 3})
