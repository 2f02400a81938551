"""Files as users have them: JSONL of any hand, LLaVA-instruct, ShareGPT, OpenAI, VQA-v2, TriviaQA, ScienceQA, MMMU."""

from __future__ import annotations

import base64
import codecs
import json
import os
import random

import pytest
from fixtures.checkpoints import picture

from exporter.data.calibration import load_calibration
from exporter.data.task import load_task
from exporter.errors import InputError
from exporter.evaluation.scoring import is_right
from exporter.recipe import TaskData

USER, SAID = {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "red"}


@pytest.fixture
def read(tmp_path):
    """read(record, ...) are the samples of a JSONL file; every record is about a.png unless it says otherwise."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (40, 56))

    def samples(*records):
        path = tmp_path / "q.jsonl"
        full = [{"image": "a.png", "question": "what?"} | record for record in records]
        path.write_text("".join(json.dumps({k: v for k, v in one.items() if v != "-"}) + "\n" for one in full))
        return load_calibration(str(path), samples=None).samples

    return samples


# --- lines ------------------------------------------------------------------------------------------------------------

LINE = json.dumps({"image": "a.png", "question": "what?"})


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c"])
def test_lines_end_at_newlines_only(mark, tmp_path):
    record = {"image": "a.png", "question": f"what{mark if ord(mark) > 127 else 'x'}is it?"}
    (tmp_path / "q.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n" + LINE, encoding="utf-8")
    first, second = load_calibration(str(tmp_path / "q.jsonl"), samples=None).samples
    assert first.messages[0]["content"] == record["question"]
    assert second.origin.endswith("line 2")


def test_marks_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + f"{LINE}\r\n\r\n  \n{LINE}\r\n".encode())
    assert [s.origin.split()[-1] for s in load_calibration(str(path), samples=None).samples] == ["1", "4"]


@pytest.mark.parametrize(
    "text",
    [
        f"[{LINE}, {LINE}]",
        f"[\n  {LINE},\n  {LINE}\n]\n",
        json.dumps({"dataset_type": "val", "data": [json.loads(LINE)] * 2}, indent=2),
    ],
)
def test_json_arrays(text, tmp_path):
    (tmp_path / "q.json").write_text(text)
    samples = load_calibration(tmp_path / "q.json", samples=None).samples
    assert [sample.origin.split()[-2:] for sample in samples] == [["record", "1"], ["record", "2"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (LINE.encode("utf-16-le"), "is UTF-16 text: save it as UTF-8"),
        (LINE.encode("utf-32"), "is UTF-32 text: save it as UTF-8"),
        (b"\x1f\x8b\x08\0", "is compressed by gzip: decompress it"),
        (b"PK\x03\x04", "is compressed by zip"),
        (b"\xff\xfa\xc0", "is not a text file"),
        (b'{"image": "a.png", "question": "a", "question": "b"}', "key 'question' is given twice"),
        (b'{"image": "a.png", "question": "a", "score": NaN}', "NaN is no JSON, write null"),
        (b'{"image": "a.png", "question": "a", "score": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": ' * 100_000, "line 1 is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'[{"image": "a.png"}, 3]', "record 2 holds a int|neither 'question'"),
        (b"3\n", "line 1 holds a int, not a JSON object"),
        (b"[]", "holds no lines"),
        (b"\n\n", "holds no lines"),
        (b'{"image": "a.png", "question": "\\ud800"}', "holds an incomplete character"),
        (b"image,question\na.png,what?\n", "line 1 is no JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 1 is no JSON"),
    ],
)
def test_what_is_no_jsonl_is_one_sentence(content, message, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as told:
        load_calibration(str(tmp_path / "q.jsonl"), samples=None)
    assert "\n" not in str(told.value)


def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe or a device, which can't be read twice"):
            load_calibration(str(path), samples=None)
    with pytest.raises(InputError, match="there is no file or folder 'xxx"):
        load_calibration("x" * 4000, samples=None)


# --- conversations ----------------------------------------------------------------------------------------------------


def test_llava_instruct(read):
    turns = [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A ball."},
        {"from": "human", "value": "Which color?"},
        {"from": "gpt", "value": "Red."},
    ]
    (sample,) = read({"id": "0001", "question": "-", "conversations": turns})
    assert sample.answers == ("Red.",)
    assert [turn["role"] for turn in sample.chat()] == ["user", "assistant", "user"]
    assert sample.chat()[0]["content"] == [{"type": "text", "text": "What is it?"}, {"type": "image"}]


def test_the_image_stands_where_its_mark_is(read):
    first, second, third = read(
        {"question": "<image>\nwhat?"},
        {"image": "-", "images": ["a.png", "b.png"], "question": "is <image> like <image>?"},
        {"question": "what?"},
    )
    assert first.chat()[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert [part.get("text", "image") for part in second.chat()[0]["content"]] == ["is", "image", " like", "image", "?"]
    assert third.chat() == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(InputError, match="the messages place 2 images, the line names 1"):
        read({"question": "<image> <image>"})


def test_openai_parts_hold_their_images(read, tmp_path):
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "b.png").read_bytes()).decode()
    text = {"type": "text", "text": "what?"}
    for part in (
        {"type": "image_url", "image_url": {"url": uri, "detail": "low"}},
        {"type": "image_url", "image_url": uri},
        {"type": "input_image", "image_url": uri},
        {"type": "image", "image": "b.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image", "url": uri},
        {"type": "image", "base64": uri.partition(",")[2]},
        {"image": "b.png"},
        {"type": "image", "image": None, "image_url": {"url": uri}, "text": None},
    ):
        (sample,) = read({"image": "-", "question": "-", "messages": [{"role": "user", "content": [text, part]}]})
        assert [p["type"] for p in sample.chat()[0]["content"]] == ["text", "image"], part
        assert sample.open_images()[0].size == (40, 56), part


def test_places_and_inline_images_together(read):
    parts = [{"type": "image"}, {"type": "image", "image": "b.png"}, {"type": "input_text", "text": "same?"}]
    (sample,) = read({"question": "-", "messages": [{"role": "user", "content": parts}]})
    assert [image.size for image in sample.open_images()] == [(48, 48), (40, 56)]
    with pytest.raises(InputError, match="hold 1 images and place 0 more, the line names 1"):
        read({"question": "-", "messages": [{"role": "user", "content": parts[1:]}]})


def test_roles_of_all_spellings(read):
    turns = [{"role": "developer", "content": "be short"}, {"role": "Human", "content": "what?"}, SAID]
    (sample,) = read({"question": None, "messages": turns})
    assert [turn["role"] for turn in sample.messages] == ["system", "user"]
    assert sample.answers == ("red",)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "x"}], "'robot' is no such role"),
        ([{"role": 3, "content": "x"}], "'messages' must be"),
        ([{"role": "user", "content": None}], "'messages' must be"),
        ([{"role": "user"}], "'messages' must be"),
        ("what?", "'messages' must be"),
        ({"role": "user"}, "'messages' must be"),
        ([SAID], "with a user turn"),
        ([SAID, USER, SAID, "x"], "'messages' must be"),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}],
            "a part of type 'audio' is neither text nor an image .* nor a video",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part of type 'text' holds no text"),
        ([{"role": "user", "content": [3]}], "'messages' must be"),
        ([{"role": "user", "content": [{}]}], "a part of type None is neither"),
    ],
)
def test_conversations_that_are_none(messages, message, read):
    with pytest.raises(InputError, match=message):
        read({"messages": messages})


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "right"),
    [
        ({"answer": "yes"}, ("yes",)),
        ({"answers": ["yes"] * 6 + ["no"] * 4}, ("yes", "no")),
        ({"answers": [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}]}, ("yes",)),
        ({"answer": None, "answers": ["red"]}, ("red",)),
        ({"answers": [["red"], None, ""]}, ("red",)),
        ({"answer": {"value": "Paris", "aliases": ["paris, France"], "type": "x"}}, ("Paris", "paris, France")),
        ({"answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, ("a", "b")),
        ({"answer": 3}, ("3",)),
        ({"answer": 3.0}, ("3", "3.0")),
        ({"answer": 2.5}, ("2.5",)),
        ({"answer": True}, ("yes", "true")),
        ({"answer": False}, ("no", "false")),
        ({"answer": 0}, ("0",)),
        ({"messages": [USER, SAID]}, ("red",)),
        ({"messages": [USER, SAID], "answer": "blue"}, ("blue",)),
        ({"messages": [USER, SAID, USER]}, ()),
        ({"answer": None}, ()),
        ({"answer": "  "}, ()),
        ({"answers": []}, ()),
    ],
)
def test_answers_of_all_kinds(record, right, read):
    assert read(record)[0].answers == right


def test_answers_that_are_none(read, tmp_path):
    with pytest.raises(InputError, match="line 1: an answer is an object with note: one of answer, value, text"):
        read({"answer": {"note": "red"}})
    read({"answer": "red"}, {"answer": None}, {"answers": [None]})
    with pytest.raises(InputError, match=r"line 2 has no 'answer' \(2 of 3 have none\)"):
        load_task(TaskData(str(tmp_path / "q.jsonl")), None, 0)


@pytest.mark.parametrize(
    ("choices", "answer", "texts", "said"),
    [
        (["red", "blue"], "blue", ("red", "blue"), ("blue", "b", "B.")),
        (["red", "blue"], "B", ("red", "blue"), ("blue", "b")),
        (["red", "blue"], "(b)", ("red", "blue"), ("blue", "b")),
        (["red", "blue"], 1, ("red", "blue"), ("blue", "b")),
        (["red", "blue"], "1", ("red", "blue"), ("blue", "b")),
        (["red", "blue"], ["blue", "navy"], ("red", "blue"), ("blue", "navy", "b")),
        ([1, 2, 3], 3, ("1", "2", "3"), ("3", "c")),
        ([1, 2, 3], "3", ("1", "2", "3"), ("3", "c")),
        ([1.0, 2.5], "2.5", ("1", "2.5"), ("2.5", "b")),
        ([True, False], False, ("yes", "no"), ("no", "b", "false")),
        ({"A": "red", "B": "blue"}, "B", ("red", "blue"), ("blue", "b")),
        ({"B": "blue", "A": "red"}, "B", ("red", "blue"), ("blue", "b")),
        ({"1": "red", "2": "blue"}, "2", ("red", "blue"), ("blue", "2", "b")),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "B", ("red", "blue"), ("blue", "b")),
        ("['red', 'blue']", "B", ("red", "blue"), ("blue", "b")),
        (["A. red", "B. blue"], "blue", ("red", "blue"), ("blue", "b")),
        (["A. red", "B. blue"], "B", ("red", "blue"), ("blue", "b")),
        (None, "blue", (), ("blue",)),
        ([], "blue", (), ("blue",)),
    ],
)
def test_choices_of_all_kinds(choices, answer, texts, said, read):
    (sample,) = read({"choices": choices, "answer": answer})
    assert sample.choices == texts
    assert all(is_right(text, sample.answers, sample.choices) for text in said)
    assert not is_right("red", sample.answers, sample.choices) and not is_right("a", sample.answers, sample.choices)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", None]}, "a choice is a text or a number, not None"),
        ({"choices": [["a"]]}, "a choice is a text or a number"),
        ({"choices": 3}, "'choices' must be a list or a mapping of letters to texts, not 3"),
        ({"choices": "red, blue"}, "'choices' must be a list"),
        ({"choices": "[red"}, "'choices' is a text that is no list"),
        ({"choices": list(range(27))}, "27 choices are more than there are letters"),
        ({"choices": {"text": ["a"], "label": []}}, "as many labels as texts"),
        ({"choices": ["red", "blue"], "answer": "green"}, r"'green' is none of the choices \(red, blue\)"),
        ({"choices": ["red", "blue"], "answer": 2}, "2 is none of the choices .* counted from 0, to 1"),
        ({"choices": ["red", "blue"], "answer": "C"}, "'C' is none of the choices"),
    ],
)
def test_choices_that_are_none(record, message, read):
    with pytest.raises(InputError, match=message):
        read(record)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("color", "color"),
        (3, "3"),
        (True, "True"),
        (["a", "b"], "a, b"),
        ({"semantic": "rel", "detailed": None}, "semantic: rel"),
        (None, None),
        ("", None),
        ([], None),
    ],
)
def test_types_of_all_kinds(value, text, read):
    assert read({"type": value})[0].type == text


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """saved(columns, casts) is a saved data set's folder."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(4):
        picture(tmp_path / f"{i}.png", (40 + i, 48))

    def save(columns, **casts):
        table = datasets.Dataset.from_dict(columns)
        for name, feature in casts.items():
            table = table.cast_column(name, feature)
        folder = tmp_path / f"set{random.random()}"
        table.save_to_disk(folder)
        return folder

    return save


