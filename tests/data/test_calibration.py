"""Every form of data becomes the same batches: seeded, left-padded, with visual and text tokens told apart."""

from __future__ import annotations

import json

import pytest
import torch
from fixtures.checkpoints import FAMILIES, picture

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.batches import make_batch, make_batches
from exporter.data.calibration import load_calibration
from exporter.errors import InputError
from exporter.families import visual_token_ids


def write(folder, *records):
    for name in ("a", "b"):
        picture(folder / f"{name}.png", (40, 56) if name == "b" else (48, 48))
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_questions_messages_answers_and_unknown_keys(tmp_path):
    path = write(
        tmp_path,
        {"image": "a.png", "question": "what?", "answer": "red", "type": "color", "unknown": 1},
        {"images": ["a.png", "b.png"], "question": "both?", "answer": ["x", "y"], "choices": ["x", "z"]},
        {
            "image": "a.png",
            "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}],
        },
    )
    one, two, three = load_calibration(path, samples=None).samples
    assert (one.answers, one.type) == (("red",), "color")
    assert (len(two.images), two.answers, two.choices) == (2, ("x", "y"), ("x", "z"))
    assert three.answers == ("a cat",)
    assert len(three.messages) == 1
    assert [part["type"] for part in two.chat()[0]["content"]] == ["image", "image", "text"]


def test_choice_of_samples_is_seeded_and_keeps_the_order(tmp_path):
    path = write(tmp_path, *({"image": "a.png", "question": f"what {i}?"} for i in range(30)))

    def chosen(seed):
        return [s.origin for s in load_calibration(path, samples=5, seed=seed).samples]

    assert chosen(0) == chosen(0) != chosen(1)
    assert chosen(0) == sorted(chosen(0), key=lambda origin: int(origin.split()[-1]))
    assert len(load_calibration(path, samples=99).samples) == 30


def test_fingerprint_sees_questions_and_pixels(tmp_path):
    path = write(tmp_path, {"image": "a.png", "question": "what?"})
    before = load_calibration(path, samples=None).fingerprint
    assert before == load_calibration(path, samples=None).fingerprint
    picture(tmp_path / "a.png", (50, 50))
    assert before != load_calibration(path, samples=None).fingerprint


def test_folder_of_images_gets_a_prompt(tmp_path):
    (tmp_path / "deep").mkdir()
    picture(tmp_path / "deep" / "one.png")
    picture(tmp_path / "two.JPG".lower())
    (tmp_path / "notes.txt").write_text("no image")
    samples = load_calibration(str(tmp_path), samples=None, prompt="what is here?").samples
    assert len(samples) == 2
    assert samples[0].messages[0]["content"] == "what is here?"


def test_data_sets_are_read_by_column_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [str(picture(tmp_path / f"{i}.png")) for i in range(3)]
    table = datasets.Dataset.from_dict({"img": images, "q": ["a?", "b?", "c?"], "answer": ["1", "2", "3"]})
    table.cast_column("img", datasets.Image()).save_to_disk(tmp_path / "saved")
    spec = f"datasets:{tmp_path / 'saved'}"
    samples = load_calibration(spec, samples=None, columns={"image": "img", "question": "q"}).samples
    assert [s.messages[0]["content"] for s in samples] == ["a?", "b?", "c?"]
    assert samples[1].answers == ("2",)
    assert samples[0].open_images()[0].mode == "RGB"
    with pytest.raises(InputError, match="no column 'image' for the image; it has: img, q, answer"):
        load_calibration(spec, samples=None)
    with pytest.raises(InputError, match="can't be loaded"):
        load_calibration(f"datasets:{tmp_path / 'nothing'}", samples=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_told_apart(family, tiny, questions):
    source = open_source(str(tiny(family)))
    processor = load_processor(source.folder)
    samples = load_calibration(str(questions), samples=4).samples
    batch = make_batch(samples, processor, source.config)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert torch.equal(batch.is_visual, torch.isin(ids, torch.tensor(visual_token_ids(source.config))))
    assert batch.is_visual.any(1).all()
    assert not (batch.is_text & (batch.is_visual | ~mask)).any()
    words = processor.tokenizer.convert_ids_to_tokens(ids[0][batch.is_text[0]].tolist())
    question = samples[0].messages[0]["content"].rstrip("?.").split()
    assert set(question) <= set(words)
    assert not set(words) & set(processor.tokenizer.all_special_tokens)
    assert mask[:, -1].all()  # padding is on the left


def test_several_images_in_one_question(tiny, tmp_path):
    source = open_source(str(tiny("qwen3_vl")))
    processor = load_processor(source.folder)
    path = write(tmp_path, {"images": ["a.png", "b.png"], "question": "same?"}, {"image": "b.png", "question": "what?"})
    batches = list(make_batches(load_calibration(path, samples=None).samples, processor, source.config, 2))
    counts = batches[0].is_visual.sum(1)
    assert counts[0] > counts[1] > 0


def test_beginning_of_sequence_stands_once(tiny, questions):
    """Templates that write it must not make the tokenizer add another."""
    for family in ("idefics3", "gemma3", "mistral3", "llava"):
        source = open_source(str(tiny(family)))
        processor = load_processor(source.folder)
        batch = make_batch(load_calibration(str(questions), samples=1).samples, processor, source.config)
        assert (batch.inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1, family
