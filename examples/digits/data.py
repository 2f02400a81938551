"""Synthetic visual questions about real handwritten digits: scenes, questions, splits.

A scene is an image of 48 to 144 pixels a side on a textured background, with one to five of scikit-learn's 8x8
handwritten digits (the UCI "Optical Recognition of Handwritten Digits" test set, 1,797 of them) coloured, scaled,
rotated and placed freely: nothing is aligned to the patch grid of a vision tower. Every digit sample belongs to one
split only (but those of the test to the fresh one as well), so the model meets the handwriting of the validation and
test questions for the first time there.

    python examples/digits/data.py            writes the splits, JSONL and PNG, beside this file
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (235, 60, 50),
    "green": (70, 205, 80),
    "blue": (80, 120, 255),
    "yellow": (245, 220, 70),
    "purple": (200, 80, 220),
    "white": (245, 245, 245),
}
TEXTURES = ("plain", "stripes", "checks", "dots")
SIZES = (
    (48, 48),
    (48, 72),
    (72, 48),
    (48, 96),
    (96, 48),
    (64, 64),
    (64, 96),
    (96, 64),
    (80, 80),
    (72, 96),
    (96, 72),
    (96, 96),
    (48, 144),
    (144, 48),
)  # (height, width) in pixels
QUESTION_TYPES = ("count", "color", "digit", "where", "exists", "left", "largest", "background", "describe")
# How many of the 1,797 handwritten samples a split owns; calibration draws from the training hands, in new scenes.
# The models of examples/zoo are trained on fewer hands, so that some are left for calibration with hands never seen.
SPLIT_DIGITS = {
    "train": slice(0, 1197),
    "calibration": slice(0, 1197),
    "zoo train": slice(0, 1047),
    "zoo calibration": slice(1047, 1197),
    "validation": slice(1197, 1447),
    "test": slice(1447, 1797),
    "fresh": slice(1447, 1797),  # no other hands are left: those of the test, in scenes that nobody has looked at
}
SPLIT_SEEDS = {"train": 1, "calibration": 2, "validation": 3, "test": 4, "fresh": 5}
SPLIT_SCENES = {"calibration": 600, "validation": 250, "test": 400, "fresh": 300}
USED_ONCE = ("fresh",)  # splits by which nothing was chosen, until their .uses.jsonl says otherwise
QUESTIONS_PER_SCENE = 4
BINS = 16  # of a digit's place, from side to side of the image


@dataclass(frozen=True)
class Digit:
    value: int
    color: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    texture: str
    digits: tuple[Digit, ...]  # from left to right


@functools.cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits: glyphs [n, 8, 8] in 0..1 and their values [n]."""
    from sklearn.datasets import load_digits

    images, values = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(values))[SPLIT_DIGITS[split]]
    return images[order].reshape(-1, 8, 8) / 16.0, values[order]