def sizes(samples):
    return [sample.open_images()[0].size[0] for sample in samples]


def test_image_columns_of_all_kinds(saved, tmp_path):
    import datasets

    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    content = [open(path, "rb").read() for path in paths]  # noqa: SIM115
    q, image = ["what?"] * 4, datasets.Image()
    several = [[path] for path in paths]
    for folder in (
        saved({"image": paths, "question": q}),
        saved({"image": paths, "question": q}, image=image),
        saved({"image": content, "question": q}),
        saved({"image": [{"bytes": one, "path": None} for one in content], "question": q}),
        saved({"image": [{"bytes": None, "path": path} for path in paths], "question": q}),
        saved({"images": several, "question": q}),
        saved({"images": several, "question": q}, images=datasets.List(image)),
        saved({"image": [base64.b64encode(one).decode() for one in content], "question": q}),
    ):
        for spec in (f"datasets:{folder}", str(folder)):
            assert sizes(load_calibration(spec, samples=None).samples) == [40, 41, 42, 43]


def test_what_a_row_lacks_is_said(saved, tmp_path):
    import datasets

    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    holes = saved({"image": [paths[0], None, *paths[2:]], "question": ["what?"] * 4}, image=datasets.Image())
    with pytest.raises(InputError, match="row 1: a question without an image"):
        load_task(TaskData(str(holes)), None, 0)
    with pytest.raises(InputError, match="row 1: neither 'question' nor 'messages'"):
        load_calibration(str(saved({"image": paths, "question": ["a", None, "b", "c"]})), samples=None)
    with pytest.raises(InputError, match="row 0: an image is a path, not"):
        load_calibration(str(saved({"image": [[[1, 2]]] * 4, "question": ["a"] * 4})), samples=None)


