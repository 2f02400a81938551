"""Write docs/methods.md, the table of localizers, folds and router losses: python docs/write_methods.py."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from exporter.methods import FOLDS, LOCALIZERS, LOSSES, Fold, Localizer, RouterLoss, resolve

HEAD = """# Methods

Written from the rows of `exporter/methods.py` by `python docs/write_methods.py`. An option is given as
`--localizer-option NAME=VALUE`, `--fold-option` or `--loss-option`, or in a recipe: `fold: {name: scp, k: 16}`.
"""


def options(function: object) -> str:
    """Return a method's options with their defaults: 'p=0.5, tokens='per_layer''."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return ", ".join(f"`{p.name}={p.default!r}`" for p in parameters if p.kind is p.KEYWORD_ONLY)


def section(title: str, rows: Mapping[str, Localizer] | Mapping[str, Fold] | Mapping[str, RouterLoss]) -> list[str]:
    """Return a table of methods, a line each."""
    lines = [f"\n## {title}\n", "| name | what it is | options | file |", "|---|---|---|---|"]
    for name, row in rows.items():
        function = resolve(row.run)
        told = f"[{row.title}]({row.link})" if row.link else row.title
        path = function.__module__.replace(".", "/") + ".py"
        lines.append(f"| `{name}` | {told} | {options(function)} | `{path}` |")
    return lines


def text() -> str:
    """Return the document."""
    lines = section("Localizers: `--localizer`", LOCALIZERS) + section("Folds: `--fold`", FOLDS)
    return HEAD + "\n".join([*lines, *section("Losses of a router: `--loss`", LOSSES)]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(text())
