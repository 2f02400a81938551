"""Videos in lines: every spelling gives the same frames and times, and every family's processor its own tokens."""

from __future__ import annotations

import builtins
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures.checkpoints import picture
from fixtures.videos import FRAME, VIDEO_FAMILIES, chat, clip, write_clips

from exporter.checkpoints.source import open_source
from exporter.clean_room import encode, load_processor
from exporter.clean_room import video as video_module
from exporter.clean_room.video import number_words, without_torchvision
from exporter.data import videos as video_file
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.data.pictures import pictures_of
from exporter.data.samples import sample_from
from exporter.data.videos import chosen_frames
from exporter.errors import InputError
from exporter.families import visual_token_ids
from exporter.models.loading import load_model

NAMES = ["0.png", "1.png", "2.png"]


@pytest.fixture
def read(tmp_path):
    for name in NAMES:
        picture(tmp_path / name, (40 + 2 * len(name), 40))
    picture(tmp_path / "other.png", (20, 20))
    return lambda record, **how: sample_from({"question": "what?", **record}, "line 1", tmp_path, **how)


# --- what stands in a line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"video": NAMES, "fps": 4},
        {"videos": [NAMES], "fps": 4},
        {"video": {"frames": NAMES, "fps": 4}},
        {"videos": [{"frames": [{"path": name} for name in NAMES], "fps": 4.0}]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": NAMES, "fps": 4}, "what?"]}]},
        {"conversations": [{"from": "human", "value": "<video>\nwhat?"}], "video": NAMES, "fps": 4},
    ],
)
def test_every_spelling_is_the_same_video(read, record):
    sample = read(record)
    (video,) = sample.open_videos()
    assert [frame.size for frame in video.frames] == [(50, 40)] * 3
    assert video.metadata == {"total_num_frames": 3, "fps": 4.0, "duration": 0.75, "frames_indices": [0, 1, 2]}
    assert [part["type"] for part in sample.chat()[0]["content"]] == ["video", "text"]
    assert not sample.images and sample.is_seen


def test_times_of_frames(read):
    seconds = [0.5, 1.0, 3.5]
    (video,) = read({"video": NAMES, "timestamps": seconds}).open_videos()
    assert [index / video.fps for index in video.indices] == seconds
    assert video.total / video.fps == 4.5  # three frames over three seconds, the last one as long as the others
    (video,) = read({"video": NAMES}).open_videos()
    assert video.fps == 2.0  # as Qwen's tools take frames that come without times


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video": []}, "a video is a list of images or the path of a file, not \\[\\]"),
        ({"video": 3}, "a video is a list of images or the path of a file, not 3"),
        ({"videos": "a.mp4"}, "'videos' is a list of videos; one alone is 'video'"),
        ({"video": {"fps": 3}}, "a video has 'frames', a list of images, or 'path', a file; this has neither"),
        ({"video": "https://a.b/c.mp4"}, "the video 'https://a.b/c.mp4' is no path of a file: download it"),
        ({"video": "a.mp4", "fps": 2}, "a video file knows its own times: take 'fps' out"),
        ({"video": NAMES, "fps": 0}, "fps=0: a number of frames a second above 0 is needed"),
        ({"video": NAMES, "fps": 2, "timestamps": [0, 1, 2]}, "'fps' or 'timestamps', not both"),
        ({"video": NAMES, "timestamps": [0, 1]}, "timestamps: a list of 3 numbers is needed"),
        ({"video": NAMES, "timestamps": [0, 1, 1]}, "timestamps must rise from frame to frame"),
        ({"videos": [NAMES, NAMES], "fps": 2}, "'fps' does not say which of 2 videos it is of"),
        ({"video": [*NAMES, 3]}, "an image is a path, not 3"),
        ({"video": NAMES, "question": "<video><video>?"}, "the messages place 2 videos, the line names 1"),
        ({"image": NAMES[0], "question": "<video>?"}, "the messages place 1 videos, the line names 0"),
    ],
)
def test_what_is_no_video(read, record, message):
    with pytest.raises(InputError, match=message):
        read(record)


