"""Figures that can be trusted: the same at any batch size, the same twice, and right on cases worked out by hand."""

from __future__ import annotations

import json
import shutil

import pytest
from fixtures.checkpoints import without_verification
from tiny_models import build

from exporter.data.answers import normalise
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.evaluation.scoring import Rate, holm, is_right, mcnemar, paired_tests, wilson
from exporter.pipeline import compress
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RunOptions


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_exact_binomial_test():
    first = [True] * 10 + [False] * 5
    second = [False] * 8 + [True] * 2 + [True] * 2 + [False] * 3
    only_first, only_second, p = mcnemar(first, second)
    assert (only_first, only_second) == (8, 2)
    assert p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(first, first)[2] == 1.0


def test_p_values_are_corrected_for_their_number():
    """Holm's own order: the smallest times three, the next times two, none below one before it."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    tests = paired_tests(["a", "b", "c"], [[1] * 8, [0] * 8, [1] * 7 + [0]])
    assert [(t.first, t.second) for t in tests] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert tests[0].p_corrected == pytest.approx(3 * 2 / 2**8)


def test_values_between_right_and_wrong():
    rate = Rate.of([0.0, 1 / 3, 2 / 3, 1.0])
    assert rate.accuracy == pytest.approx(0.5) and rate.interval == pytest.approx((0.0780, 0.9220), abs=1e-3)
    assert mcnemar([0.3, 0.6, 1.0], [0.6, 0.6, 0.0])[:2] == (1, 1)


def test_exact_match_ignores_what_is_no_difference():
    assert normalise("  A  Red\nball. ") == "a red ball"
    assert is_right("Yes.", ["yes"])
    assert is_right("two", ["2", "two"])
    assert not is_right("red and blue", ["red"])
    assert is_right("b", ["blue"], ["red", "blue"])
    assert not is_right("a", ["blue"], ["red", "blue"])


@pytest.fixture(scope="module")
def small(tiny, questions, tmp_path_factory):
    recipe = Recipe(str(tiny("llava")), CalibrationData(str(questions), samples=4), LayerBudget(drop_layers=1))
    with without_verification():
        return compress(recipe, tmp_path_factory.mktemp("small") / "small")


def test_accuracy_by_type_and_fidelity_to_itself(tiny, task):
    model = str(tiny("llava"))
    done = evaluate([model], task, reference=model, max_new_tokens=4)
    assert len(done.models) == 1
    own = done.models[0]
    assert (own.n, own.accuracy) == (12, 0.5)
    assert {name: rate.accuracy for name, rate in own.by_type.items()} == {"even": 1.0, "odd": 0.0}


@pytest.mark.slow
def test_same_answers_at_any_batch_size_and_twice(tiny, small, task):
    runs = [
        evaluate([small], task, reference=tiny("llava"), max_new_tokens=4, options=RunOptions(batch_size=size))
        for size in (1, 5, 32, 32)
    ]
    for model in range(2):
        answers = [run.models[model].answers for run in runs]
        assert answers[0] == answers[1] == answers[2] == answers[3]
    assert runs[2].models[1].kl == runs[3].models[1].kl
    assert runs[0].models[1].kl == pytest.approx(runs[2].models[1].kl, rel=1e-3)
    assert runs[0].models[1].kl > 0


@pytest.mark.usefixtures("unverified")
def test_a_copy_has_no_divergence(tiny, task, tmp_path):
    recipe = Recipe(str(tiny("llava")), CalibrationData(str(task), samples=2), LayerBudget(drop_layers=0))
    copy = compress(recipe, tmp_path / "copy")
    done = evaluate([copy], task, reference=tiny("llava"), max_new_tokens=4)
    assert done.models[1].kl == pytest.approx(0, abs=1e-9)
    assert done.models[1].agreement == 1.0
    assert done.pairs[0].p_value == 1.0


def test_figures_reach_record_and_card(tiny, small, task):
    done = evaluate([small], task, reference=tiny("llava"), max_new_tokens=4)
    entry = json.loads((small / "compression.json").read_text())["evaluations"]
    assert len(entry) == 1  # repeated on the same task: replaced
    assert entry[0]["accuracy"] == done.models[1].accuracy
    card = (small / "README.md").read_text()
    assert "model-index" in card
    assert f"value: {round(done.models[1].accuracy, 4)}" in card
    assert "n=12" in card
    assert "50.0 %" in card  # of the base model


def test_another_tokenizer_gives_no_kl_and_says_so(tiny, task):
    done = evaluate([tiny("llava_next")], task, reference=tiny("llava"), max_new_tokens=2, update_cards=False)
    assert done.models[1].kl is None
    assert done.models[1].no_kl_because == "its tokenizer is not the reference's"


def test_a_broken_off_run_goes_on(tiny, task, tmp_path):
    def stop_after(batches):
        def progress(items, *_):
            for index, item in enumerate(items):
                if index == batches:
                    raise KeyboardInterrupt
                yield item

        return progress

    answers = tmp_path / "answers.jsonl"
    options = {"max_new_tokens": 4, "predictions": answers, "options": RunOptions(batch_size=4)}
    with pytest.raises(KeyboardInterrupt):
        evaluate([tiny("llava")], task, progress=stop_after(2), **options)
    assert len(answers.read_text().splitlines()) == 8
    seen = []

    def count(items, *_):
        for item in items:
            seen.extend(item)
            yield item

    done = evaluate([tiny("llava")], task, progress=count, **options)
    assert len(seen) == 4
    assert done.models[0].accuracy == 0.5


def test_tasks_and_folders_that_will_not_do(tiny, questions, task, tmp_path):
    with pytest.raises(InputError, match=r"line 1 has no 'answer' \(12 of 12 have none\)"):
        evaluate([tiny("llava")], questions)
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        evaluate([tiny("llava"), tmp_path / "nothing"], task)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    with pytest.raises(InputError, match="is no answer of an evaluation"):
        evaluate([tiny("llava")], task, predictions=bad)


def test_tiny_models_differ_by_seed(tmp_path, tiny, task):
    other = build("llava", tmp_path / "other", seed=1)
    done = evaluate([other], task, reference=tiny("llava"), max_new_tokens=4)
    assert done.models[1].agreement < 0.9


def answered_again(monkeypatch, run, **changed) -> int:
    """How many answers a repeated evaluation computes rather than reads."""
    seen = []

    def count(items, *_):
        for item in items:
            seen.extend(item)
            yield item

    run(progress=count, **changed)
    return len(seen)


def test_kept_answers_are_of_the_same_run(monkeypatch, tiny, task, tmp_path):
    """What changes a result makes the kept rows another run's: lengths, precision, answers, the folder's files."""
    model = shutil.copytree(tiny("llava"), tmp_path / "model")
    data = tmp_path / "task.jsonl"
    lines = [json.loads(line) for line in task.read_text().splitlines()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = tmp_path / "kept.jsonl"

    def run(max_new_tokens=2, dtype="float32", progress=lambda items, *_: items):
        return evaluate([model], data, max_new_tokens=max_new_tokens, predictions=kept, progress=progress,
                        options=RunOptions(batch_size=12, dtype=dtype), update_cards=False)  # fmt: skip

    first = run().models[0]
    assert answered_again(monkeypatch, run) == 0
    assert answered_again(monkeypatch, run, max_new_tokens=4) == 12
    assert answered_again(monkeypatch, run, dtype="bfloat16") == 12
    for line, said in zip(lines, first.answers, strict=True):
        line["answer"] = said
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run().models[0].accuracy == 1.0
    template = model / "chat_template.json"
    template.write_text(template.read_text().replace("USER: ", "USER:"))
    assert answered_again(monkeypatch, run) == 12
    assert answered_again(monkeypatch, run) == 0


def test_a_line_cut_off_in_the_middle_is_answered_again(monkeypatch, tiny, task, tmp_path):
    kept = tmp_path / "kept.jsonl"

    def run(progress=lambda items, *_: items):
        return evaluate([tiny("llava")], task, max_new_tokens=2, predictions=kept, progress=progress)

    run()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9])
    assert answered_again(monkeypatch, run) == 1
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("content", ["3\n", '{"index": 1}\n', '{"index": 0, "answer": 3, "correct": true}\n', "[]\n"])
def test_a_file_of_something_else(content, tiny, task, tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text(content)
    with pytest.raises(InputError, match="line 1 is no answer of an evaluation: name another file"):
        evaluate([tiny("llava")], task, predictions=kept)
    assert kept.read_text() == content
