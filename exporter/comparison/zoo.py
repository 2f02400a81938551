"""The grid of `grid.py` on several models, in one table: mean, worst case and rank of every method over them.

A default is to hold on models that nobody tuned it on: rows say how much is kept on models by which nothing was chosen,
and how far a method stays below the best cell of each model and budget. Each model's grid lies in a folder of its own
and goes on where a broken-off run has left it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cards import tables as report
from ..errors import InputError
from ..plain_data import check_keys
from ..progress import Progress, silent
from ..recipe import RunOptions
from .grid import Cell, Comparison, Grid, grid_from_data
from .layers import compare
from .saved import write_all

Compare = Callable[..., Comparison]


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo with its questions."""

    name: str
    grid: Grid
    in_view: bool = False  # something was chosen by looking at it


@dataclass(frozen=True)
class ZooRow:
    """A localizer, a fold and a budget over all models, or over those by which nothing was chosen."""

    localizer: str
    fold: str
    drop_share: float
    models: int
    mean: float  # of what is kept
    worst: float
    worst_model: str
    rank: float  # mean place among the methods of the same budget
    below_best: float  # points of exact match kept below the best method, worst over the models


def zoo_from_data(data: Any) -> tuple[ZooModel, ...]:
    """Read a zoo: 'models', each with name, model, calibration and task; everything else is a comparison's."""
    models = data.get("models")
    if not isinstance(models, list) or not models:
        raise InputError(f"models must be a list, not {models!r}.")
    shared = {key: value for key, value in data.items() if key != "models"}
    zoo = []
    for entry in models:
        check_keys(entry, ["name", "in_view", *(f.name for f in dataclasses.fields(Grid))], "a model of the zoo")
        grid_data = dict(entry)
        name, in_view = grid_data.pop("name", Path(str(grid_data.get("model"))).name), grid_data.pop("in_view", False)
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w .=+-]{0,99}", name):  # its folder's name, too
            raise InputError(f"a model of the zoo is called {name!r:.80}: letters, digits and . _ - are fine.")
        if not isinstance(in_view, bool):
            raise InputError(f"{name}: in_view must be true or false, not {in_view!r:.80}.")
        zoo.append(ZooModel(name, grid_from_data(shared | grid_data), in_view))
    names = [model.name for model in zoo]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two models are called '{twice[0]}'.")
    return tuple(zoo)


def zoo_in_folder(data: Any, folder: Path, calibration: str = "unseen", task: str = "validation") -> dict[str, Any]:
    """Return a comparison with the models that lie in a folder as `make zoo` leaves it: NAME and NAME-data.

    Args:
        data: a comparison without model, calibration and task; 'in_view' names models that something was chosen on.
        calibration: 'seen' or 'unseen': whether the models were trained on the pictures of the calibration questions.
        task: 'validation' or 'test', the questions to judge by.
    """
    if not isinstance(data, dict):
        raise InputError("a comparison is a YAML file with keys and values.")
    if twice := [key for key in ("model", "models", "task") if key in data]:
        raise InputError(f"with --zoo the models are those of the folder: leave out '{twice[0]}'.")
    shared, in_view = dict(data), data.get("in_view", [])
    shared.pop("in_view", None)
    options = shared.pop("calibration", {})
    names = sorted(
        path.parent.name for path in folder.glob("*/config.json") if (folder / f"{path.parent.name}-data").is_dir()
    )
    if not names:
        raise InputError(f"{folder} holds no model NAME with its questions NAME-data: `make zoo` makes such a folder.")
    if unknown := [name for name in in_view if name not in names]:
        raise InputError(f"in_view names '{unknown[0]}', which does not lie in {folder}; there are {', '.join(names)}.")
    models = []
    for name in names:
        questions = folder / f"{name}-data"
        entry = {"name": name, "model": str(folder / name), "task": str(questions / f"{task}.jsonl")}
        entry |= {"calibration": options | {"data": str(questions / f"calibration-{calibration}.jsonl")}}
        models.append(entry | {"in_view": name in in_view})
    return shared | {"models": models}


