"""Layers from disk, one at a time for all batches: the same bytes, few reads, and one sentence for what can't be."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from fixtures.checkpoints import recipe
from fixtures.three_questions import SAMPLES
from tiny_models import FAMILIES_HERE, ONE_OF_EACH_KIND

import exporter
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.clean_room import REFERENCE_TOKENS, load_processor
from exporter.compression import estimate as estimating
from exporter.compression.estimate import estimate
from exporter.compression.job import prepare
from exporter.data.batches import make_batch
from exporter.errors import InputError
from exporter.models import boundary, loading, questions, residency, together
from exporter.models.answers import answered
from exporter.models.boundary import StateStore
from exporter.models.loading import PartSizes, load_model
from exporter.recipe import Method, Recipe, RunOptions

pytestmark = pytest.mark.usefixtures("unverified")
ANSWER_TOKENS = 6
METHODS = (("best_of", "auto"), ("tis", "reconstruction"), ("greedy", "scp_both"))
LONG_TAIL = pytest.mark.long_tail


def least(folder: Path, more: float = 1.0) -> str:
    """As little memory as the model takes when its layers are read from disk."""
    return f"{more * PartSizes.of(open_source(str(folder)), 4).least / 1000 + 1:.0f}KB"


def short(folder: Path, questions: Path, samples: int = 6, **changes: object) -> Recipe:
    """Return a recipe whose questions get short answers: random models never end theirs."""
    asked = recipe(folder, questions, **changes)
    calibration = dataclasses.replace(asked.calibration, samples=samples, answer_tokens=ANSWER_TOKENS)
    return dataclasses.replace(asked, calibration=calibration)


@pytest.fixture
def few_at_once(monkeypatch) -> None:
    """A tiny model has so few layers that three of them, beside the rest, are most of it."""
    for module in (loading, estimating):
        monkeypatch.setattr(module, "AT_ONCE", 1)


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """Bytes of tensors that are read from disk, while the model answers, as the smaller one, and else."""
    counted: Counter[str] = Counter()
    answering: list[str] = []
    read, answered = vars(residency)["read_tensor"], vars(questions)["answered_together"]
    reference = questions.Questions.reference_answer

    def reading(entry):
        counted[answering[-1] if answering else "passes"] += entry.num_bytes
        return read(entry)

    def answers(*args, **kwargs):
        answering.append("answers")
        try:
            yield from answered(*args, **kwargs)
        finally:
            answering.pop()

    def of_the_smaller(self):
        answering.append("reference")
        try:
            return reference(self)
        finally:
            answering.pop()

    monkeypatch.setattr(residency, "read_tensor", reading)
    monkeypatch.setattr(questions, "answered_together", answers)
    monkeypatch.setattr(questions.Questions, "reference_answer", of_the_smaller)
    return counted


@pytest.fixture
def rounds(monkeypatch) -> None:
    """A dozen questions are judged by in as many rounds as hundreds are."""
    monkeypatch.setitem(questions.PORTIONS, "judge_sets", (1 / 16, 1))
    monkeypatch.setitem(questions.PORTIONS, "judge_few_sets", (1 / 8, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("localizer", "fold", "family"),
    [
        pytest.param(*method, family, marks=() if method == METHODS[0] or family in ONE_OF_EACH_KIND else LONG_TAIL)
        for method in METHODS
        for family in FAMILIES_HERE
    ],
)
def test_scores_plans_and_weights_are_those_of_the_model_in_memory(
    family, localizer, fold, tiny, questions, tmp_path, few_at_once, reads
):
    asked = short(tiny(family), questions, localizer=Method(localizer), fold=_fold(tiny(family), fold), protect=())
    whole = exporter.compress(asked, tmp_path / "whole")
    assert not reads
    streamed = exporter.compress(asked, tmp_path / "streamed", RunOptions(memory=least(tiny(family))))
    assert reads["passes"]
    records = [json.loads((folder / "compression.json").read_text()) for folder in (whole, streamed)]
    for part in ("scores", "plan", "fold"):
        assert records[0][part] == records[1][part], part
    references = [record["reference"] for record in records]
    assert references[0]["tokens"] == references[1]["tokens"]
    assert references[0]["margins"] == pytest.approx(
        references[1]["margins"], abs=1e-4
    )  # weights lie elsewhere in memory
    weights = [open_weights(folder) for folder in (whole, streamed)]
    for name in weights[0].entries:
        assert torch.equal(weights[0].read(name), weights[1].read(name)), name


def _fold(folder: Path, fold: str) -> Method:
    """Return a fold that the family takes: a norm behind the matrices leaves `reconstruction` alone."""
    post_norm = open_source(str(folder)).decoder.post_norm
    return Method("reconstruction" if post_norm and fold.startswith("scp") else fold)


@pytest.mark.slow
def test_what_is_read_does_not_grow_with_the_questions(tiny, questions, tmp_path, few_at_once, reads):
    folder = tiny("llava")
    layers = sum(PartSizes.of(open_source(str(folder)), 4).layers)
    found = []
    more = questions.with_name("more.jsonl")
    more.write_text(questions.read_text() + questions.read_text().replace("what", "say what"))
    for samples in (12, 24):
        reads.clear()
        asked = short(folder, more, samples)
        made = exporter.compress(asked, tmp_path / f"of_{samples}", RunOptions(memory=least(folder), batch_size=1))
        assert reads["answers"] <= (ANSWER_TOKENS + 0.5) * layers
        assert reads["reference"] <= (REFERENCE_TOKENS + 0.5) * layers
        found.append(reads["passes"] / layers)
        record = json.loads((made / "compression.json").read_text())
        told = estimate(prepare(asked, RunOptions(memory=least(folder)))).bytes_to_read
        read = record["measured"]["bytes_read"]
        assert sum(reads.values()) < read <= 1.25 * told
    assert max(found) - min(found) <= 2  # exchanges that are tried: of layers, not of questions
    # rankings, sets three times, their folds, their judgement, gaps with a reconstruction, its judgement
    assert max(found) <= 8


@pytest.mark.slow
def test_rounds_of_judging_share_a_pass_and_say_the_same(tiny, questions, tmp_path, few_at_once, reads, rounds):
    folder = tiny("llava")
    layers = sum(PartSizes.of(open_source(str(folder)), 4).layers)
    asked = short(folder, questions, samples=12, protect=())
    whole = exporter.compress(asked, tmp_path / "whole", RunOptions(batch_size=1))
    streamed = exporter.compress(asked, tmp_path / "streamed", RunOptions(memory=least(folder), batch_size=1))
    assert reads["passes"] <= 8 * layers
    records = [json.loads((folder / "compression.json").read_text()) for folder in (whole, streamed)]
    by_number = [[len(judged["sets"]) for judged in record["scores"]["details"]["rounds"]] for record in records]
    assert by_number[0] == by_number[1] == [4, 2]
    assert all(records[0][part] == records[1][part] for part in ("scores", "plan", "fold"))
    asked_of = [judged["sets"][0]["questions"] for judged in records[1]["scores"]["details"]["rounds"]]
    assert asked_of == [1, 2] and records[1]["fold"]["held_out"]["questions"] == 3
    weights = [open_weights(folder) for folder in (whole, streamed)]
    assert all(torch.equal(weights[0].read(name), weights[1].read(name)) for name in weights[0].entries)


@pytest.mark.slow
def test_tis_and_auto_read_three_times_whatever_the_questions(tiny, questions, tmp_path, few_at_once, reads):
    folder = tiny("llava")
    layers = sum(PartSizes.of(open_source(str(folder)), 4).layers)
    for samples in (6, 12):
        reads.clear()
        asked = short(folder, questions, samples, localizer=Method("tis"))
        exporter.compress(asked, tmp_path / f"of_{samples}", RunOptions(memory=least(folder), batch_size=1))
        assert reads["passes"] <= 3 * layers


def test_states_go_to_disk_beyond_the_limit_and_come_back(tiny, questions, tmp_path, few_at_once, monkeypatch):
    asked = short(tiny("qwen3_vl"), questions, localizer=Method("tis"), fold=Method("reconstruction"))
    whole = exporter.compress(asked, tmp_path / "whole")
    written = []
    write = StateStore._write
    monkeypatch.setattr(
        StateStore, "_write", lambda self, view, begin: (written.append(len(view)), write(self, view, begin))
    )
    streamed = exporter.compress(asked, tmp_path / "streamed", RunOptions(memory=least(tiny("qwen3_vl"))))
    assert sum(written) > 1 << 16
    weights = [open_weights(folder) for folder in (whole, streamed)]
    assert all(torch.equal(weights[0].read(name), weights[1].read(name)) for name in weights[0].entries)


def test_a_store_keeps_what_it_is_given():
    with StateStore(limit=40) as store:
        kept = [store.keep(torch.full((4,), value)) for value in (1.0, 2.0, 3.0, 4.0)]  # 16 bytes each
        assert [isinstance(one, boundary.Slot) for one in kept] == [False, False, True, True]
        assert [store.read(one)[0].item() for one in kept] == [1, 2, 3, 4]
        store.drop(kept[2])
        assert store.keep(torch.zeros(4)).begin == kept[2].begin  # its place is used again
        mask = torch.ones(2, dtype=torch.bool)
        parked = store.park({"a": (mask, None), "b": [mask]})
        assert store.fetch(parked)["b"][0].equal(mask) and parked["a"][0] is parked["b"][0]
        folder = store._folder
        assert folder.exists()
    assert not folder.exists()


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        StateStore(limit=0) as store,
        pytest.raises(InputError, match=r"is full: the states between layers take over .*TMPDIR"),
    ):
        store.keep(torch.zeros(4))


def test_a_full_disk_ends_a_run_with_nothing_left(tiny, questions, tmp_path, few_at_once, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="is full: the states between layers"):
        exporter.compress(short(tiny("llava"), questions), tmp_path / "small", RunOptions(memory=least(tiny("llava"))))
    assert not (tmp_path / "small").exists()
    assert not list(temporary.glob("*states*"))
    assert not [one for one in threading.enumerate() if one.name == "answers"]


@pytest.mark.parametrize("family", FAMILIES_HERE)
@pytest.mark.parametrize("limit", [None, 0])
def test_all_batches_together_are_answered_as_each_alone(family, limit, tiny, few_at_once, reads, monkeypatch):
    """With caches and states in memory, and with all of them in a file; what a model notes of a batch stays its own."""
    source = open_source(str(tiny(family)))
    whole, _ = load_model(source, "cpu", torch.float32)
    batches = [make_batch([sample], load_processor(source.folder), whole.config) for sample in SAMPLES]
    alone = [answered(whole, batch, 5) for batch in batches]
    streamed, _ = load_model(source, "cpu", torch.float32, least(source.folder))
    monkeypatch.setattr(residency.ranges_of(streamed).room, "for_states", limit)
    for one, other in zip(alone, together.answered_together(streamed, batches, 5), strict=True):
        assert torch.equal(one.targets, other.targets)
    assert reads["passes"] <= 5.5 * sum(PartSizes.of(source, 4).layers)  # a layer is read ahead in vain at the end
    assert not [one for one in threading.enumerate() if one.name == "answers"]


def test_a_batch_that_fails_ends_all(tiny, few_at_once):
    source = open_source(str(tiny("llava")))
    streamed, _ = load_model(source, "cpu", torch.float32, least(source.folder))
    batches = [make_batch([sample], load_processor(source.folder), streamed.config) for sample in SAMPLES]
    broken = dataclasses.replace(batches[1], inputs=batches[1].inputs | {"pixel_values": torch.zeros(1)})
    with pytest.raises(Exception, match=r"."):
        list(together.answered_together(streamed, [batches[0], broken], 5))
    assert not [one for one in threading.enumerate() if one.name == "answers"]


def test_groups_hold_what_fits(tiny):
    source = open_source(str(tiny("llava")))
    model, _ = load_model(source, "cpu", torch.float32)
    batch = make_batch(SAMPLES[:1], load_processor(source.folder), model.config)
    size = sum(value.numel() * value.element_size() for value in batch.inputs.values())
    assert [len(group) for group in together.groups([batch] * 5, 2 * size)] == [2, 2, 1]
    assert [len(group) for group in together.groups([batch] * 2, 1)] == [1, 1]


def test_too_little_memory_says_how_much_is_needed(tiny, questions, tmp_path):
    with pytest.raises(
        InputError, match=r"--memory allows 0\.000 GB, and .* needs 0\.00\d GB at least: .* 3 layers of"
    ):
        exporter.compress(recipe(tiny("llava"), questions), tmp_path / "small", RunOptions(memory="10KB"))
    assert not (tmp_path / "small").exists()


def test_damaged_weights_on_disk_are_met_when_they_are_read(tiny, questions, few_at_once, monkeypatch):
    read = vars(residency)["read_tensor"]
    monkeypatch.setattr(residency, "read_tensor", lambda entry: read(entry) / 0)
    with pytest.raises(InputError, match=r"tensor .*layers.* holds NaN or infinite values"):
        exporter.score(recipe(tiny("llava"), questions), RunOptions(memory=least(tiny("llava"))))


def test_gradients_need_all_layers(tiny, questions, few_at_once):
    with pytest.raises(InputError, match="fisher takes gradients through all layers at once"):
        exporter.score(
            recipe(tiny("llava"), questions, localizer=Method("fisher")), RunOptions(memory=least(tiny("llava")))
        )


def test_held_layers_are_let_go(tiny, few_at_once):
    source = open_source(str(tiny("llava")))
    model, _ = load_model(source, "cpu", torch.float32, least(source.folder))
    layer = loading.text_decoder(model).layers[-1]
    assert all(parameter.is_meta for parameter in layer.parameters())
    with residency.held(layer), residency.held(layer):
        assert not any(parameter.is_meta for parameter in layer.parameters())
    assert all(parameter.is_meta for parameter in layer.parameters())