def test_questions_without_an_image_are_left_out_of_a_calibration(saved, tmp_path, caplog):
    """As instruction data has them in between; others are drawn for them, the same ones every time."""
    import datasets

    paths = [str(tmp_path / f"{i % 4}.png") for i in range(12)]
    images = [None if i % 3 else path for i, path in enumerate(paths)]
    table = {"image": images, "question": list("abcdefghijkl")}
    rows = str(saved(table, image=datasets.Image()))
    lines = tmp_path / "q.jsonl"
    records = [
        {"question": question} | ({"image": path} if path else {})
        for path, question in zip(images, "abcdefghijkl", strict=True)
    ]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    for spec in (rows, str(lines)):
        caplog.clear()
        assert [s.messages[0]["content"] for s in load_calibration(spec, samples=None).samples] == list("adgj")
        assert "questions without an image are left out (8); 4 are read" in caplog.text
        few, again = ([s.origin for s in load_calibration(spec, samples=3, seed=1).samples] for _ in range(2))
        assert len(few) == 3 and few == again
        with pytest.raises(InputError, match="a question without an image"):
            load_task(TaskData(spec), None, 0)
    lines.write_text(json.dumps({"question": "what?"}))
    with pytest.raises(InputError, match=r"line 1: a question without an image .*; of 1 questions none"):
        load_calibration(str(lines), samples=None)


