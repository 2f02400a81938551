"""Names the modeling files that releases of this package have shipped, by their SHA-256.

A checkpoint carries its modeling files with it. Whoever is asked to run them can tell by this list whether they are
files that the package itself wrote. `released.json` holds the list: SHA-256 -> [file name, release].

    python -m exporter.modeling.released --add        record the present files, as those of the coming release
    python -m exporter.modeling.released --release V  give the entries of the coming release its name
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

HERE = Path(__file__).parent
LIST = HERE / "released.json"
COMING = "unreleased"  # the release of the present files until it has a name
NOT_SHIPPED = ("__init__.py", "released.py")

RELEASED: dict[str, tuple[str, str]] = {
    sha: (name, release) for sha, (name, release) in json.loads(LIST.read_text()).items()
}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_released(path: Path) -> bool:
    """Tell whether a file is byte-identical to a modeling file of that name that a release shipped."""
    return path.is_file() and RELEASED.get(sha256_of(path), ("", ""))[0] == path.name


def shipped_files() -> list[Path]:
    """List the files that travel with a checkpoint today."""
    return sorted(path for path in HERE.glob("*.py") if path.name not in NOT_SHIPPED)


def with_present_files(released: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return the list with the present files in it, in place of earlier states of the coming release."""
    kept = {sha: entry for sha, entry in released.items() if entry[1] != COMING}
    return {sha256_of(path): (path.name, COMING) for path in shipped_files()} | kept


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m exporter.modeling.released", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--add", action="store_true", help="record the present files")
    what.add_argument("--release", metavar="V", help="name the coming release")
    options = parser.parse_args(arguments)
    listed = with_present_files(RELEASED)
    if options.release:
        listed = {
            sha: (name, options.release if version == COMING else version) for sha, (name, version) in listed.items()
        }
    LIST.write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