def compare_zoo(
    zoo: tuple[ZooModel, ...],
    out: Path | str,
    options: RunOptions = RunOptions(batch_size=32),
    progress: Progress = silent,
    compare_one: Compare = compare,
) -> dict[str, list[ZooRow]]:
    """Fill every model's grid in `out`/NAME; write table.md and results.json into `out`.

    Returns: the rows over 'all' models and over the 'left out' ones, by which nothing was chosen.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        done = {model.name: compare_one(model.grid, out / model.name, options, progress) for model in zoo}
    except InputError:
        with contextlib.suppress(OSError):
            out.rmdir()  # unless it holds something
        raise
    # what a model does not take is said, since its row then is over fewer models
    refused = {name: comparison.refused for name, comparison in done.items() if comparison.refused}
    tables = {"all": rows(done)}
    left_out = {model.name: done[model.name] for model in zoo if not model.in_view}
    if left_out and len(left_out) < len(done):
        tables["left out"] = rows(left_out)
    text = "\n".join(f"## {name}\n\n{markdown(table)}" for name, table in tables.items())
    notes = [f"- {name}, {fold}: {reason}" for name, folds in refused.items() for fold, reason in folds.items()]
    text += "\nLeft out:\n\n" + "\n".join(notes) + "\n" if notes else ""
    write_all(out, {"table.md": text}, {}, {name: [asdict(row) for row in table] for name, table in tables.items()})
    return tables


def rows(done: dict[str, Comparison]) -> list[ZooRow]:
    """Return every method at every share of the layers, the highest worst case first."""
    cells: dict[tuple[str, str, float], dict[str, Cell]] = {}
    for name, comparison in done.items():
        for share, count in _budgets(comparison):
            for cell in comparison.cells:
                if len(cell.drop) == count:
                    cells.setdefault((cell.localizer, cell.fold, share), {})[name] = cell
    zoo_rows = []
    for (localizer, fold, share), of_model in cells.items():
        ranks, gaps = [], []
        for name, cell in of_model.items():
            rivals = [other[name].kept for key, other in cells.items() if key[2] == share and name in other]
            ranks.append(1 + sum(kept > cell.kept for kept in rivals))
            gaps.append(100 * (max(rivals) - cell.kept))
        kept = {name: cell.kept for name, cell in of_model.items()}
        worst = min(kept, key=lambda name: kept[name])
        mean = sum(kept.values()) / len(kept)
        rank = sum(ranks) / len(ranks)
        zoo_rows.append(
            ZooRow(
                localizer=localizer,
                fold=fold,
                drop_share=share,
                models=len(kept),
                mean=mean,
                worst=kept[worst],
                worst_model=worst,
                rank=rank,
                below_best=max(gaps),
            )
        )
    return sorted(zoo_rows, key=lambda row: (row.drop_share, -row.worst, -row.mean))


def _budgets(done: Comparison) -> list[tuple[float, int]]:
    """Return the shares of the layers that were asked for, or are reached, with the number of layers each."""
    if done.ratios:
        return list(zip(done.ratios, done.counts, strict=True))
    counts = sorted({len(cell.drop) for cell in done.cells})
    return [(round(count / (done.num_layers or 1), 2), count) for count in counts]


HEADER = ("localizer", "fold", "layers gone", "models", "mean kept", "worst kept", "on", "rank", "below the best")


def zoo_cells(row: ZooRow) -> tuple[str, ...]:
    """Return a row as texts."""
    percent = [f"{100 * value:.1f} %" for value in (row.mean, row.worst)]
    places = (row.worst_model, f"{row.rank:.1f}", f"{row.below_best:.1f}")
    return (row.localizer, row.fold, f"{100 * row.drop_share:.0f} %", str(row.models), *percent, *places)


def markdown(table: list[ZooRow]) -> str:
    return report.markdown_table(HEADER, list(map(zoo_cells, table)), left=2) + "\n"


def zoo_text(tables: dict[str, list[ZooRow]]) -> str:
    """Return the tables as text for the terminal."""
    return "\n\n".join(
        f"{name} models\n{report.table(HEADER, list(map(zoo_cells, rows)))}" for name, rows in tables.items()
    )