def test_frames_have_one_size_and_are_there(read):
    with pytest.raises(InputError, match="of one size, and these are of 50 x 40 and 20 x 20 pixels"):
        read({"video": [NAMES[0], "other.png"]}).check()
    with pytest.raises(InputError, match=r"line 1: there is no image .*none\.png"):
        read({"video": [NAMES[0], "none.png"]}).check()


def test_fingerprints_see_frames_and_times(tmp_path):
    def fingerprint(fps, name="0-0.png"):
        path = tmp_path / "clips.jsonl"
        path.write_text(json.dumps({"video": [name, "0-1.png"], "fps": fps, "question": "what?"}))
        return load_calibration(str(path), samples=None).fingerprint

    write_clips(tmp_path, [3])
    assert len({fingerprint(2), fingerprint(3), fingerprint(2, "0-2.png")}) == 3


def test_questions_about_one_video_are_about_one_picture(tmp_path):
    samples = load_calibration(str(write_clips(tmp_path, [3, 2])), samples=None).samples
    first, second, third = pictures_of([*samples, samples[0]])  # frames of one video are one picture
    assert first == third != second


class Stated:
    """A stream that says another number of frames."""

    def __init__(self, stream, frames):
        self.stream, self.frames = stream, frames
        self.container = SimpleNamespace(decode=lambda _: stream.container.decode(stream))

    def __getattr__(self, name):
        return getattr(self.stream, name)


# --- files ------------------------------------------------------------------------------------------------------------


def test_frames_of_a_file_are_spread_evenly():
    assert chosen_frames(100, 4) == [12, 37, 62, 87]
    assert chosen_frames(3, 8) == [0, 1, 2]
    assert chosen_frames(1, 1) == [0]