def test_columns_by_role(saved, tmp_path):
    import datasets

    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    turns = [[USER, SAID]] * 4
    folder = str(
        saved(
            {
                "photo": paths,
                "second": paths,
                "chat": turns,
                "label": [0, 1, 1, 0],
                "kind": [1, 2, 3, 4],
                "q": ["?"] * 4,
            },
            label=datasets.ClassLabel(names=["cat", "dog"]),
        )
    )

    def first(**columns):
        return load_calibration(folder, samples=None, columns=columns).samples[1]

    assert first(image="photo", messages="chat").answers == ("red",)
    assert first(image="photo", question="chat").messages == (USER,)
    labelled = first(image="photo,second", question="q", answer="label", type="kind")
    assert (labelled.answers, labelled.type, len(labelled.images)) == (("dog",), "2", 2)
    with pytest.raises(InputError, match="has no column 'pic' for the image; it has: photo, second, chat"):
        first(image="pic", question="q")
    with pytest.raises(InputError, match="'imagee' is no role of a column: did you mean 'image'"):
        first(imagee="photo")
    with pytest.raises(InputError, match="no column 'question' for the question"):
        first(image="photo")


def test_videos_in_the_messages_of_a_data_set(saved):
    """They are taken as those of a file of questions are, with as many frames."""
    part = {"type": "video", "path": "clip.mp4"}
    turns = [[{"role": "user", "content": [part, {"type": "text", "text": "what?", "path": None}]}]]
    folder = saved({"messages": turns})
    for frames, most in ((None, 8), (16, 16)):
        (sample,) = load_calibration(str(folder), samples=None, frames=frames).samples
        (video,) = sample.videos
        assert (video.file, video.most_frames) == (folder / "clip.mp4", most)


