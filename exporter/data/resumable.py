"""Entries of a long run on disk, so that one that is broken off and repeated goes on from them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from ..checkpoints.source import Source
from ..errors import InputError
from ..modeling.modeling_routed import ROUTER_FILE
from ..modeling.served_router import SERVING_ROUTER_FILE

logger = logging.getLogger(__name__)
Entry = dict[str, Any]
CHECKSUM = "checksum"
CHECKSUM_AT_END = re.compile(rb', "checksum": "([0-9a-f]{16})"}\s*$')


class ResumableLines:
    """A JSONL file of numbered entries, each under the fingerprint of the run that it belongs to.

    The fingerprint covers everything that an entry depends on: those of another run are left alone and not used. A last
    line that was cut off in the middle of writing is taken away. An entry ends with the checksum of its line, where
    asked for: one that says something else than what was written is refused.

    Args:
        path: None keeps nothing.
        fields: what every entry must hold, and of which type; a file with other lines is somebody else's.
        what: 'answer of an evaluation', for messages.
        checked: write and compare checksums; lines without one, of earlier versions, are taken as they are.
    Raises: InputError for a file that can't be read or written, or that holds something else.
    """

    def __init__(
        self, path: Path | None, fields: dict[str, type] | None = None, what: str = "entry", checked: bool = False
    ) -> None:
        self.path, self.fields, self.what, self.checked = path, fields or {}, what, checked
        self._known: dict[str, dict[int, Entry]] = {}
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
                entry = json.loads(line)
                index = entry.pop("index")
                good = isinstance(index, int) and all(isinstance(entry[k], kind) for k, kind in self.fields.items())
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise InputError(f"{path} line {number} is no {self.what}: name another file.") from error
            if not good:
                raise InputError(f"{path} line {number} is no {self.what}: name another file.")
            if self.checked and not _as_written(line):
                raise InputError(
                    f"{path} line {number} is not what was written, its checksum is another: take the line out, and "
                    "it is done again."
                )
            entry.pop(CHECKSUM, None)
            self._known.setdefault(str(entry.pop("run", "")), {})[index] = entry
        if rest:
            os.truncate(path, len(content) - len(rest))

    @property
    def fingerprints(self) -> set[str]:
        """Return the fingerprints of the runs that there are entries of."""
        return set(self._known)

    def entries(self, fingerprint: str) -> dict[int, Entry]:
        """Return what is known of a run, by number."""
        return dict(self._known.get(fingerprint, {}))

    def add(self, fingerprint: str, entries: dict[int, Entry]) -> None:
        """Append entries of a run."""
        if self.path is None:
            return
        lines = [json.dumps({"run": fingerprint, "index": index} | entry) for index, entry in entries.items()]
        text = "".join((_with_checksum(line) if self.checked else line) + "\n" for line in lines)
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:  # the run goes on all the same
            logger.warning("%s can't be written (%s): entries are no longer kept.", self.path, error.strerror)
            self.path = None


def _with_checksum(line: str) -> str:
    return f'{line[:-1]}, "{CHECKSUM}": "{_checksum(line.encode())}"}}'


def _as_written(line: bytes) -> bool:
    """Tell whether a line's checksum is that of the rest of it; True where it ends without one."""
    end = CHECKSUM_AT_END.search(line)
    return end is None or _checksum(line[: end.start()] + b"}") == end[1].decode()


def _checksum(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def files_key(source: Source) -> str:
    """Hash what a folder's answers depend on: small files by content, weights by name, size and time of change."""
    digest = hashlib.sha256(source.name.encode())
    companions = [path for path in source.companions() if path.suffix in (".json", ".jinja", ".txt", ".model")]
    for path in [Path("config.json"), *companions]:
        digest.update(str(path).encode() + (source.folder / path).read_bytes())
    routers = [source.folder / name for name in (ROUTER_FILE, SERVING_ROUTER_FILE)]
    for file in [*(shard.path for shard in source.weights.shards), *routers]:
        if file.exists():
            digest.update(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
