"""A serving router: training sees what the served class runs, and folders with one are made, verified and evaluated."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from fixtures.checkpoints import without_verification
from transformers import AutoModelForImageTextToText

import exporter
from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.checkpoints.verification import verify
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.data.calibration import load_calibration
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.modeling.served_router import SERVING_ROUTER_FILE, TYPES
from exporter.models.loading import load_model
from exporter.pipeline import compress, route
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RouterRecipe, router_from_data
from exporter.routing.requests import BudgetGrid
from exporter.routing.serving.folder import SERVING_FILES, load_served, servable
from exporter.routing.serving.learner import ServingLearner
from exporter.routing.serving.loop import BEGINNINGS, BestStep, TrainedOn, begin, train_serving_router
from exporter.routing.serving.settings import serving_settings
from exporter.routing.training.learner import Teacher
from exporter.routing.training.loop import Training


def silent(items, what, total):
    return items


def opened(folder, questions, number=3):
    """A tiny model of the served class with a router that says something, and a teacher with its answers."""
    source = open_source(str(folder))
    model = servable(load_model(source, "cpu", torch.float32)[0], serving_settings(source.config, question_aware=True))
    torch.nn.init.normal_(model.serving_router.up.weight, std=0.2)
    torch.nn.init.normal_(model.serving_router.head[-1].weight)
    samples = load_calibration(str(questions), samples=number).samples
    teacher = Teacher(model, load_processor(source.folder), samples)
    teacher.answer_all(silent, batch_size=4, answer_tokens=4)
    return teacher


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TYPES)
def test_a_batch_of_training_is_what_the_served_class_runs(family, tiny, questions):
    teacher = opened(tiny(family), questions)
    model, indices = teacher.model, [0, 1, 2]
    learner = ServingLearner(teacher, model.serving_router, question_aware=True)
    batch = learner.training_batch(indices, shares=[0.5] * 3, told=True)
    judgement = learner.judge(indices, share=0.5, told=True, batch_size=2)
    _, answered, _ = teacher.question(indices)
    ids = [teacher.processor.tokenizer(line, add_special_tokens=False)["input_ids"] for line in texts(teacher)]
    with torch.no_grad():
        logits = model(**answered.batch.inputs, keep_visual_tokens=0.5, question_ids=ids).logits
    assert torch.allclose(batch.log_q, logits[answered.predicts].log_softmax(-1), atol=1e-4)
    assert judgement.of_tokens == pytest.approx(float(batch.kl.mean()), abs=1e-4) and 0 <= judgement.kept <= 1
    answers = [float(part.mean()) for part in batch.kl.split(batch.lengths)]
    assert judgement.of_answers == pytest.approx(sum(answers) / 3, abs=1e-4) and len(answers) == 3
    gradients = torch.autograd.grad(batch.of_answers.mean(), list(model.serving_router.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def texts(teacher):
    return [sample.messages[-1]["content"] for sample in teacher.samples]


def test_questions_are_put_to_other_pictures_where_there_are_few(questions):
    samples = load_calibration(str(questions), samples=12).samples
    fit, training = [0, 1, 2, 4, 5, 7], Training(steps=12, batch_size=2)
    few = TrainedOn.of(samples, fit, training)
    assert few.rounds[0] == tuple(fit) and few.samples[:12] == samples and len(few.rounds) == 4
    assert [few.samples[i].messages for i in few.rounds[1]] == [samples[i].messages for i in fit]
    assert all(few.samples[i].images != samples[j].images for i, j in zip(few.rounds[1], fit, strict=True))
    steps = [few.of_step(step, training) for step in range(12)]  # of two questions: four rounds
    assert sorted(index for step in steps for index in step) == sorted(i for numbers in few.rounds for i in numbers)
    enough = TrainedOn.of(samples, fit, dataclasses.replace(training, steps=3))
    assert enough.rounds == (tuple(fit),) and enough.samples == samples


def test_held_out_questions_say_what_training_begins_from(tiny, questions, monkeypatch):
    teacher = opened(tiny("llava"), questions)
    learner = ServingLearner(teacher, teacher.model.serving_router, question_aware=False)
    for better in BEGINNINGS:
        liked = {"KL": 1.0}, {"KL": 2.0}

        def said(learner, *_, better=better, liked=liked):
            return liked[float(learner.router.first) != better]

        monkeypatch.setattr("exporter.routing.serving.loop.judged", said)
        best = BestStep()
        begin(learner, [0, 1], 2, best)
        assert float(learner.router.first) == better and (best.step, best.divergence) == (0, 1.0)


def test_training_is_repeatable_and_goes_on_where_it_was(tiny, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.routing.serving.loop.SAVE_EVERY", 2)
    training = Training(steps=4, batch_size=4, answer_tokens=3)

    def trained(progress=silent, **more):
        torch.manual_seed(0)
        teacher = opened(tiny("llava"), questions, number=12)
        return train_serving_router(teacher.model, teacher.processor, teacher.samples, training, progress, **more)

    whole, state = trained(), tmp_path / "state"

    def broken_off(items, what, total):
        for number, item in enumerate(items):
            if what == "train serving router" and number == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        trained(broken_off, state_file=state, fingerprint="a")
    again = trained(state_file=state, fingerprint="a")
    assert [point["step"] for point in again.curve] == [0, 1, 2, 3]
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in whole.weights.items())
    assert whole.step in (1, 2, 3, 4) or whole.held_out == 0


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny, questions, tmp_path_factory):
    """A folder with a serving router that reads questions, verified."""
    folder = tmp_path_factory.mktemp("serving") / "served"
    lines = questions.read_text().splitlines()
    more = questions.parent / "more.jsonl"
    more.write_text("".join(line + "\n" for line in lines * 2))
    data = CalibrationData(str(more), samples=24, answer_tokens=3)
    with without_verification():  # of the copy that is routed; the result is verified
        route(tiny("llava"), RouterRecipe(data, steps=2, batch_size=4, serve=True, question_aware=True), folder)
    return folder


@pytest.mark.clean_process
def test_a_folder_is_made_described_and_verifies(made):
    record = read_record(made)
    assert record.serving is not None and record.router is None
    assert record.serving.reference.preset == "serve-balanced"
    assert len(record.serving.curve) == 2 and record.recipe["router"]["serve"] is True
    assert {row.preset for row in record.serving.measured} == {"serve-accurate", "serve-balanced", "serve-fast"}
    assert {row.told_the_question for row in record.serving.measured} == {False, True}
    card = (made / "README.md").read_text()
    assert "## The serving router" in card and 'preset="serve-fast"' in card
    assert f"{100 * record.serving.measured[0].answers_kept:.1f} %" in card
    assert all((made / name).is_file() for name in (*SERVING_FILES, SERVING_ROUTER_FILE))
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["model_type"] == "llava"
    result = verify(made)
    assert result.holds and result.details["served"]["class"] == "ServedLlavaForConditionalGeneration"


@pytest.mark.clean_process
def test_another_router_in_the_folder_does_not_verify(made, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["serving_router"]
    (folder / "config.json").write_text(json.dumps(config))
    assert any("a serving router is named in compression.json only" in problem for problem in verify(folder).problems)


def test_presets_are_evaluated_as_they_are_served(made, questions, tmp_path):
    lines = [json.loads(line) | {"answer": "yes"} for line in questions.read_text().splitlines()[:3]]
    for line in lines:
        line["image"] = str(questions.parent / line["image"])
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    grid = BudgetGrid(keep_visual_tokens=(5,), presets=("off", "serve-fast"))
    done = evaluate([made], task, budgets=grid, reference=made, max_new_tokens=3, update_cards=False)
    shares = {str(model.label): model.decoder_flops_share for model in done.models}
    assert [model.budget and model.budget["rule"] for model in done.models] == [
        None,
        "serving router",
        "serving router",
    ]
    assert all(0 < share < 1 for share in shares.values() if share is not None)
    source = open_source(str(made))
    model, processor = load_served(source, "cpu", torch.float32), load_processor(made)
    told = evaluate(
        [made], task, budgets=dataclasses.replace(grid, tell_question=True), max_new_tokens=3, update_cards=False
    )
    assert told.models[0].budget["rule"] == "serving router, told the question"
    from exporter.data.batches import make_batch

    samples = load_calibration(str(task), samples=3).samples
    batch = make_batch(samples, processor, model.config)
    answers = model.generate(**batch.inputs, preset="serve-fast", max_new_tokens=3, do_sample=False)
    words = processor.tokenizer.batch_decode(answers[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    by_label = {model.budget["preset"]: model for model in done.models if model.budget}
    assert set(by_label["serve-fast"].answers) == {word.strip() for word in words}


def test_a_compressed_checkpoint_gets_a_serving_router(tiny, questions, tmp_path, unverified, monkeypatch):
    monkeypatch.setattr("exporter.routing.with_router.require", lambda *_: None)
    data = CalibrationData(str(questions), samples=12, answer_tokens=3)
    router = router_from_data({"serve": True, "steps": 1, "batch_size": 4})
    recipe = Recipe(str(tiny("llava")), data, LayerBudget(drop_layers=2), router=router)
    folder = compress(recipe, tmp_path / "both")
    record = read_record(folder)
    assert len(record.plan.drop) == 2 and record.serving is not None
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.serving_settings.trained_for["num_hidden_layers"] == len(record.plan.keep)
    again = compress(dataclasses.replace(recipe, model=str(folder), router=None), tmp_path / "less")
    config = json.loads((again / "config.json").read_text())
    assert not {"serving_router", "auto_map"} & config.keys() and not (again / "modeling_served.py").exists()


@pytest.mark.clean_process
def test_the_reference_model_gets_one(digits, tmp_path, capsys):
    command = ["route", str(digits / "model"), "--serve", "--out", str(tmp_path / "served"), "--steps", "2"]
    command += ["--calibration", str(digits / "data" / "calibration.jsonl"), "--samples", "24", "--batch-size", "4"]
    assert main(command) == 0
    assert "trained a serving router of" in capsys.readouterr().out
    assert read_record(tmp_path / "served").serving.measured


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--drop-at", "2"), "drop_at=2 is of a router inside the decoder"),
        (("--candidates", "0"), "candidates=0 is of a router inside the decoder"),
        (("--loss", "preference"), "loss 'preference' is of a router inside the decoder: a serving router has its own"),
    ],
)
def test_settings_of_the_other_router_are_refused(flags, message, tiny, questions, tmp_path, capsys):
    command = ["route", str(tiny("llava")), "--serve", "--out", str(tmp_path / "o"), "--calibration", str(questions)]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_other_types_and_routed_folders_are_refused(tiny, questions, tmp_path):
    router = RouterRecipe(CalibrationData(str(questions)), serve=True)
    with pytest.raises(InputError, match="is a gemma3 model, and a serving router is made and tested for llava"):
        route(tiny("gemma3"), router, tmp_path / "o")
    with pytest.raises(InputError, match="--question-aware is for a serving router: give --serve too"):
        route(tiny("llava"), dataclasses.replace(router, serve=False, question_aware=True), tmp_path / "o")
    folder = tmp_path / "routed"
    shutil.copytree(tiny("llava"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"router": {}}))
    with pytest.raises(InputError, match="has a router whose tokens leave inside the decoder"):
        route(folder, router, tmp_path / "o")
    with pytest.raises(InputError, match="serve must be true or false, not 'yes'"):
        router_from_data({"serve": "yes"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "fast"), "preset 'fast' is not known: this serving router has off, serve-accurate"),
        (("--keep-visual-tokens", "0.5", "--keep-layers", "2"), "keeps a number of visual tokens and all layers"),
        (("--tell-question",), "--tell-question tells a serving router the question, and without a budget none runs"),
        (("--flops", "0.5"), "--flops 0.5 is for other routers; give --preset or --keep-visual-tokens"),
        (("--preset", "serve-fast", "--rule", "fastv"), "--rule fastv chooses inside the decoder"),
    ],
)
def test_budgets_of_the_other_router_are_refused(flags, message, made, questions, capsys, task):
    assert main(["evaluate", str(made), "--task", str(task), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_one_has_no_serving_preset(tiny, task, capsys):
    assert main(["evaluate", str(tiny("llava")), "--task", str(task), "--preset", "serve-fast"]) == 2
    message = (
        "has no serving router, so that it has no preset 'serve-fast': train one with `lvlm-exporter route --serve`."
    )
    assert message in capsys.readouterr().err


def test_a_default_is_set(made, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(made, folder)
    exporter.set_default(folder, "serve-fast")
    assert read_record(folder).to_data()["serving"]["settings"]["default"] == "serve-fast"
    assert "| serve-fast (default) |" in (folder / "README.md").read_text()
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.budget == 0.25
    with pytest.raises(InputError, match="preset 'fast' is not known"):
        exporter.set_default(folder, "fast")


def test_no_graphs_are_written_of_one(made, tmp_path, capsys):
    assert main(["onnx", str(made), "--out", str(tmp_path / "graphs")]) == 2
    assert "has a serving router, and our own runner's layout has no graphs of one" in capsys.readouterr().err


def test_a_damaged_entry_is_one_sentence(made, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())
    config["serving_router"]["bottleneck"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config.json is damaged \(.*bottleneck.*\): train the serving router again"):
        load_served(open_source(str(folder)), "cpu", torch.float32)
