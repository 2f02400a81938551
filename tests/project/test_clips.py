"""The clips of examples/digits/clips.py: drawn alike each time, and no single frame answers their questions."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
sys.path.append(str(Path(__file__).parents[2] / "examples" / "digits"))  # behind the zoo, which has a train.py too

import clips

from exporter.data.calibration import load_calibration

WORDS = {"yes": True, "no": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.write_clips("validation", folder, 12, 4)
    return folder


def test_both_files_ask_the_same_about_the_same_frames(written):
    videos = load_calibration(str(written / "validation.jsonl"), samples=None).samples
    images = load_calibration(str(written / "validation-images.jsonl"), samples=None).samples
    assert len(videos) == len(images) > 24
    for video, several in zip(videos, images, strict=True):
        assert video.videos[0].frames == several.images and video.videos[0].fps == clips.FPS
        assert (video.messages, video.answers, video.type) == (several.messages, several.answers, several.type)
        video.check()


def test_answers_follow_from_all_frames(written):
    """By reading the clip's own list of digits anew: in which frame, which value, which colour."""
    rng, questions = np.random.default_rng(clips.SEEDS["validation"]), np.random.default_rng(1)
    kinds = dict.fromkeys(clips.QUESTION_TYPES, 0)
    for _ in range(30):
        clip = clips.make_clip(rng, "validation", 4)
        frames = {digit.value: digit.frame for digit in clip.digits}
        assert len(frames) == len(clip.digits) and all(list(frames.values()).count(n) <= 2 for n in range(4))
        still = [frame for frame in range(4) if frame not in frames.values()]
        drawn = {clip.frames[frame].tobytes() for frame in range(4)}
        assert len(drawn) == 4 - len(still) + bool(still)  # what shows no digit is the background
        for kind in clips.QUESTION_TYPES:
            found = clips.ask(clip, kind, questions)
            assert found is not None or (kind == "then" and len(set(frames.values())) == 1)
            if found is None:
                continue
            question, answer = found
            kinds[kind] += 1
            if kind == "count":
                assert int(answer) == len(frames)
            elif kind == "order":
                named = [int(part.split()[1]) for part in answer.split(" then ")]
                assert [frames[value] for value in named] == sorted(frames.values())
            else:
                first, second = (int(word) for word in question.strip("?").split() if word.isdigit())
                assert WORDS[answer] == (frames[first] < frames[second])
    assert min(kinds.values()) > 10


def test_clips_are_drawn_alike_each_time(written, tmp_path):
    clips.write_clips("validation", tmp_path, 12, 4)
    for path in sorted(tmp_path.rglob("*.*")):
        other = written / path.relative_to(tmp_path)
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert {line["type"] for line in lines} == set(clips.QUESTION_TYPES)
