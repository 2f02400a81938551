"""Pictures drawn by code, with no download: coloured shapes on a tinted ground, and questions about them.

One to five circles, squares, triangles, crosses, rings and stars of six colours and two sizes stand freely on the
picture, at sub-pixel positions and small angles. Drawn at four times the size and reduced, so that edges are smooth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (225, 50, 45),
    "green": (60, 190, 70),
    "blue": (65, 105, 245),
    "yellow": (245, 215, 60),
    "pink": (245, 130, 200),
    "white": (245, 245, 245),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "ring": "rings",
    "star": "stars",
}
PIXELS = {"small": (9.5, 11.5), "large": (15.0, 18.0)}  # across
QUESTION_TYPES = ("count", "color", "shape", "where", "relation", "extreme", "describe")
WORDS = """how many shapes are there what color is the shape which where left right of above below on far top bottom
describe picture from to then yes no small large""".split()
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    name: str
    color: str
    size: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    shapes: tuple[Shape, ...]  # from left to right


def ground(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return a dark tinted picture, brighter towards one side, with or without the lines of a grid."""
    tint = rng.integers(15, 80, 3)
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * math.pi)
    slope = math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (y / height - 0.5)
    pixels = tint + 40 * rng.random() * slope[..., None]
    if rng.random() < 0.5:
        step, phase = rng.integers(8, 16), rng.integers(0, 16, 2)
        pixels = pixels + 14 * (((x + phase[0]) % step == 0) | ((y + phase[1]) % step == 0))[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def polygon(corners: int, radius: float, angle: float, inner: float = 0.0) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon about 0, or of a star with an inner radius."""
    radii = [radius, inner] * corners if inner else [radius] * corners
    turn = 2 * math.pi / len(radii)
    return [(r * math.sin(angle + i * turn), -r * math.cos(angle + i * turn)) for i, r in enumerate(radii)]


def draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, angle: float) -> None:
    """Fill one shape on a canvas that is SUPERSAMPLING times as large as the picture."""
    x, y = (v * SUPERSAMPLING for v in shape.center)
    radius = (shape.box[2] - shape.box[0]) / 2 * SUPERSAMPLING
    fill = COLORS[shape.color]
    circle = (x - radius, y - radius, x + radius, y + radius)
    if shape.name == "circle":
        pen.ellipse(circle, fill=fill)
    elif shape.name == "ring":
        pen.ellipse(circle, outline=fill, width=round(radius * 0.42))
    elif shape.name == "cross":
        for turn in (math.pi / 4, -math.pi / 4):
            dx, dy = radius * math.sin(angle + turn), radius * math.cos(angle + turn)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=round(radius * 0.5))
    else:
        points = {
            "square": polygon(4, radius * 1.15, angle + math.pi / 4),
            "triangle": polygon(3, radius * 1.15, angle),
            "star": polygon(5, radius * 1.1, angle, inner=radius * 0.42),
        }[shape.name]
        pen.polygon([(x + dx, y + dy) for dx, dy in points], fill=fill)


def place(rng: np.random.Generator, height: int, width: int, across: list[float]) -> list[tuple[float, float]] | None:
    """Return centres, none over another and at least 4 pixels apart in x; None where they do not fit."""
    centers: list[tuple[float, float]] = []
    for size in across:
        for _ in range(40):
            x, y = (rng.uniform(size / 2 + 1, side - size / 2 - 1) for side in (width, height))
            gaps = [(abs(x - u), abs(y - v), (size + across[j]) / 2 + 1) for j, (u, v) in enumerate(centers)]
            if all(dx >= 4 and max(dx, dy) > gap for dx, dy, gap in gaps):
                centers.append((x, y))
                break
        else:
            return None
    return centers if len(centers) == len(across) else None


def make_scene(rng: np.random.Generator, sizes: tuple[tuple[int, int], ...]) -> Scene:
    """Draw one random scene of one of the sizes (height, width) in pixels."""
    height, width = sizes[rng.integers(len(sizes))]
    most = int(np.clip(height * width // 900, 2, 5))
    while True:
        names = [str(rng.choice(list(PIXELS))) for _ in range(rng.integers(1, most + 1))]
        across = [float(rng.uniform(*PIXELS[name])) for name in names]
        centers = place(rng, height, width, across)
        if centers is not None:
            break
    shapes = [
        Shape(
            str(rng.choice(list(PLURALS))),
            str(rng.choice(list(COLORS))),
            name,
            (x - size / 2, y - size / 2, x + size / 2, y + size / 2),
        )
        for name, size, (x, y) in zip(names, across, centers, strict=True)
    ]
    large = ground(rng, height, width).resize((width * SUPERSAMPLING, height * SUPERSAMPLING), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for shape in shapes:
        draw_shape(pen, shape, float(rng.uniform(-0.2, 0.2)))
    image = large.resize((width, height), Image.Resampling.BOX)
    return Scene(image, tuple(sorted(shapes, key=lambda s: s.center[0])))


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """Return a question of this type and its answer, or None where the scene admits none that is unambiguous."""
    shapes = scene.shapes
    names, colors = [s.name for s in shapes], [s.color for s in shapes]
    by_name = [s for s in shapes if names.count(s.name) == 1]
    by_color = [s for s in shapes if colors.count(s.color) == 1]

    def pick(candidates):
        return candidates[rng.integers(len(candidates))] if len(candidates) else None

    if kind == "count":
        return ask_count(scene, rng)
    if kind == "color" and (s := pick(by_name)):
        return f"what color is the {s.name}?", s.color
    if kind == "shape" and (s := pick(by_color)):
        return f"which shape is {s.color}?", s.name
    if kind == "where" and (s := pick(by_name + by_color)) and (place := quadrant(s, scene)):
        return (f"where is the {s.name}?" if s in by_name else f"where is the {s.color} shape?"), place
    if kind == "relation" and len(by_name) >= 2:
        one, other = (by_name[i] for i in rng.permutation(len(by_name))[:2])
        return ask_relation(one, other, rng)
    if kind == "extreme":
        return ask_extreme(scene, rng)
    if kind == "describe":
        listed = " then ".join(f"{s.size} {s.color} {s.name}" for s in shapes)
        return "describe the picture from left to right.", listed
    return None


def ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the number of all shapes, of those of a colour or of those of a name; one in four is not there."""
    draw = rng.random()
    if draw < 0.34:
        return "how many shapes are there?", str(len(scene.shapes))
    shown = scene.shapes[rng.integers(len(scene.shapes))]
    if draw < 0.67:
        color = shown.color if rng.random() < 0.75 else str(rng.choice(list(COLORS)))
        return f"how many {color} shapes are there?", str(sum(s.color == color for s in scene.shapes))
    name = shown.name if rng.random() < 0.75 else str(rng.choice(list(PLURALS)))
    return f"how many {PLURALS[name]} are there?", str(sum(s.name == name for s in scene.shapes))


def ask_relation(one: Shape, other: Shape, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask whether one shape stands left of or above another; None where the two are too near to a tie."""
    dx, dy = (a - b for a, b in zip(one.center, other.center, strict=True))
    relation, holds, gap = ("left of", dx < 0, abs(dx)) if rng.random() < 0.5 else ("above", dy < 0, abs(dy))
    if gap < 4:
        return None
    return f"is the {one.name} {relation} the {other.name}?", "yes" if holds else "no"


def ask_extreme(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask what stands farthest to one side: colour and name; None where the first two are too near to a tie."""
    side, axis, sign = (("left", 0, 1), ("right", 0, -1), ("top", 1, 1), ("bottom", 1, -1))[rng.integers(4)]
    ordered = sorted(scene.shapes, key=lambda s: sign * s.center[axis])
    if len(ordered) > 1 and abs(ordered[0].center[axis] - ordered[1].center[axis]) < 4:
        return None
    return f"what is on the far {side}?", f"{ordered[0].color} {ordered[0].name}"


def quadrant(shape: Shape, scene: Scene) -> str | None:
    """Return 'top left' and so on; None too near a middle line to be sure."""
    x, y = (v / side - 0.5 for v, side in zip(shape.center, scene.image.size, strict=True))
    if min(abs(x), abs(y)) < 0.08:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
