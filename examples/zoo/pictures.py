"""The two kinds of pictures that the models of the zoo are asked about, in one form, and the questions of a model.

A model has pictures that it is trained on and four files of questions beside it:

    calibration-seen      about pictures that it was trained on
    calibration-unseen    about pictures that it never saw (digits: of handwriting that it never saw)
    validation, test      likewise, of others
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent / "digits"))
import data as digits
import shapes

BINS = digits.BINS  # of a thing's place, from side to side of the picture
Sizes = tuple[tuple[int, int], ...]  # (height, width) in pixels
SPLITS = {
    "train": 0,
    "calibration-unseen": 600,
    "validation": 250,
    "test": 400,
}  # pictures; as many as asked to train on
SEEN = 600  # of the training pictures, the first, are those of calibration-seen
QUESTIONS_PER_PICTURE = 4


@dataclass(frozen=True)
class Question:
    type: str
    text: str
    answer: str
    mentions: tuple[tuple[str, int, int], ...] = ()  # words that mean one thing of the picture, and its place in BINS


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    labels: np.ndarray  # [2, H, W] uint8: colour and name of the thing that a pixel shows, from 1; 0 is the ground
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of pictures."""

    draw: Callable[[np.random.Generator, str, Sizes], Picture]
    colors: tuple[str, ...]
    names: tuple[str, ...]
    question_types: tuple[str, ...]
    words: tuple[str, ...]  # everything that questions and answers are made of
    weights: dict[str, float]  # how often a type of question is drawn in training: what is learnt late more often


def label(labels: np.ndarray, box: tuple[float, float, float, float], color: int, name: int) -> None:
    """Mark the pixels of a thing's box in labels [2, H, W]."""
    x0, y0, x1, y1 = (max(0, round(v)) for v in box)
    labels[0, y0:y1, x0:x1] = color + 1
    labels[1, y0:y1, x0:x1] = name + 1


