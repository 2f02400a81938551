"""Rows of a long run on disk, so that one that is broken off and repeated goes on from them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.shapes import TEXT, Misfit, check, parse_line, require_file
from ..checkpoints.source import Source
from ..checkpoints.staging import check_target
from ..errors import InputError
from ..modeling.modeling_routed import ROUTER_FILE

logger = logging.getLogger(__name__)
Row = dict[str, Any]
T = TypeVar("T")


class ResumableLines:
    """A JSONL file of numbered rows, each under the fingerprint of the run that it belongs to.

    The fingerprint covers everything that a row depends on: rows of another one are left alone and not used. A last
    line that was cut off in the middle of writing is taken away.

    Args:
        path: None keeps nothing.
        fields: what every row must hold, and of which type; a file with other lines is somebody else's.
        what: 'answer of an evaluation', for messages.
    Raises: InputError for a file that can't be read or written, or that holds something else.
    """

    def __init__(self, path: Path | None, fields: dict[str, type] | None = None, what: str = "row") -> None:
        self.path, self.fields, self.what = path, fields or {}, what
        self._known: dict[str, dict[int, Row]] = {}
        if path is None:
            return
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path.absolute().parent} is no folder: {path.name} can't be written there.")
        if not os.path.exists(path):
            return
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
            raise InputError(f"{path} is no file that can be read and written: name another one.")
        self._read(path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                index = row.pop("index")
                good = isinstance(index, int) and all(isinstance(row[k], kind) for k, kind in self.fields.items())
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise InputError(f"{path} line {number} is no {self.what}: name another file.") from error
            if not good:
                raise InputError(f"{path} line {number} is no {self.what}: name another file.")
            self._known.setdefault(str(row.pop("run", "")), {})[index] = row
        if rest:
            os.truncate(path, len(content) - len(rest))

    def rows(self, fingerprint: str) -> dict[int, Row]:
        """Return what is known of a run, by number."""
        return dict(self._known.get(fingerprint, {}))

    def add(self, fingerprint: str, rows: dict[int, Row]) -> None:
        """Append rows of a run."""
        if self.path is None:
            return
        text = "".join(json.dumps({"run": fingerprint, "index": index} | row) + "\n" for index, row in rows.items())
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:  # the run goes on all the same
            logger.warning("%s can't be written (%s): rows are no longer kept.", self.path, error.strerror)
            self.path = None


class KeptLines:
    """A JSONL file beside results, whose first line says which run it is of; each further line is a part of the result.

    A last line that was cut off in the middle of writing is taken away.

    Args:
        path: in the folder of the results, which is made here.
        key: under which the first line has the fingerprint.
        run: the fingerprint of everything that the results depend on.
    Raises: InputError where the folder holds something else, or another run's results.
    """

    def __init__(self, path: Path, key: str, run: str) -> None:
        self.path = path
        self.head: str | None = None
        self.lines: list[str] = []
        if os.path.lexists(path):
            require_file(path, "what a comparison keeps")
            try:
                content = path.read_bytes().decode()
            except ValueError as error:
                raise self._damaged(1, "it is no text") from error
            first, *self.lines = content.split("\n")[:-1] or [""]
            rest = content.rpartition("\n")[2]
            if first:
                try:
                    known = parse_line(first)
                    check(known, {key: TEXT})
                except Misfit as misfit:
                    raise self._damaged(1, misfit) from misfit
                if known[key] != run:
                    raise InputError(f"{path.parent} holds another comparison: name another folder, or remove it.")
                if rest:
                    os.truncate(path, len(content.encode()) - len(rest.encode()))
                return
        else:
            check_target(path.parent)
        self.head = json.dumps({key: run}) + "\n"  # not written yet: what is refused leaves no folder

    def read(self, parse: Callable[[Any], T]) -> Iterator[T]:
        """Yield what `parse` makes of each line. Raises InputError that names the line which it does not take."""
        for number, line in enumerate(self.lines, 2):
            if not line.strip():
                continue
            try:
                yield parse(parse_line(line))
            except Misfit as misfit:
                raise self._damaged(number, misfit) from misfit

    def add(self, rows: Iterable[Any]) -> None:
        """Append rows. Where they can't be written the run goes on all the same."""
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a" if self.head is None else "w") as file:
                file.write(self.head or "")
                file.writelines(json.dumps(row) + "\n" for row in rows)
            self.head = None
        except OSError as error:
            logger.warning("%s can't be written (%s): what is done is not kept.", self.path, error.strerror)

    def _damaged(self, number: int, why: object) -> InputError:
        return InputError(
            f"{self.path} line {number} is damaged ({why}): take the line out, or name another folder and begin anew."
        )


def files_key(source: Source) -> str:
    """What a folder's answers depend on: small files by their content, weights by name, size and time of change."""
    digest = hashlib.sha256(source.name.encode())
    companions = [path for path in source.companions() if path.suffix in (".json", ".jinja", ".txt", ".model")]
    for path in [Path("config.json"), *companions]:
        digest.update(str(path).encode() + (source.folder / path).read_bytes())
    for file in [*(shard.path for shard in source.weights.shards), source.folder / ROUTER_FILE]:
        if file.exists():
            digest.update(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
