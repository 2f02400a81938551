"""Is a folder what was made, and does it stand on its own?

First every file is compared with the record, and nothing of the folder is loaded before that holds. Then it is loaded
in a clean process that cannot import this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckFailed
from .clean_process import run_check
from .files import CONFIG_JSON, hash_once, is_licence, leads_out, made_files
from .hub_access import resolve
from .memory import why_too_large
from .record import CheckpointRecord, read_record
from .staging import stage_name
from .trust import foreign_code, replaced_weights
from .weight_files import open_weights

NAMED_AT_MOST = 5
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Verification:
    folder: Path
    problems: tuple[str, ...]
    details: dict[str, Any]

    @property
    def holds(self) -> bool:
        return not self.problems


def verify(
    folder: Path | str, device: str = "cpu", trust_remote_code: bool = False, memory: str | None = None
) -> Verification:
    """Compare every file with the record; then load with transformers alone, as `exporter/clean_room/` describes.

    A model that does not fit into memory is laid out without its weights: every key and shape is compared, nothing is
    run, and `details["structure_only"]` says why.

    Args:
        folder: on disk, or the name of a repository on the hub.
        trust_remote_code: run the folder's own Python, too, where it is none that this package shipped.
        memory: that loading may take, '12GB'; None: what is free.
    Raises: InputError where the folder is not one of ours or its record is damaged.
    """
    folder, _ = resolve(str(folder), whole=True)
    record = read_record(folder)
    problems = compared(folder, record.measured.files, "lvlm-exporter reproduce FOLDER --out NEW")
    problems += replaced_weights(folder)
    if not trust_remote_code:
        problems += foreign_code(folder)
    problems += _router_problems(folder, record)
    if problems:
        return Verification(folder, tuple(dict.fromkeys(problems)), {})
    parameters = open_weights(folder).num_parameters
    if reason := why_too_large(parameters, ITEMSIZE[record.run.dtype], memory):
        return Verification(folder, *_structure(folder, reason))
    return Verification(folder, *_in_clean_process(folder, device))


def compared(folder: Path, recorded: Mapping[str, str], again: str) -> list[str]:
    """Return how a folder's files differ from the hashes in its record, a sentence each; [] if they do not.

    Files that a person may edit or add are left out: the card, pictures, notes, further licence texts.

    Args:
        recorded: SHA-256 by name, of every file that was made.
        again: the command that makes the folder again.
    """
    files = made_files(folder)
    links = [name for name, path in files.items() if leads_out(path, folder)]
    odd = [name for name, path in files.items() if name not in links and not path.is_file()]
    missing = [name for name in recorded if name not in files]
    changed = [
        name
        for name, digest in recorded.items()
        if name in files and name not in [*links, *odd] and hash_once(files[name]) != digest.lower()
    ]
    unrecorded = [name for name in files if name not in recorded and not is_licence(name)]
    kinds = (
        (links, "leads out of the folder by a link"),
        (odd, "is no regular file"),
        (missing, "is missing"),
        (changed, "is not the file that was made: its SHA-256 is another"),
    )
    problems = [f"{_names(names)} {problem}" for names, problem in kinds if names]
    if CONFIG_JSON not in recorded:
        problems.append(
            f"its record has the SHA-256 of {len(recorded.keys() & files.keys())} of its {len(files)} files, as "
            f"records of lvlm-exporter 0.1.0 do: make it again for one that can be verified ({again})"
        )
    elif unrecorded:
        problems.append(f"{_names(unrecorded)} has no SHA-256 in the record: it was added, or the record was edited")
    return problems


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


def _router_problems(folder: Path, record: CheckpointRecord) -> list[str]:
    """Return what does not fit between the record's router and config.json's."""
    try:
        config = json.loads((folder / CONFIG_JSON).read_text(encoding="utf-8-sig"))
        in_config = {name: name in config and "auto_map" in config for name in ("router", "serving_router")}
    except (OSError, ValueError, TypeError):
        return [f"{CONFIG_JSON} is missing or no JSON"]
    kinds = (
        ("a router", in_config["router"], record.router),
        ("a serving router", in_config["serving_router"], record.serving),
    )
    return [
        f"{kind} is named in {'config.json' if named else 'compression.json'} only"
        for kind, named, part in kinds
        if named != (part is not None)
    ]


def _in_clean_process(folder: Path, device: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Load the folder where this package cannot be imported. Returns: problems, and what else was found."""
    report = run_check("verify", str(folder.absolute()), device, doing="loading it", stands_for=folder)
    return tuple(report.pop("problems")), report


def _structure(folder: Path, reason: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Lay the folder's model out without memory, in a clean process; nothing is run."""
    report = run_check("structure", str(folder.absolute()), doing="laying it out", stands_for=folder)
    return tuple(report.pop("problems")), {**report, "structure_only": reason}


def require(
    folder: Path, device: str = "cpu", trust_remote_code: bool = False, memory: str | None = None
) -> Verification:
    """Verify, or raise CheckFailed with the problems."""
    result = verify(folder, device, trust_remote_code, memory)
    if not result.holds:
        raise CheckFailed(f"{stage_name(folder)} does not verify: {'; '.join(result.problems)}.")
    return result