def background(rng: np.random.Generator, height: int, width: int) -> tuple[Image.Image, str]:
    """A dark, muted texture, and its name."""
    texture = str(rng.choice(TEXTURES))
    low = rng.integers(15, 60, 3)
    high = np.clip(low + rng.integers(25, 60), 0, 125)
    y, x = np.mgrid[0:height, 0:width]
    period, phase = rng.integers(5, 10), rng.integers(0, 10, 2)
    if texture == "plain":
        pattern = np.zeros((height, width))
    elif texture == "stripes":
        pattern = ((x + (y if rng.random() < 0.5 else 0) + phase[0]) // period) % 2
    elif texture == "checks":
        pattern = ((x + phase[0]) // period + (y + phase[1]) // period) % 2
    else:
        radius = period * 0.3
        dx, dy = (x + phase[0]) % period - period / 2, (y + phase[1]) % period - period / 2
        pattern = (dx**2 + dy**2 < radius**2).astype(float)
    pixels = low + pattern[..., None] * (high - low)
    light = 1 + 0.15 * (x / width - 0.5)[..., None] * rng.uniform(-1, 1)  # a soft gradient compresses better than noise
    return Image.fromarray(np.clip(pixels * light, 0, 255).astype(np.uint8)), texture


def place(rng: np.random.Generator, height: int, width: int, sizes: list[int]) -> list[tuple[float, float]] | None:
    """Top left corners for squares of these sizes: free positions, no overlap, centres at least 5 pixels apart in x."""
    corners: list[tuple[float, float]] = []
    for size in sizes:
        for _ in range(40):
            x, y = rng.uniform(0, width - size), rng.uniform(0, height - size)
            if all(
                abs(x + size / 2 - u - s / 2) >= 5
                and (abs(x + size / 2 - u - s / 2) > (size + s) / 2 or abs(y + size / 2 - v - s / 2) > (size + s) / 2)
                for (u, v), s in zip(corners, sizes, strict=False)
            ):
                corners.append((x, y))
                break
        else:
            return None
    return corners


def draw_digit(
    image: Image.Image,
    glyph: np.ndarray,
    color: str,
    corner: tuple[float, float],
    size: int,
    angle: float,
    warp: np.ndarray | None = None,
) -> None:
    """Blend one glyph into the image at a sub-pixel position; warp [2, 2]: sheared and stretched about its centre."""
    mask = Image.fromarray((glyph * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    x, y = corner
    canvas = Image.new("L", image.size)
    canvas.paste(mask, (int(x), int(y)))
    shift_x, shift_y = x - int(x), y - int(y)
    center = (int(x) + size / 2, int(y) + size / 2)
    if warp is not None:
        offset = np.array(center) - warp @ center
        matrix = (*warp[0], offset[0], *warp[1], offset[1])
        canvas = canvas.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    canvas = canvas.rotate(angle, Image.Resampling.BILINEAR, center=center)
    canvas = canvas.transform(
        image.size, Image.Transform.AFFINE, (1, 0, -shift_x, 0, 1, -shift_y), Image.Resampling.BILINEAR
    )
    image.paste(Image.new("RGB", image.size, COLORS[color]), mask=canvas)


def make_scene(
    rng: np.random.Generator, split: str, vary: bool = False, sizes: tuple[tuple[int, int], ...] = SIZES
) -> Scene:
    """One random scene whose digits are of the split's handwriting; vary: further hands by shearing and stretching."""
    glyphs, values = handwriting(split)
    height, width = sizes[rng.integers(len(sizes))]
    most = int(np.clip(height * width // 1100, 2, 5))
    while True:
        count = int(rng.integers(1, most + 1))
        across = [int(s) for s in rng.integers(13, 19, count)]
        corners = place(rng, height, width, across)
        if corners is not None:
            break
    image, texture = background(rng, height, width)
    digits = []
    for corner, size in zip(corners, across, strict=True):
        sample, color = int(rng.integers(len(values))), str(rng.choice(list(COLORS)))
        angle = float(rng.uniform(-8, 8))
        warp = np.eye(2) + rng.uniform(-0.18, 0.18, (2, 2)) if vary else None
        draw_digit(image, glyphs[sample], color, corner, size, angle, warp)
        digits.append(Digit(int(values[sample]), color, (*corner, corner[0] + size, corner[1] + size)))
    return Scene(image, texture, tuple(sorted(digits, key=lambda d: d.center[0])))


def quadrant(digit: Digit, width: int, height: int) -> str | None:
    """'top left' and so on; None too near a middle line to be sure."""
    x, y = digit.center[0] / width - 0.5, digit.center[1] / height - 0.5
    if min(abs(x), abs(y)) < 0.08:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of this type and its answer, or None where the scene admits none that is unambiguous."""
    digits = scene.digits
    values, colors = [d.value for d in digits], [d.color for d in digits]
    by_value = [d for d in digits if values.count(d.value) == 1]
    by_color = [d for d in digits if colors.count(d.color) == 1]

    def pick(candidates):
        return candidates[rng.integers(len(candidates))] if candidates else None

    if kind == "count":
        return "how many digits are there?", str(len(digits))
    if kind == "color" and (d := pick(by_value)):
        return f"what color is the {d.value}?", d.color
    if kind == "digit" and (d := pick(by_color)):
        return f"which digit is {d.color}?", str(d.value)
    if kind == "where" and (d := pick(by_value + by_color)) and (place := quadrant(d, *scene.image.size)):
        return (f"where is the {d.value}?" if d in by_value else f"where is the {d.color} digit?"), place
    if kind == "exists":
        yes = rng.random() < 0.5
        if rng.random() < 0.6:
            value = pick(values) if yes else pick([v for v in range(10) if v not in values])
            return f"is there a {value} in the image?", "yes" if yes else "no"
        color = pick(colors) if yes else pick([c for c in COLORS if c not in colors])
        return f"is there a {color} digit in the image?", "yes" if yes else "no"
    if kind == "left" and len(by_value) >= 2:
        one, other = (by_value[i] for i in rng.permutation(len(by_value))[:2])
        return f"is the {one.value} left of the {other.value}?", "yes" if one.center[0] < other.center[0] else "no"
    if kind == "largest" and len(digits) >= 2:
        return "what is the largest digit?", str(max(values))
    if kind == "background":
        return "what is the background?", scene.texture
    if kind == "describe":
        return "describe the image from left to right.", " then ".join(f"{d.color} {d.value}" for d in digits)
    return None


def mentions(scene: Scene, kind: str, question: str) -> list[tuple[str, int, int]]:
    """The words of a question (describe: of its answer), in order, that mean one digit, with that digit's place."""
    width, height = scene.image.size
    if kind == "describe":
        meant = [(str(d.value), d) for d in scene.digits]
    else:
        named = [(word, d) for d in scene.digits for word in (str(d.value), d.color)]
        words = [word for word, _ in named]
        only = {word: d for word, d in named if words.count(word) == 1}
        meant = [(word, only[word]) for word in question.strip("?").split() if word in only]
    return [(word, int(d.center[0] / width * BINS), int(d.center[1] / height * BINS)) for word, d in meant]


def write_split(split: str, folder: Path) -> None:
    """SPLIT_SCENES[split] scenes with QUESTIONS_PER_SCENE questions of different types each, each type as often."""
    rng = np.random.default_rng(SPLIT_SEEDS[split])
    images = folder / split
    images.mkdir(parents=True, exist_ok=True)
    asked = dict.fromkeys(QUESTION_TYPES, 0)
    lines = []
    for index in range(SPLIT_SCENES[split]):
        scene = make_scene(rng, split)
        name = f"{split}/{index:04d}.png"
        scene.image.save(folder / name, optimize=True)
        questions = {kind: found for kind in QUESTION_TYPES if (found := ask(scene, kind, rng))}
        for kind in sorted(questions, key=lambda k: (asked[k], rng.random()))[:QUESTIONS_PER_SCENE]:
            asked[kind] += 1
            question, answer = questions[kind]
            lines.append({"image": name, "question": question, "answer": answer, "type": kind})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if split in USED_ONCE:
        (folder / f"{split}.uses.jsonl").touch()  # asks lvlm-exporter to count who has used these questions
    print(f"{split}: {len(lines)} questions about {SPLIT_SCENES[split]} images, {asked}")


def contact_sheet(path: Path, columns: int = 6, rows: int = 4) -> None:
    """A picture of some training scenes with a question each, to look at."""
    rng = np.random.default_rng(0)
    sheet = Image.new("RGB", (columns * 210, rows * 200), "white")
    pen = ImageDraw.Draw(sheet)
    for cell in range(columns * rows):
        scene = make_scene(rng, "train")
        x, y = cell % columns * 210 + 5, cell // columns * 200 + 5
        sheet.paste(scene.image.resize([int(s * 1.3) for s in scene.image.size], Image.Resampling.NEAREST), (x, y))
        found = ask(scene, QUESTION_TYPES[cell % len(QUESTION_TYPES)], rng)
        pen.text((x, y + 187), " ".join(found) if found else "", fill="black")
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--sheet", type=Path, help="only draw a contact sheet of training scenes there")
    options = parser.parse_args()
    if options.sheet:
        contact_sheet(options.sheet)
        return
    for split in SPLIT_SCENES:
        write_split(split, options.out)


if __name__ == "__main__":
    main()
