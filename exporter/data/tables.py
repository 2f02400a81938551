"""Data sets of the hub, folders that `datasets` saved or can load, and parquet files: rows read when they are drawn.

Rows are taken as Arrow has them, so that images stay encoded, and stay on disk until a sample opens them: four samples
of a set of large photographs cost four photographs, one at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from ..errors import InputError, nearest
from .answers import LETTERS
from .images import Encoded
from .samples import ANSWER_COLUMNS, METRIC_COLUMNS, Sample, sample_from

ROLES = ("image", "question", "messages", "answer", "type", "choices", *METRIC_COLUMNS)
USUAL = {  # the columns that are taken where none are named, the first that is there
    "image": ("image", "images"),
    "question": ("question",),
    "messages": ("messages", "conversations"),
    "answer": ANSWER_COLUMNS,
    "type": ("type",),
    "choices": ("choices", "options"),
    **METRIC_COLUMNS,
    **{name: (name,) for letter in LETTERS[:8] for name in (letter.upper(), f"choice_{letter}")},
}
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` saved a folder, which is then no folder of images."""
    return any((folder / name).is_file() for name in SAVED)


@dataclass(frozen=True)
class TableSamples(Sequence[Sample]):
    """The rows of a table as samples, each made when it is asked for."""

    name: str  # for messages
    rows: Any  # a `datasets.Dataset` in Arrow format
    column_of: dict[str, tuple[str, ...]]  # role -> columns; several for images only
    class_names: dict[str, Any]  # column -> the feature that names its classes
    folder: Path  # what paths are relative to
    allow_urls: bool
    text_only: bool = False
    frames: int | None = None  # the most to take of a video file that stands in messages

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = self._texts[index].to_pylist()[0] if self._texts else {}
        record = {
            role: self._named(columns[0], row[columns[0]])
            for role, columns in self.column_of.items()
            if role not in ("image", "messages")
        }
        if turns := self.column_of.get("messages"):
            record["messages"] = self._cell(index, turns[0])
        images = [image for column in self.column_of.get("image", ()) for image in self._images(index, column)]
        record |= {"images": images} if images else {}
        return sample_from(record, f"{self.name} row {index}", self.folder, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"allow_urls": self.allow_urls, "text_only": self.text_only, "frames": self.frames}

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def _texts(self) -> Any:
        """Return the columns that hold no images; None where there are no others."""
        names = [columns[0] for role, columns in self.column_of.items() if role not in ("image", "messages")]
        return self.rows.select_columns(names) if names else None

    @functools.cached_property
    def _alone(self) -> dict[str, Any]:
        """Return each column by itself, so that reading a cell reads nothing else."""
        return {name: self.rows.select_columns([name]) for names in self.column_of.values() for name in names}

    def _cell(self, index: int, column: str) -> Any:
        return self._alone[column][index][column].to_pylist()[0]

    def _named(self, column: str, value: Any) -> Any:
        """Return classes by their names: a label's number says nothing."""
        classes = self.class_names.get(column)
        if classes is None or value is None:
            return value
        return [classes.int2str(v) for v in value] if isinstance(value, list) else classes.int2str(value)

    def _images(self, index: int, column: str) -> list[Any]:
        """Return the images of one cell; bytes stay where they are, and are read when they are opened."""
        value = self._cell(index, column)
        several = value if isinstance(value, list) else [value]
        return [self._lazy(index, column, number, item) for number, item in enumerate(several) if item is not None]

    def _lazy(self, index: int, column: str, number: int, item: Any) -> Any:
        held = item.get("bytes") if isinstance(item, Mapping) else item
        if not isinstance(held, bytes):
            return item

        def read() -> bytes:
            cell = self._cell(index, column)
            value = cell[number] if isinstance(cell, list) else cell
            content: bytes = value["bytes"] if isinstance(value, Mapping) else value
            return content

        return Encoded(f"the image in column '{column}'", read)


# --- opening ----------------------------------------------------------------------------------------------------------


