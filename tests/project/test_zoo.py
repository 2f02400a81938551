"""The zoo of examples/zoo: every row can be built, asked and trained; its pictures are reproducible and kept apart."""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / "zoo"), str(EXAMPLES)]

import batches  # noqa: E402
import models  # noqa: E402
import pictures  # noqa: E402
import train  # noqa: E402

from exporter.clean_room import encode  # noqa: E402
from exporter.data.task import load_task  # noqa: E402
from exporter.recipe import TaskData  # noqa: E402

LAYERS = 3  # Gemma 3's pattern of windows has three


@pytest.fixture(scope="module", params=models.ROWS)
def built(request, tmp_path_factory):
    """A row's untrained model with few layers, its processor, and some of its pictures as samples."""
    row = models.ROWS[request.param]
    processor = models.write_processor(row, tmp_path_factory.mktemp(request.param))
    model = models.make_model(row, processor.tokenizer, LAYERS)
    drawn = list(pictures.draw_split(row.pictures, "train", row.sizes, row.seed, 4))
    return row, model, processor, drawn, list(map(batches.Preparation(model, processor).sample, drawn))


def one_chat(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@torch.no_grad()
def test_a_packed_question_gets_the_logits_that_it_gets_alone(built):
    _, model, processor, drawn, samples = built
    model = copy.deepcopy(model).eval()
    for parameter in model.get_decoder().layers.parameters():
        if parameter.ndim == 2:  # as large as after training, so that a wrong mask or position is seen
            parameter *= 2
    packed = batches.pack(model, samples, [[q for _, q in s.asked] for s in samples])
    last, _ = train.hidden_states(model, packed, [])
    logits = model.lm_head(last)
    assert logits.std() > 0.5
    for index in (0, 1):
        picture, sample = drawn[index], samples[index]
        for number, (question, (_, tokens)) in enumerate(zip(picture.questions, sample.asked, strict=True), 1):
            if number > 4:
                break
            inputs = encode(processor, [one_chat(question.text)], [[picture.image]])
            mine = packed["segment"][index] == number
            asked = [*sample.prefix, *tokens.ids[: tokens.answer_start]]
            assert inputs["input_ids"][0].tolist() == asked, question.text
            alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[index, mine][tokens.answer_start - 1], alone, atol=1e-3, rtol=1e-3)


def test_answers_decode_to_what_the_questions_say(built):
    _, _, processor, drawn, samples = built
    tokenizer = processor.tokenizer
    for picture, sample in zip(drawn, samples, strict=True):
        for question, (_, tokens) in zip(picture.questions, sample.asked, strict=True):
            assert tokenizer.unk_token_id not in tokens.ids, question
            answer = tokens.ids[tokens.answer_start :]
            assert answer[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(answer[:-1]) == question.answer


def test_a_step_on_one_batch_lowers_its_loss(built):
    row, model, _, _, samples = built
    model.train()
    torch.manual_seed(0)  # of the heads
    heads = train.make_heads(model, pictures.KINDS[row.pictures])
    packed = batches.pack(model, samples[:2], [[q for _, q in s.asked[:4]] for s in samples[:2]])
    optimizers = train.optimizers_for(model, heads, "joint")
    losses = []
    for _ in range(2):
        loss = train.answer_losses(model, heads, packed).total
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss))
    assert losses[1] < losses[0], losses


def test_the_heads_are_told_what_the_picture_shows(built):
    _, _, _, drawn, samples = built
    for picture, sample in zip(drawn, samples, strict=True):
        named = sample.named
        assert len(named) == sample.prefix.count(built[1].config.image_token_id)
        shown = {tuple(v) for v in np.stack(picture.labels, -1).reshape(-1, 2).tolist()} - {(0, 0)}
        assert {tuple(v) for v in named[:, :2].tolist()} - {(0, 0)} <= shown
        assert (named[:, 2:] < train.POSITIONS).all()


def test_the_zoo_is_wide_enough():
    rows = models.ROWS.values()
    assert len(rows) >= 6
    assert len({row.family for row in rows}) >= 3
    assert {row.pictures for row in rows} == set(pictures.KINDS)
    assert min(row.layers for row in rows) == 8 and max(row.layers for row in rows) == 16
    assert len({row.seed for row in rows}) == len(rows)
    assert {row.tied for row in rows} == {True, False}


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_pictures_are_the_same_again_and_in_one_split_only(kind):
    sizes = ((72, 72), (48, 60))
    drawn = {
        split: [picture_hash(p) for p in pictures.draw_split(kind, split, sizes, seed=5, count=60)]
        for split in pictures.SPLITS
    }
    again = [picture_hash(p) for p in pictures.draw_split(kind, "test", sizes, seed=5, count=10, first=20)]
    assert again == drawn["test"][20:30]
    flat = [h for hashes in drawn.values() for h in hashes]
    assert len(set(flat)) == len(flat)


def picture_hash(picture: pictures.Picture) -> str:
    told = repr(picture.questions).encode()
    return hashlib.sha256(picture.image.tobytes() + told).hexdigest()


def test_no_handwriting_is_in_two_splits():
    import data as digits

    splits = ("zoo train", "zoo calibration", "validation", "test")
    hands = [set(range(1797)[digits.SPLIT_DIGITS[split]]) for split in splits]
    assert sum(map(len, hands)) == len(set.union(*hands)) == 1797


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_questions_are_written_with_their_pictures(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "SPLITS", {"train": 0, "calibration-unseen": 12, "validation": 10, "test": 10})
    monkeypatch.setattr(pictures, "SEEN", 12)
    for folder in ("one", "two"):
        pictures.write_questions(kind, ((72, 72),), 5, tmp_path / folder)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 4 + 12 + 12 + 10 + 10
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    for name in ("calibration-seen", "calibration-unseen", "validation", "test"):
        samples = load_task(TaskData(str(tmp_path / "one" / f"{name}.jsonl")), None, 0).samples
        assert {sample.type for sample in samples} == set(pictures.KINDS[kind].question_types)


def test_calibration_seen_shows_training_pictures(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(pictures, "SPLITS", {"train": 0})
    monkeypatch.setattr(pictures, "SEEN", 4)
    pictures.write_questions("digits", ((72, 72),), 5, tmp_path)
    trained = pictures.draw_split("digits", "train", ((72, 72),), 5, 4)
    for index, picture in enumerate(trained):
        written = Image.open(tmp_path / f"calibration-seen/{index:04d}.png")
        assert np.array_equal(np.asarray(written), np.asarray(picture.image))
