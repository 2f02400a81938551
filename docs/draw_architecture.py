"""Draw docs/architecture.png from the imports of the package: python docs/draw_architecture.py."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "project")]
from test_architecture import FLOORS, PACKAGE, dotted_name, own_imports, room, trees  # noqa: E402

SIDE = ("modeling", "clean_room")  # import nothing of ours
TOP = len(FLOORS) - 1


def arrows() -> Counter[tuple[str, str]]:
    """Count the imports from one room to another."""
    counted: Counter[tuple[str, str]] = Counter()
    for path, tree in trees():
        mine = room(dotted_name(path))
        for name in own_imports(path, tree):
            if room(name) not in (mine, "__init__") and mine not in ("__init__", "__main__", "plugins"):
                counted[mine, room(name)] += 1
    return counted


def lines_of(name: str) -> int:
    """Count the lines of a room."""
    folder = PACKAGE / name
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    return sum(len(file.read_text().splitlines()) for file in files)


def main() -> None:
    places: dict[str, tuple[float, float]] = {}
    figure, axes = plt.subplots(figsize=(11, 11))
    for height, floor in enumerate(FLOORS[:-1]):
        for number, name in enumerate(floor):
            places[name] = ((number - (len(floor) - 1) / 2) * 2.3, float(height))
    for (start, end), count in arrows().items():
        (x1, y1), (x2, y2) = places[start], places[end]
        bend = 0.08 if x1 <= x2 else -0.08
        axes.annotate(
            "",
            (x2, y2 + 0.26),
            (x1, y1 - 0.26),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#7a8a99",
                "alpha": 0.35 + 0.05 * min(count, 8),
                "linewidth": 0.5 + 0.18 * min(count, 8),
                "connectionstyle": f"arc3,rad={bend}",
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=1,
        )
    for name, (x, y) in places.items():
        color = "#f3e3c3" if name in SIDE else "#dce8f2"
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.95, y - 0.24),
                1.9,
                0.48,
                boxstyle="round,pad=0.02",
                facecolor=color,
                edgecolor="#44525e",
                zorder=2,
            )
        )
        axes.text(x, y + 0.05, name, ha="center", va="center", fontsize=11, zorder=3)
        axes.text(
            x, y - 0.14, f"{lines_of(name):,} lines", ha="center", va="center", fontsize=7.5, color="#44525e", zorder=3
        )
    axes.set_xlim(-6.2, 6.2)
    axes.set_ylim(-0.7, TOP - 0.3)
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "architecture.png", dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