def open_table(
    name: str,
    columns: Mapping[str, str],
    split: str | None,
    config: str | None,
    *,
    allow_urls: bool = False,
    text_only: bool = False,
    frames: int | None = None,
) -> TableSamples:
    """Open a data set, a saved folder, or a parquet file, without reading a row. Raises InputError."""
    table = _loaded(name, split, config).with_format("arrow")
    if not len(table):
        raise InputError(f"data set '{name}' holds no rows.")
    column_of = _columns(name, table.column_names, columns)
    classes = {c: table.features[c] for cs in column_of.values() for c in cs if hasattr(table.features[c], "int2str")}
    path = Path(name).expanduser()
    folder = path if path.is_dir() else path.parent if path.is_file() else Path()
    return TableSamples(
        name, table, column_of=column_of, class_names=classes, folder=folder,
        allow_urls=allow_urls, text_only=text_only, frames=frames,
    )  # fmt: skip


def _loaded(name: str, split: str | None, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "reading a data set needs the package 'datasets': pip install 'lvlm-exporter[eval]'."
        ) from error
    path = Path(name).expanduser()
    shown = f"'{name}'" + (f" ({config})" if config else "")
    try:
        if path.is_dir() and is_saved(path):
            return _one_split(datasets.load_from_disk(str(path)), shown, split)
        if path.is_file():
            # Its own split is called train, whatever split of a set the file once was.
            with _quiet(datasets):
                return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if split is None:
            split = _only_split(datasets.get_dataset_split_names(name, config), shown)
        return datasets.load_dataset(name, config, split=split)
    except InputError:
        raise
    except Exception as error:  # datasets raises dozens of types, each a user's matter: name, split, network
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise InputError(f"data set {shown} (split '{split}') can't be loaded: {reason}") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep progress bars and log lines of `datasets` off the terminal: what goes wrong is said in one sentence."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _one_split(loaded: Any, shown: str, split: str | None) -> Any:
    """Return the splits of a saved folder: one, or several under their names."""
    if not isinstance(loaded, Mapping):
        return loaded
    split = _only_split(list(loaded), shown) if split is None else split
    if split not in loaded:
        raise InputError(
            f"data set {shown} has no split '{split}'; it has: {', '.join(loaded)}. Say which with --split."
        )
    return loaded[split]


def _only_split(names: Sequence[str], shown: str) -> str:
    if len(names) != 1:
        raise InputError(f"data set {shown} has several splits: {', '.join(names)}. Say which with --split.")
    return names[0]


def _columns(name: str, there: Sequence[str], requested: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return which columns play which role: those that are asked for, then the usual names."""
    for role in requested:
        if role not in ROLES:
            raise InputError(
                f"--columns {role}={requested[role]}: '{role}' is no role of a column: {nearest(role, ROLES)}"
            )
    chosen: dict[str, tuple[str, ...]] = {}
    for role, column in requested.items():
        names = tuple(part.strip() for part in str(column).split(",")) if column not in there else (column,)
        if missing := [candidate for candidate in names if candidate not in there]:
            raise InputError(
                f"data set '{name}' has no column '{missing[0]}' for the {role}; it has: {', '.join(there)}. Say which "
                f"with --columns {role}=NAME."
            )
        chosen[role] = names
    if "question" in chosen and "messages" not in chosen:
        usual = {role: names for role, names in USUAL.items() if role != "messages"}
    else:
        usual = {role: names for role, names in USUAL.items() if role != "question" or "messages" not in chosen}
    for role, names in usual.items():
        if role not in chosen and (known := next((candidate for candidate in names if candidate in there), None)):
            chosen[role] = (known,)
    if "image" not in chosen and "messages" not in chosen:
        _refuse(name, "image", there)
    if "question" not in chosen and "messages" not in chosen:
        _refuse(name, "question", there)
    return chosen


def _refuse(name: str, role: str, there: Sequence[str]) -> None:
    also = " or --columns messages=NAME" if role == "question" else ""
    raise InputError(
        f"data set '{name}' has no column '{role}' for the {role}; it has: {', '.join(there)}. Say which with "
        f"--columns {role}=NAME{also}."
    )