def ask_all(ask, types: Iterable[str], once: tuple[str, ...], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return (type, question, answer) of every type that the picture admits, two of those that differ by the draw."""
    asked = []
    for kind in types:
        for _ in range(1 if kind in once else 2):
            found = ask(kind)
            if found and (kind, *found) not in asked:
                asked.append((kind, *found))
    return asked


# --- digits ----------------------------------------------------------------------------------------------------------

DIGIT_TYPES = ("count", "color", "digit", "where", "exists", "left", "describe")
DIGIT_SPLITS = {"train": "zoo train", "calibration-unseen": "zoo calibration"}


def draw_digits(rng: np.random.Generator, split: str, sizes: Sizes) -> Picture:
    """Draw handwritten digits (examples/digits), sheared and stretched at random for training."""
    scene = digits.make_scene(rng, DIGIT_SPLITS.get(split, split), vary=split == "train", sizes=sizes)
    labels = np.zeros((2, *scene.image.size[::-1]), np.uint8)
    for d in scene.digits:
        box = (d.box[0] + 2, d.box[1], d.box[2] - 2, d.box[3])
        label(labels, box, list(digits.COLORS).index(d.color), d.value)
    asked = ask_all(lambda kind: digits.ask(scene, kind, rng), DIGIT_TYPES, ("count", "describe"), rng)
    questions = (Question(*one, mentions=tuple(digits.mentions(scene, *one[:2]))) for one in asked)
    return Picture(scene.image, labels, tuple(questions))


# --- shapes ----------------------------------------------------------------------------------------------------------


def draw_shapes(rng: np.random.Generator, split: str, sizes: Sizes) -> Picture:
    """Draw coloured shapes; the splits differ by their seeds."""
    scene = shapes.make_scene(rng, sizes)
    labels = np.zeros((2, *scene.image.size[::-1]), np.uint8)
    for s in scene.shapes:
        label(labels, s.box, list(shapes.COLORS).index(s.color), list(shapes.PLURALS).index(s.name))
    asked = ask_all(lambda kind: shapes.ask(scene, kind, rng), shapes.QUESTION_TYPES, ("describe",), rng)
    questions = (Question(*one, mentions=shape_mentions(scene, *one[:2])) for one in asked)
    return Picture(scene.image, labels, tuple(questions))


def shape_mentions(scene: shapes.Scene, kind: str, question: str) -> tuple[tuple[str, int, int], ...]:
    """Return the words of a question (describe: of its answer), in order, that mean one shape, with its place."""
    width, height = scene.image.size
    if kind == "describe":
        meant = [(s.name, s) for s in scene.shapes]
    else:
        named = [(word, s) for s in scene.shapes for word in (s.name, s.color)]
        words = [word for word, _ in named]
        only = {word: s for word, s in named if words.count(word) == 1}
        meant = [(word, only[word]) for word in question.strip("?").split() if word in only]
    return tuple((word, int(s.center[0] / width * BINS), int(s.center[1] / height * BINS)) for word, s in meant)


NUMBERS = tuple(map(str, range(10)))
KINDS: dict[str, Kind] = {
    "digits": Kind(
        draw_digits, tuple(digits.COLORS), NUMBERS, DIGIT_TYPES,
        words=tuple("""what color is the which digit digits where there a in image how many are left right of describe
            from to top bottom yes no then""".split()),
        weights={"count": 0.5, "exists": 0.7, "color": 2.0, "where": 2.0, "left": 3.0, "describe": 1.3},
    ),
    "shapes": Kind(
        draw_shapes, tuple(shapes.COLORS), tuple(shapes.PLURALS), shapes.QUESTION_TYPES,
        words=(*shapes.WORDS, *shapes.PLURALS.values()),
        weights={"count": 1.6, "relation": 2.0, "where": 1.2, "describe": 2.0},
    ),
}  # fmt: skip


# --- splits and files ------------------------------------------------------------------------------------------------


def draw_split(kind: str, split: str, sizes: Sizes, seed: int, count: int, first: int = 0) -> Iterable[Picture]:
    """Draw `count` pictures of a split from number `first` on; each has its own seed, the same for the same arguments.

    No picture is in two splits: their seeds differ, and a byte-for-byte repetition among free positions does not occur
    (a test compares them).
    """
    number = list(SPLITS).index(split)
    for index in range(first, first + count):
        yield KINDS[kind].draw(np.random.default_rng([seed, number, index]), split, sizes)


def write_questions(kind: str, sizes: Sizes, seed: int, folder: Path) -> None:
    """Write the four files of questions (JSONL) and their pictures (PNG) into a folder."""
    parts = {"calibration-seen": ("train", SEEN)}
    parts |= {split: (split, count) for split, count in SPLITS.items() if split != "train"}
    for name, (split, count) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        asked = dict.fromkeys(KINDS[kind].question_types, 0)
        lines = []
        for index, picture in enumerate(draw_split(kind, split, sizes, seed, count)):
            file = f"{name}/{index:04d}.png"
            picture.image.save(folder / file, optimize=True)
            for question in balanced(picture.questions, asked, np.random.default_rng([seed, index])):
                entry = {"image": file, "question": question.text, "answer": question.answer, "type": question.type}
                lines.append(json.dumps(entry) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def balanced(questions: tuple[Question, ...], asked: dict[str, int], rng: np.random.Generator) -> list[Question]:
    """Return QUESTIONS_PER_PICTURE questions of different types, those that were asked least so far, and count them."""
    by_type: dict[str, Question] = {}
    for i in rng.permutation(len(questions)):
        by_type.setdefault(questions[i].type, questions[i])
    chosen = sorted(by_type.values(), key=lambda q: (asked[q.type], rng.random()))[:QUESTIONS_PER_PICTURE]
    for question in chosen:
        asked[question.type] += 1
    return chosen
