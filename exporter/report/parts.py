"""What a report is made of, as data: tables, bars, a scatter of cost and score, and answers beside each other. Pure.

Charts are drawn here as numbers, in a box of WIDTH x HEIGHT; the template writes them as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..evaluation.scoring import pareto_front

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44  # margins of a scatter
NAMED = 14  # points of a scatter, at most, that are named in it
LINE, LETTER, LONGEST = 13, 6.5, 34  # height of a line, width of a letter, letters of a name in a scatter
BAR, BAR_LEFT, BAR_RIGHT = 26, 250, 150  # height of a bar's line; room for its name and its figure
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Table:
    """Columns of text; the first to the left, the others to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Bar:
    """One value with its interval."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    shown: str = ""


@dataclass(frozen=True)
class Bars:
    """Values with intervals, one a line, from `low` to `high`; a line at zero where they are on both sides of it."""

    title: str
    bars: tuple[Bar, ...]
    note: str = ""
    kind: str = "bars"

    @property
    def bounds(self) -> tuple[float, float]:
        """Return what the axis spans."""
        ends = [end for bar in self.bars for end in (bar.value, *(bar.interval or ()))]
        low, high = min(0.0, *ends), max(0.0, *ends)
        return low, high if high > low else low + 1

    @property
    def height(self) -> int:
        return BAR * len(self.bars) + 8

    def x(self, value: float) -> float:
        low, high = self.bounds
        return round(BAR_LEFT + (WIDTH - BAR_LEFT - BAR_RIGHT) * (value - low) / (high - low), 1)

    def drawn(self) -> list[dict[str, object]]:
        """Return each bar's place."""
        return [
            {
                "bar": bar,
                "y": BAR * number + 4,
                "from": min(self.x(0), self.x(bar.value)),
                "width": max(1.0, abs(self.x(bar.value) - self.x(0))),
                "low": self.x(bar.interval[0]) if bar.interval else None,
                "high": self.x(bar.interval[1]) if bar.interval else None,
            }
            for number, bar in enumerate(self.bars)
        ]


@dataclass(frozen=True)
class Point:
    """One model: what it costs and what it scores."""

    name: str
    cost: float
    score: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scatter:
    """Score against cost; those that nothing beats in both are joined, the Pareto front."""

    title: str
    cost_name: str
    score_name: str
    points: tuple[Point, ...]
    note: str = ""
    kind: str = "scatter"

    @property
    def front(self) -> list[Point]:
        """Return the points that no other one beats: at most as dear and at least as good, and better in one."""
        best = pareto_front((p.cost, p.score) for p in self.points)
        return sorted((p for p in self.points if (p.cost, p.score) in best), key=lambda p: p.cost)

    def x(self, cost: float) -> float:
        low, high = _padded([p.cost for p in self.points])
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (cost - low) / (high - low), 1)

    def y(self, score: float) -> float:
        low, high = self._scores
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - score) / (high - low), 1)

    @property
    def _scores(self) -> tuple[float, float]:
        return _padded([end for p in self.points for end in (p.score, *(p.interval or ()))])

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(self.x(v), text) for v, text in ticks(*_padded([p.cost for p in self.points]))]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self.y(v), text) for v, text in ticks(*self._scores)]

    @property
    def labels(self) -> list[tuple[Point, str]]:
        """Return the names that stand in the picture; one that would cover another is counted behind that: 'a, +1'.

        Those of the front come first. Every point shows its own name and figures when it is pointed at.
        """
        if len(self.points) > NAMED:
            return []
        placed: list[tuple[Point, int]] = []
        for point in [*self.front, *(p for p in self.points if p not in self.front)]:
            covered = next((n for n, (other, _) in enumerate(placed) if self._overlap(point, other)), None)
            if covered is None:
                placed.append((point, 0))
            else:
                placed[covered] = (placed[covered][0], placed[covered][1] + 1)
        return [(p, shortened(p.name, LONGEST) + (f", +{more}" if more else "")) for p, more in placed]

    def _overlap(self, first: Point, second: Point) -> bool:
        if abs(self.y(first.score) - self.y(second.score)) >= LINE:
            return False
        (a, b), (c, d) = map(self._span, (first, second))
        return a < d and c < b

    def _span(self, point: Point) -> tuple[float, float]:
        """Return where a point's name begins and ends, to the side of it that has more room."""
        x, width = self.x(point.cost), LETTER * min(len(point.name), LONGEST)
        return (x - width, x) if self.is_right(point) else (x, x + width)

    def is_right(self, point: Point) -> bool:
        """Tell whether a point lies in the right half of the picture: its name stands to the left of it."""
        return self.x(point.cost) > WIDTH / 2

    @property
    def line(self) -> str:
        """Return the front as the points of an SVG polyline."""
        return " ".join(f"{self.x(p.cost)},{self.y(p.score)}" for p in self.front)


def shortened(text: str, most: int) -> str:
    """Return the begin and the end of a long text: names of models differ at either."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.07 * (high - low) or 0.07 * abs(high) or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Return round values between two ends, with their texts."""
    rough = (high - low) / most
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * s for s in STEPS if size * s >= rough)
    digits = max(0, -math.floor(math.log10(step)) + (1 if step / 10 ** math.floor(math.log10(step)) == 2.5 else 0))
    first = math.ceil(low / step)
    return [(n * step, f"{n * step:.{digits}f}") for n in range(first, math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Kept:
    """Which visual tokens of an image stayed, as rows of '1' and '0', a cell a token."""

    rows: tuple[str, ...]

    @property
    def columns(self) -> int:
        return len(self.rows[0])

    @property
    def count(self) -> int:
        return sum(row.count("1") for row in self.rows)

    @property
    def total(self) -> int:
        return sum(map(len, self.rows))

    def left_out(self) -> list[tuple[int, int, int]]:
        """Return row, first column and length of every run of tokens that left."""
        runs = []
        for number, row in enumerate(self.rows):
            start = 0
            for part in row.replace("10", "1 0").replace("01", "0 1").split():
                if part[0] == "0":
                    runs.append((number, start, len(part)))
                start += len(part)
        return runs


@dataclass(frozen=True)
class ModelAnswer:
    """What one model answered."""

    answer: str
    right: bool
    kept: Kept | None = None


@dataclass(frozen=True)
class ShownQuestion:
    """One question, what is right, and what each model answered."""

    number: int
    text: str
    right: str
    type: str
    answers: tuple[ModelAnswer, ...]
    picture: str = ""  # a data URI, '' for none
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Answers:
    """Answers beside each other, to be filtered by who is right."""

    title: str
    models: tuple[str, ...]
    questions: tuple[ShownQuestion, ...]
    note: str = ""
    kind: str = "answers"


Part = Table | Bars | Scatter | Answers


@dataclass(frozen=True)
class Report:
    """A whole page."""

    title: str
    commands: tuple[str, ...]
    parts: tuple[Part, ...]
    facts: tuple[tuple[str, str], ...] = field(default=())  # beside the commands: date, versions, machine
    notes: tuple[str, ...] = ()  # what has to be known of all of it