def test_a_file_without_pyav_says_what_to_install(read, monkeypatch):
    without = builtins.__import__

    def fails(name, *more):
        if name == "av":
            raise ImportError(name)
        return without(name, *more)

    monkeypatch.setattr(builtins, "__import__", fails)
    sample = read({"video": "a.mp4"})
    with pytest.raises(InputError, match="is a video file, which PyAV reads: pip install av, or give its frames"):
        sample.check()
    assert sample.pixels == 0


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])  # the latter does not say how many frames there are
@pytest.mark.parametrize("stated", [None, 30])
def test_a_file_through_pyav(name, stated, read, tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for number in range(20):
            gray = np.full((48, 64, 3), 12 * number, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        file.mux(stream.encode())
    if stated:  # more than there are, as in a file that was cut off
        opened = video_file._opened.__enter__
        monkeypatch.setattr(video_file._opened, "__enter__", lambda self: Stated(opened(self), stated))
    sample = read({"video": name}, frames=4)
    (video,) = sample.open_videos()
    assert (video.indices, video.total, video.fps) == ((2, 7, 12, 17), 20, 10.0)
    assert sample.pixels == 4 * 64 * 48
    brightness = [np.asarray(frame).mean() for frame in video.frames]
    assert np.abs(np.array(brightness) - 12 * np.array(video.indices)).max() < 6
    (tmp_path / "b.mp4").write_bytes(b"no video")
    for name, message in (("b.mp4", "can't be read as a video"), ("c.mp4", "there is no video")):
        with pytest.raises(InputError, match=message):
            read({"video": name}).check()


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_tokens_of_frames_are_visual(family, tiny, clips):
    source = open_source(str(tiny(family)))
    processor = load_processor(source.folder)
    batch = make_batch(load_calibration(str(clips), samples=3).samples, processor, source.config)
    counts = batch.is_visual.sum(1)
    assert torch.equal(
        batch.is_visual, torch.isin(batch.inputs["input_ids"], torch.tensor(visual_token_ids(source.config)))
    )
    grids = batch.inputs.get("video_grid_thw")
    expected = {"llava_onevision": 4 * 2 * 2 + 1, "internvl": 4 * 16, "smolvlm": 4 * 9}
    tokens = expected[family] if grids is None else int(grids[0].prod()) // 4
    assert counts.tolist() == [tokens] * 3
    words = processor.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0][batch.is_text[0]].tolist())
    assert {"what", "is", "first"} <= set(words)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_patches_are_the_frames_in_pairs(family, tiny):
    """Against patches cut by hand: two frames of one place lie in one patch, 2 x 2 patches one after the other."""
    processor = load_processor(tiny(family))
    video = clip(5)
    inputs = encode(processor, [chat("video")], [[]], [[video]])
    time, rows, columns = inputs["video_grid_thw"][0].tolist()
    patch = 5
    assert time == 3  # the last frame twice
    if (rows * patch, columns * patch) != FRAME[::-1]:  # three positions at once: a clip may be made smaller
        video = clip(5, size=(columns * patch, rows * patch))
        inputs = encode(processor, [chat("video")], [[]], [[video]])
        assert inputs["video_grid_thw"][0].tolist() == [time, rows, columns]
    pixels = np.stack([np.asarray(frame) for frame in (*video.frames, video.frames[-1])]) / 255
    found = inputs["pixel_values_videos"].reshape(time, rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)
    for t, row, column in ((0, 0, 1), (2, rows - 1, columns - 2), (1, 2, 3)):
        place = pixels[2 * t : 2 * t + 2, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        expected = (place - 0.5) / 0.5  # [2, patch, patch, 3]
        patches = found[t, row // 2, column // 2, row % 2, column % 2]  # [3, 2, patch, patch]
        np.testing.assert_allclose(patches.permute(1, 2, 3, 0), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_resized_frame_is_that_of_the_image_processor(family, tiny):
    """PIL resizes images and torch frames: they differ by rounding, of which antialiasing takes two steps."""
    processor = load_processor(tiny(family))
    image = clip(1, size=(90, 70)).frames[0]
    still = encode(processor, [chat("image")], [[image]])["pixel_values"]
    video = type(clip(1))((image, image), (0, 1), 2, 2.0)
    frames = encode(processor, [chat("video")], [[]], [[video]])["pixel_values_videos"]
    still = still if family == "qwen2_vl" else still[0, 0].expand_as(frames)  # the whole image in one tile comes first
    assert (frames - still).abs().max() < 0.5 * 6 / 127.5
    assert (frames - still).abs().mean() < 0.5 / 127.5


def test_timestamps_are_in_the_prompt(tiny):
    processor = load_processor(tiny("qwen3_vl"))
    ids = encode(processor, [chat("video")], [[]], [[clip(4, fps=2.0)]])["input_ids"][0]
    tokens = "".join(processor.tokenizer.convert_ids_to_tokens(ids.tolist()))
    assert "<0.2" in tokens and "<1.2" in tokens  # the middles of two pairs: 0.25 and 1.25 s
    processor = load_processor(tiny("smolvlm"))
    ids = encode(processor, [chat("video")], [[]], [[clip(5, fps=0.5)]])["input_ids"][0]
    tokens = "".join(processor.tokenizer.convert_ids_to_tokens(ids.tolist()))
    assert "offive<unk>" in tokens  # frames, spelled out
    assert [f"00:0{second}:" in tokens for second in (0, 2, 4, 6, 8)] == [True] * 5


def test_numbers_are_spelled_as_num2words_does():
    numbers = {0: "zero", 19: "nineteen", 40: "forty", 64: "sixty-four", 100: "one hundred"}
    numbers |= {342: "three hundred and forty-two", 1000: "1000"}
    assert {number: number_words(number) for number in numbers} == numbers


@pytest.mark.parametrize(("family", "name"), [("llava", "Llava"), ("gemma3", "Gemma3"), ("paligemma", "PaliGemma")])
def test_processors_that_take_no_video(family, name, tiny, clips):
    source = open_source(str(tiny(family)))
    processor = load_processor(source.folder)
    samples = load_calibration(str(clips), samples=1).samples
    with pytest.raises(InputError, match=f"line .*{name}Processor takes no video: give its frames as several images"):
        make_batch(samples, processor, source.config)


def test_a_video_processor_that_can_not_be_made(tiny, monkeypatch):
    """Images go on; videos say why not."""
    monkeypatch.setattr(video_module, "_stock_class", lambda name: 1 / 0)
    processor = load_processor(tiny("qwen3_vl"))
    assert encode(processor, [chat("image")], [[clip(1).frames[0]]])["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="the video processor of Qwen3VLProcessor needs torchvision, or its settings"):
        encode(processor, [chat("video")], [[]], [[clip(2)]])


def test_what_goes_into_one_batch(tiny, tmp_path):
    samples = load_calibration(str(write_clips(tmp_path, [3, 2])), samples=None).samples
    source = open_source(str(tiny("qwen2_vl")))
    assert make_batch(samples, load_processor(source.folder), source.config).is_visual.any(1).all()
    image, video = clip(1).frames[0], clip(3)
    mixed = encode(load_processor(source.folder), [chat("image"), chat("video")], [[image], []], [[], [video]])
    assert mixed["mm_token_type_ids"].amax(1).tolist() == [1, 2]  # an image in the first, a video in the second
    source = open_source(str(tiny("llava_onevision")))
    with pytest.raises(InputError, match="takes videos of as many frames in one batch, not of 2 and 3"):
        make_batch(samples, load_processor(source.folder), source.config)
    with pytest.raises(ValueError, match=r"as many frames in one question, not of 2 and 3: give them as many frames$"):
        encode(load_processor(source.folder), [chat("video", "video")], [[]], [[clip(3), clip(2)]])


@pytest.mark.parametrize("family", ["smolvlm", "glm4v"])
def test_who_takes_images_or_videos(family, tiny):
    """SmolVLM gives both one name, GLM-4.1V one placeholder, which its model then takes for images."""
    processor, image = load_processor(tiny(family)), clip(1).frames[0]
    with pytest.raises(ValueError, match="takes images or videos in one batch, not both: ask about them apart"):
        encode(processor, [chat("image"), chat("video")], [[image], []], [[], [clip(2)]])
    with pytest.raises(ValueError, match="or give the frames as several images, under 'images'"):
        encode(processor, [chat("image", "video")], [[image]], [[clip(2)]])


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_each_video_and_image_keeps_its_place(family, tiny):
    """A video of odd length, and an image, each say the same with other questions in their batch as alone."""
    source = open_source(str(tiny(family)))
    processor, model = load_processor(source.folder), load_model(source, "cpu", torch.float32)[0]
    asked = [("video", "image"), ("video",), ("image", "image")]
    images = [[clip(1, seed=1).frames[0]], [], [clip(1, seed=seed).frames[0] for seed in (2, 3)]]
    videos = [[clip(3, seed=4)], [clip(3, seed=5)], []]
    with torch.no_grad():
        together = model(**encode(processor, [chat(*kinds) for kinds in asked], images, videos)).logits[:, -1]
        for row, kinds in enumerate(asked):
            alone = model(**encode(processor, [chat(*kinds)], [images[row]], [videos[row]])).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)


def test_frames_are_cut_in_the_middle():
    from transformers.image_utils import SizeDict

    class Stock:
        pass

    cls = without_torchvision(type("Cut", (object,), {}))
    image = torch.arange(30.0).reshape(1, 5, 6)
    cut = cls.center_crop(Stock(), image, SizeDict(height=3, width=2))
    assert torch.equal(cut, image[:, 1:4, 2:4])
    cut = cls.center_crop(Stock(), image, SizeDict(height=7, width=6))
    assert torch.equal(cut[:, 1:6], image) and not cut[:, 0].any() and not cut[:, 6].any()
