"""Healing: the updates are the model's own, what does not help is not kept, and merging gives the same bytes again.

Legend: A answer tokens, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.checkpoints import QUESTIONS, not_verified
from PIL import Image
from tiny_models import SIZES, random_image

from exporter.checkpoints.files import ADAPTER_FILE, carry_adapter, sha256
from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.data.exchanges import exchanged
from exporter.data.samples import Sample
from exporter.errors import InputError
from exporter.healing.adapter import merged, save_adapter
from exporter.healing.losses import divergence, reverse, symmetric
from exporter.healing.pairs import parted
from exporter.healing.schedule import Schedule
from exporter.healing.student import prepared
from exporter.healing.teacher import AnswerStore, teacher_outputs
from exporter.models.answers import answered
from exporter.models.loading import load_model, text_decoder
from exporter.pipeline import check_heal, compress, heal
from exporter.plan import LayerBudget
from exporter.publishing.reproduction import reproduce
from exporter.recipe import CalibrationData, HealRecipe, Method, Recipe, heal_from_data, recipe_from_data

HERE = ("paligemma", "qwen2_5_vl", "glm4v")  # norms after the MLP and none, M-RoPE, a tied head and none


def silent(items, what, total):
    return items


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> CalibrationData:
    """Two questions about each of 12 pictures, with short answers."""
    folder, random = tmp_path_factory.mktemp("asked"), np.random.default_rng(1)
    lines = []
    for index in range(12):
        random_image(random, SIZES[index % 2]).save(folder / f"{index}.png")
        lines += [{"image": f"{index}.png", "question": QUESTIONS[(index + n) % 6]} for n in range(2)]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return CalibrationData(str(folder / "c.jsonl"), answer_tokens=3)


@pytest.fixture
def quick(monkeypatch) -> None:
    """No clean process: what it looks at is tested elsewhere, and at the end here."""
    for place in ("exporter.pipeline.require", "exporter.healing.healed.require"):
        monkeypatch.setattr(place, not_verified)


def plain(model: Path, asked: CalibrationData) -> Recipe:
    budget = LayerBudget(layers=(2, 3))
    return Recipe(str(model), asked, budget, fold=Method("none"), protect=())


LEARNING = HealRecipe(steps=20, rank=4, learning_rate=0.02, batch_size=8, exchanges=1)


@pytest.fixture(scope="module")
def small(tiny, asked, tmp_path_factory) -> Path:
    """A Gemma 3 model, whose layers can't be folded, without two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.pipeline.require", not_verified)
        return compress(plain(tiny("gemma3"), asked), tmp_path_factory.mktemp("small") / "small")


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HERE)
def test_updates_are_nothing_at_first_and_the_same_when_merged(family, tiny, questions, tmp_path):
    source = open_source(str(tiny(family)))
    model, processor = load_model(source, "cpu", torch.float32)[0], load_processor(source.folder)
    samples = load_calibration(str(questions), samples=3).samples
    one = answered(model, make_batch(samples, processor, model.config), 3)
    whole = model(**one.batch.inputs).logits[one.predicts].float().log_softmax(-1)
    student = prepared(model, processor, source, rank=2, norms=True, seed=0)
    layers = len(text_decoder(model).layers)
    assert all(sum(f"layers.{i}." in name for name in student.parameters) >= 14 for i in range(layers))
    torch.testing.assert_close(student.log_q(one), whole, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    changed = student.log_q(one)
    changed.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters.values())
    assert (changed - whole).abs().max() > 1e-3
    save_adapter(tmp_path / "a.safetensors", {n: p.detach() for n, p in student.parameters.items()})
    student.merge(merged(source, tmp_path / "a.safetensors"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(
        model(**one.batch.inputs).logits[one.predicts].log_softmax(-1), changed, atol=1e-4, rtol=1e-3
    )


def test_what_is_read_while_answering_is_what_a_whole_pass_gives(tiny, questions):
    source = open_source(str(tiny("qwen2_5_vl")))
    model, processor = load_model(source, "cpu", torch.float32)[0], load_processor(source.folder)
    batch = make_batch(load_calibration(str(questions), samples=3).samples, processor, model.config)
    answers, ids, log_p = teacher_outputs(model, batch, 4, 5)
    one = answered(model, batch, 4)
    assert torch.cat(answers).tolist() == one.targets.tolist()
    whole = model(**one.batch.inputs).logits[one.predicts].float().log_softmax(-1)
    torch.testing.assert_close(log_p, whole.topk(5).values, atol=1e-4, rtol=1e-3)
    assert ids[:, 0].tolist() == one.targets.tolist()


def test_divergences_of_the_likeliest_tokens():
    log_p, log_q = torch.randn(2, 4, 9).log_softmax(-1)
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    order = log_p.argsort(descending=True)
    some = [divergence(log_p.gather(1, order[:, :k]), order[:, :k], log_q) for k in (2, 5, 9)]
    torch.testing.assert_close(some[2], whole, atol=1e-5, rtol=1e-4)
    assert (some[0] <= some[1] + 1e-6).all() and (some[1] <= whole + 1e-6).all()  # never more than the whole
    other = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(reverse(log_p.gather(1, order), order, log_q), other, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        symmetric(log_p.gather(1, order), order, log_q), (whole + other) / 2, atol=1e-5, rtol=1e-4
    )


def question(number: int, images: int = 1) -> Sample:
    picture = tuple(Image.new("RGB", (4, 4), (number, image, 0)) for image in range(images))
    return Sample(f"line {number}", picture, ({"role": "user", "content": f"question {number}"},), ("right",))


def test_questions_change_places_and_no_pair_comes_twice():
    samples = [*map(question, range(5)), *(question(number, 2) for number in range(5, 8))]
    rounds = exchanged(samples, 4, seed=0)
    assert rounds[0] == samples and exchanged(samples, 2, seed=0) == rounds[:2]
    for row in rounds:
        assert [sample.messages for sample in row] == [sample.messages for sample in samples]
        assert sorted(id(s.images) for s in row) == sorted(id(s.images) for s in samples)
        assert all(len(new.images) == len(old.images) for new, old in zip(row, samples, strict=True))
    pairs = [(s.messages[0]["content"], id(s.images)) for row in rounds[:3] for s in row[:5]]
    assert len(set(pairs)) == len(pairs)
    assert not any(s.answers for row in rounds[1:] for s in row), "what was right about another picture"
    assert exchanged([question(0)], 3, seed=0)[2][0].images[0].getpixel((0, 0)) == (0, 0, 0)


def test_questions_that_judge_are_about_other_pictures(asked):
    samples = load_calibration(asked.data, samples=None).samples
    fit, held_out = parted(samples, seed=0)
    assert sorted(fit + held_out) == list(range(24)) and 2 <= len(held_out) <= 6
    assert not {samples[i].images for i in fit} & {samples[i].images for i in held_out}
    assert parted([question(n) for n in range(5)], seed=0)[1] == [], "too few pictures"


def test_answers_on_disk_outlive_an_interruption(tmp_path):
    store = AnswerStore(tmp_path, "one", top=2)
    answers = [torch.tensor([5, 0]), torch.tensor([7])]
    ids, log_p = torch.tensor([[5, 6], [0, 1], [7, 8]]), torch.tensor([[-0.1, -3.0], [-0.2, -2.0], [-0.3, -1.0]])
    store.add([3, 1], answers, ids, log_p)
    with (tmp_path / "answers.bin").open("ab") as file:
        file.write(b"half a record")
    again = AnswerStore(tmp_path, "one", top=2)
    assert again.missing(5) == [0, 2, 4] and again.tokens == 3
    again.add([0], [torch.tensor([9])], torch.tensor([[9, 1]]), torch.tensor([[-0.5, -1.5]]))
    read = again.targets([1, 0, 3])
    assert [tokens.tolist() for tokens in read.tokens] == [[7], [9], [5, 0]]
    assert read.ids.tolist() == [[7, 8], [9, 1], [5, 6], [0, 1]] and read.log_p[1].tolist() == [-0.5, -1.5]
    assert AnswerStore(tmp_path, "another", top=2).missing(2) == [0, 1]
    (tmp_path / "answers.bin").write_bytes(b"")
    assert AnswerStore(tmp_path, "one", top=2).missing(2) == [0, 1], "places without their answers"


def test_healing_costs_thirty_forward_passes_at_most():
    for kept in (0.9, 0.75, 0.5):
        for questions in (16, 256, 2048):
            assert Schedule(HealRecipe(), questions * 7 // 8, questions // 8).forward_passes(kept) <= 30
    few = Schedule(HealRecipe(steps=3, batch_size=4), 20, 4)
    assert (few.epoch, few.rounds, few.judging, few.num_answers) == (5, 1, 12, 32)


# --- whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_model_whose_layers_cannot_be_folded_learns(small, tiny, asked, tmp_path):
    healing = HealRecipe(**{**vars(LEARNING), "calibration": asked, "teacher": str(tiny("gemma3")), "norms": True})
    out = heal(small, healing, tmp_path / "healed")
    record, before = read_record(out).data, read_record(small).data
    told = record["heal"]
    assert told["kept"] and told["after"]["kl"] < 0.9 * told["before"]["kl"]
    judging = told["before"]
    assert told["pairs"] == 2 * told["questions"]
    assert judging["questions"] > 24 - told["questions"] >= judging["pictures"] >= 2, "each about others' pictures too"
    carry_adapter(out, tmp_path)  # to a checkpoint with a router, for one
    assert sha256(tmp_path / ADAPTER_FILE) == told["adapter"]["sha256"]
    assert told["adapter"] == {"file": ADAPTER_FILE, "sha256": sha256(out / ADAPTER_FILE)}
    assert record["plan"] == before["plan"] and record["source"] == before["source"]
    assert ADAPTER_FILE in record["measured"]["files"]
    old, new = open_weights(small), open_weights(out)
    assert {n: (e.dtype, e.shape) for n, e in new.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in old.entries.items()
    }
    changed = {name for name in new.entries if not torch.equal(new.read(name), old.read(name))}
    assert changed and all(".layers." in name and "vision" not in name for name in changed)
    text = (out / "README.md").read_text()
    assert "## Healing" in text and "healed by self-distillation" in text and "byte for byte" not in text
    assert not list(tmp_path.glob(".healed*")), "nothing is left of the work"
    with pytest.raises(InputError, match="is healed already: heal the checkpoint that it was made from"):
        heal(out, healing, tmp_path / "twice")


@pytest.mark.usefixtures("quick")
def test_what_does_not_help_is_not_kept(small, tiny, asked, tmp_path, caplog):
    wild = HealRecipe(**{**vars(LEARNING), "calibration": asked, "teacher": str(tiny("gemma3")), "steps": 2})
    wild = HealRecipe(**{**vars(wild), "learning_rate": 0.99})
    out = heal(small, wild, tmp_path / "healed")
    told = read_record(out).data["heal"]
    assert not told["kept"] and told["steps_kept"] == 0 and "adapter" not in told
    assert sha256(out / "model.safetensors") == sha256(small / "model.safetensors")
    assert "held-out questions are no better than before" in caplog.text and not (out / ADAPTER_FILE).exists()
    assert "They did not help on" in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(small, tiny, asked, tmp_path):
    healing = HealRecipe(**{**vars(LEARNING), "calibration": asked, "teacher": str(tiny("gemma3"))})

    def breaks(name, after):
        def progress(items, what, total):
            for number, item in enumerate(items):
                if what == name and number == after:
                    raise KeyboardInterrupt
                yield item

        return progress

    whole = heal(small, healing, tmp_path / "whole")
    for name, after in (("ask the original", 2), ("heal", 9)):
        with pytest.raises(KeyboardInterrupt):
            heal(small, healing, tmp_path / "again", progress=breaks(name, after))
        assert (tmp_path / ".again.healing").is_dir() and not (tmp_path / "again").exists()
    seen = []
    again = heal(small, healing, tmp_path / "again", progress=lambda i, what, n: seen.append((what, n)) or i)
    assert ("heal", 12) in seen and not [1 for what, _ in seen if what == "ask the original"]
    assert sha256(again / ADAPTER_FILE) == sha256(whole / ADAPTER_FILE)


@pytest.mark.clean_process
def test_compress_heals_and_reproduce_merges_again(tiny, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("exporter.pipeline.require", not_verified)  # the last checkpoint is verified, as it is
    data = plain(tiny("llava"), asked).to_data() | {"heal": {**LEARNING.to_data()}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    assert main(["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert "healed on" in printed and "KL held out" in printed and "verified in a clean process" in printed
    monkeypatch.setattr("exporter.healing.healed.train", None)  # nothing is learnt again
    monkeypatch.setattr("exporter.healing.healed.require", not_verified)
    again = reproduce(tmp_path / "one", tmp_path / "two")
    assert again.identical
    (tmp_path / "one" / ADAPTER_FILE).write_bytes(b"another")
    with pytest.raises(InputError, match=r"is missing, or not the adapter that compression\.json names"):
        reproduce(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_folder_that_somebody_else_pruned_is_healed(small, tiny, asked, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(small, theirs, ignore=shutil.ignore_patterns("compression.json", "README.md", "assets"))
    healing = HealRecipe(**{**vars(LEARNING), "calibration": asked, "teacher": str(tiny("gemma3"))})
    record = read_record(heal(theirs, healing, tmp_path / "healed")).data
    assert record["heal"]["kept"] and record["plan"]["drop"] == []
    assert recipe_from_data(record["recipe"]).heal.teacher == str(tiny("gemma3"))


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_cost_is_said_before(small, tiny, asked, tmp_path, capsys):
    common = [
        "--calibration",
        asked.data,
        "--out",
        str(tmp_path / "x"),
        "--dry-run",
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert main(["heal", str(small), "--teacher", str(tiny("gemma3")), *common]) == 0
    assert "forward passes over the questions" in capsys.readouterr().out
    cost = json.loads((tmp_path / "c.json").read_text())
    assert cost["forward_passes"] <= 30 and cost["memory_bytes"] > 0 and cost["disk_bytes"] > 0
    assert (
        main(["compress", str(tiny("llava")), "--drop-layers", "1", "--heal", "--heal-option", "rank=4", *common]) == 0
    )
    assert "would heal in" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["heal"]["pairs"] == 10 * cost["questions"]
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_what_can_be_wrong_is_said(small, tiny, asked, questions, tmp_path, monkeypatch):
    def healing(**changed):
        return HealRecipe(**{"calibration": asked, "teacher": str(tiny("gemma3")), **changed})

    with pytest.raises(InputError, match=r"is a llava model, .* a gemma3 model: a model is healed by the one that it"):
        check_heal(small, healing(teacher=str(tiny("llava"))), tmp_path / "x")
    with pytest.raises(InputError, match="hold the same weights: a model has nothing to learn from itself"):
        check_heal(small, healing(teacher=str(small)), tmp_path / "x")
    few = tmp_path / "few.jsonl"
    few.write_text(
        "".join(json.dumps({"image": str(questions.parent / f"{n}.png"), "question": "?"}) + "\n" for n in range(4))
    )
    with pytest.raises(
        InputError, match="has questions about 4 pictures: healing needs 8 or more, since some are held out"
    ):
        check_heal(small, healing(calibration=CalibrationData(str(few))), tmp_path / "x")
    with pytest.raises(InputError, match="healing needs the original"):
        heal(small, HealRecipe(), tmp_path / "x")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match="with PEFT, which is not installed: pip install 'lvlm-exporter\\[heal\\]'"):
        check_heal(small, healing(), tmp_path / "x")
    with pytest.raises(InputError, match="PEFT"):
        compress(Recipe(str(tiny("llava")), asked, LayerBudget(1), heal=HealRecipe()), tmp_path / "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rank": 0}, "heal: rank=0: a whole number from 1 up is needed"),
        ({"steps": True}, "heal: steps=True"),
        ({"learning_rate": 2}, "heal: learning_rate=2: a number between 0 and 1"),
        ({"loss": "backward"}, "heal: loss 'backward' is not known: .*forward"),
        ({"norms": 1}, "heal: norms=1: true or false"),
        ({"teacher": 3}, "heal: teacher must be a text"),
        ({"step": 3}, "heal has no key 'step': .*steps"),
    ],
)
def test_recipes_of_healing_are_checked(data, message):
    with pytest.raises(InputError, match=message):
        heal_from_data(data)
    assert HealRecipe().seeded(3).seed == 3 and HealRecipe(seed=1).seeded(3).seed == 1
    assert heal_from_data(True) == HealRecipe() and heal_from_data({"rank": 4}).to_data() == {"rank": 4}
