"""Draw docs/architecture.png from the imports of the package: python docs/draw_architecture.py.

An arrow says that one room imports another. It is left out where other arrows lead there too, by way of rooms between,
and to the small rooms that any other may import.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "project")]
from test_architecture import FLOORS, PACKAGE, dotted_name, own_imports, room, trees  # noqa: E402

STANDALONE = ("modeling", "clean_room")  # import nothing of ours
SMALL = ("errors", "version", "progress", "ranks")  # any other may import them
DRAWN = FLOORS[:-1]  # the uppermost floor gives names to what is below it
WIDTH, STEP = 1.9, 2.45  # of a box; from the middle of one to the next
Needs = dict[str, set[str]]  # by room, the rooms that it imports


def imports() -> Needs:
    """Return which rooms each room imports."""
    needs: Needs = {name: set() for floor in DRAWN for name in floor}
    for path, tree in trees():
        name = room(dotted_name(path))
        if name in needs:
            needs[name] |= {room(other) for other in own_imports(path, tree)} & needs.keys() - {name, *SMALL}
    return needs


def without_detours(needs: Needs) -> Needs:
    """Leave out the imports of rooms that another imported room leads to (the transitive reduction)."""
    below: Needs = {}
    for name in itertools.chain(*DRAWN):  # from the bottom up
        below[name] = needs[name].union(*(below[other] for other in needs[name]))
    return {
        name: {other for other in direct if not any(other in below[between] for between in direct)}
        for name, direct in needs.items()
    }


def positions(needs: Needs) -> dict[str, tuple[float, float]]:
    """Place each floor's rooms above those that they import, as near as the floor allows."""
    at: dict[str, tuple[float, float]] = {}
    for height, floor in enumerate(DRAWN):
        wanted = {name: [at[other][0] for other in needs[name]] for name in floor}
        order = sorted(floor, key=lambda name: sum(wanted[name]) / max(1, len(wanted[name])))
        for number, name in enumerate(order):
            at[name] = ((number - (len(floor) - 1) / 2) * STEP, float(height))
    return at


def lines_of(name: str) -> int:
    """Count the lines of a room."""
    folder = PACKAGE / name
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    return sum(len(file.read_text().splitlines()) for file in files)


def main() -> None:
    needs = without_detours(imports())
    at = positions(needs)
    figure, axes = plt.subplots(figsize=(11, 11))
    for name, others in needs.items():
        for other in others:
            (x1, y1), (x2, y2) = at[name], at[other]
            bend = 0.0 if y1 - y2 == 1 else 0.18 if x1 <= x2 else -0.18
            style = {"arrowstyle": "-|>", "color": "#7a8a99", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
            style["connectionstyle"] = f"arc3,rad={bend}"
            axes.annotate("", (x2, y2 + 0.26), (x1, y1 - 0.26), arrowprops=style, zorder=1)
    for name, (x, y) in at.items():
        color = "#f3e3c3" if name in STANDALONE else "#dce8f2"
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - 0.24), WIDTH, 0.48, boxstyle="round,pad=0.02", facecolor=color, edgecolor="#44525e"
        )
        box.set_zorder(2)
        axes.add_patch(box)
        axes.text(x, y + 0.06, name, ha="center", va="center", fontsize=11, zorder=3)
        small = {"ha": "center", "va": "center", "fontsize": 7.5, "color": "#44525e", "zorder": 3}
        axes.text(x, y - 0.13, f"{lines_of(name):,} lines", **small)
    for height in range(len(DRAWN)):
        axes.text(-6.9, height, str(height + 1), va="center", fontsize=11, color="#7a8a99")
    axes.set_xlim(-7.2, 6.3)
    axes.set_ylim(-0.6, len(DRAWN) - 0.4)
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "architecture.png", dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
