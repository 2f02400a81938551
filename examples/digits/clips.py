"""Short clips of handwritten digits: which ones appear, in which order, and how many there are over time.

A clip is a few frames of one background. In each frame stand one or two digits that no other frame has, in places of
their own; a frame may be empty. The handwriting is that of the splits of `data.py`, so that calibration and validation
share no hand. Three types of question: `order` (every digit with its colour, in the order of appearance), `then`
(whether one digit comes after another), and `count` (how many over all frames). No single frame answers them.

    python examples/digits/clips.py --split validation --out clips

writes clips/validation.jsonl with the frames as a video, and clips/validation-images.jsonl with the same frames as
several images, for models that take no video.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import COLORS, SPLIT_DIGITS, background, draw_digit, handwriting
from PIL import Image

FPS = 2
SIDE = 48  # pixels
MOST_DIGITS = 4  # of a clip
SEEDS = {"train": 11, "calibration": 12, "validation": 13, "test": 14}
QUESTION_TYPES = ("order", "then", "count")


@dataclass(frozen=True)
class Appearance:
    """A digit and the frame in which it is seen."""

    frame: int
    value: int
    color: str


@dataclass(frozen=True)
class DigitClip:
    frames: tuple[Image.Image, ...]
    digits: tuple[Appearance, ...]  # in the order of appearance, from left to right within a frame


def make_clip(rng: np.random.Generator, split: str, frames: int) -> DigitClip:
    """One random clip; all digits of it have different values."""
    glyphs, values = handwriting(split)
    still, _ = background(rng, SIDE, SIDE)
    pictures = [still.copy() for _ in range(frames)]
    count = int(rng.integers(1, min(MOST_DIGITS, 2 * frames) + 1))
    seen_in = sorted(rng.choice(np.repeat(np.arange(frames), 2), count, replace=False).tolist())
    digits: list[Appearance] = []
    for number, value in zip(seen_in, rng.choice(10, count, replace=False).tolist(), strict=True):
        sample = int(rng.choice(np.flatnonzero(values == value)))
        color, size = str(rng.choice(list(COLORS))), int(rng.integers(16, 21))
        right = SIDE / 2 if digits and digits[-1].frame == number else 0  # the second of a frame
        corner = (right + float(rng.uniform(0, SIDE / 2 - size)), float(rng.uniform(0, SIDE - size)))
        draw_digit(pictures[number], glyphs[sample], color, corner, size, float(rng.uniform(-8, 8)))
        digits.append(Appearance(number, value, color))
    return DigitClip(tuple(pictures), tuple(digits))


def ask(clip: DigitClip, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of this type and its answer, in the words of the reference model; None where the clip admits none."""
    digits = clip.digits
    if kind == "order":
        return "describe the digits, image to image.", " then ".join(f"{d.color} {d.value}" for d in digits)
    if kind == "count":
        return "how many digits are there?", str(len(digits))
    pairs = [(a, b) for a in digits for b in digits if a.frame < b.frame]
    if not pairs:
        return None
    first, second = pairs[rng.integers(len(pairs))]
    yes = rng.random() < 0.5
    first, second = (first, second) if yes else (second, first)
    return f"is there a {first.value} and then a {second.value}?", "yes" if yes else "no"


def write_clips(split: str, folder: Path, number: int, frames: int) -> None:
    """Write clips with a question of each type that they admit, as videos and as several images."""
    rng = np.random.default_rng(SEEDS[split])
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(number):
        clip = make_clip(rng, split, frames)
        names = [f"{split}/{index:04d}-{frame}.png" for frame in range(frames)]
        for name, frame in zip(names, clip.frames, strict=True):
            frame.save(folder / name, optimize=True)
        for kind in QUESTION_TYPES:
            if (found := ask(clip, kind, rng)) is not None:
                lines.append((names, {"question": found[0], "answer": found[1], "type": kind}))
    as_video = [{"video": names, "fps": FPS, **line} for names, line in lines]
    as_images = [{"images": names, **line} for names, line in lines]
    for name, records in ((f"{split}.jsonl", as_video), (f"{split}-images.jsonl", as_images)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = {kind: sum(line["type"] == kind for _, line in lines) for kind in QUESTION_TYPES}
    print(f"{split}: {len(lines)} questions about {number} clips of {frames} frames, {asked}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=[split for split in SEEDS if split in SPLIT_DIGITS], default="validation")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--frames", type=int, default=4)
    options = parser.parse_args()
    write_clips(options.split, options.out, options.clips, options.frames)


if __name__ == "__main__":
    main()