def test_splits_configurations_and_parquet(saved, tmp_path):
    import datasets

    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    table = datasets.load_from_disk(str(saved({"image": paths, "question": list("abcd")}, image=datasets.Image())))
    datasets.DatasetDict({"test": table, "dev": table.select(range(2))}).save_to_disk(tmp_path / "both")
    assert len(load_calibration(str(tmp_path / "both"), samples=None, split="dev").samples) == 2
    with pytest.raises(InputError, match=r"has several splits: test, dev\. Say which with --split"):
        load_calibration(str(tmp_path / "both"), samples=None, split=None)
    with pytest.raises(InputError, match="has no split 'train'; it has: test, dev"):
        load_calibration(str(tmp_path / "both"), samples=None)
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "one.parquet")
    assert sizes(load_calibration(str(tmp_path / "files" / "one.parquet"), samples=2).samples)
    assert len(load_calibration(f"datasets:{tmp_path / 'files'}", samples=None, split=None).samples) == 4
    with pytest.raises(InputError, match=r"holds no images .* read as datasets:FOLDER"):
        load_calibration(str(tmp_path / "files"), samples=None)
    (tmp_path / "bad.parquet").write_text("PAR1 or not")
    with pytest.raises(InputError, match=r"bad.parquet' \(split 'train'\) can't be loaded"):
        load_calibration(str(tmp_path / "bad.parquet"), samples=None)
    with pytest.raises(InputError, match="--config is for data sets"):
        load_calibration(str(tmp_path / "0.png"), samples=None, config="x")


def test_images_of_a_data_set_are_drawn_before_they_are_read(saved, tmp_path, monkeypatch):
    """Four of 400 images are read, one at a time, and none before it is opened."""
    import datasets
    from PIL import Image

    from exporter.data.tables import TableSamples

    picture(tmp_path / "x.png", (300, 300))
    folder = saved({"image": [str(tmp_path / "x.png")] * 400, "question": ["what?"] * 400}, image=datasets.Image())
    decoded, cells = [], []
    load, cell = Image.Image.load, TableSamples._cell
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(1) or load(self))
    monkeypatch.setattr(TableSamples, "_cell", lambda self, *where: cells.append(where) or cell(self, *where))
    drawn = load_calibration(str(folder), samples=4)
    assert (drawn.total, len(drawn.samples), decoded) == (400, 4, [])
    assert len(cells) == 4
    for sample in drawn.samples:
        decoded.clear()
        assert len(sample.open_images()) == 1
        assert 0 < len(decoded) < 8
    assert len({where[0] for where in cells}) == 4
    # Nothing of an image stays with the sample: its size is that of a reference.
    assert not any(isinstance(image, bytes) for sample in drawn.samples for image in sample.images)
