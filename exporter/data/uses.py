"""Count the uses of questions that are kept for a last test, so that whoever looks at them again is told.

An empty file NAME.uses.jsonl beside a task NAME.jsonl asks for it: `evaluate` and `compare` then add a line for each
use and say who has seen the questions before, and nothing is calibrated on them or searched by them. Tasks without
such a file are not counted.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.shapes import COUNT, TEXT, ListOf, Maybe, Misfit, check
from ..errors import InputError
from .records import read_text

logger = logging.getLogger(__name__)
SUFFIX = ".uses.jsonl"
NAMED = 3  # earlier uses that a sentence names, the last ones
USE = {"date": TEXT, "by": TEXT, "models": ListOf(TEXT), "questions": COUNT, "fingerprint": TEXT, "run": Maybe(TEXT)}


@dataclass(frozen=True)
class Use:
    """One use of a task."""

    date: str  # 2026-11-29
    by: str  # the subcommand
    models: tuple[str, ...]
    questions: int
    fingerprint: str  # of those questions
    run: str | None  # `run_of` a run that goes on where it broke off, which is one use; None: every run is one

    def __str__(self) -> str:
        return f"{self.by} of {', '.join(self.models)} on {self.date}"


@dataclass(frozen=True)
class TaskUses:
    """What is known of the uses of a task that counts them, before the one at hand."""

    task: str  # its file's name
    file: Path
    earlier: tuple[Use, ...]

    @property
    def sentence(self) -> str:
        """Say whether the questions are fresh."""
        if not self.earlier:
            return f"{self.task} is used for the first time; {self.file.name} says so from now on."
        named = "; ".join(map(str, self.earlier[-NAMED:]))
        before = f"the last {NAMED}: " if len(self.earlier) > NAMED else ""
        times = "once" if len(self.earlier) == 1 else f"{len(self.earlier)} times"
        return (
            f"{self.task} was used {times} before ({before}{named}): it is no fresh test any more, and what was chosen "
            "since then may fit its questions."
        )

    def without(self, run: str) -> TaskUses:
        """Return the uses of other runs."""
        return TaskUses(self.task, self.file, tuple(use for use in self.earlier if use.run != run))

    def note(
        self, by: str, models: Sequence[str], questions: int, fingerprint: str, run: str | None = None
    ) -> TaskUses:
        """Add a use to the file, unless it is one that goes on; return the others. What can't be written is said."""
        others = self if run is None else self.without(run)
        if len(others.earlier) == len(self.earlier):
            names = tuple(Path(model).name for model in models)
            use = Use(
                datetime.date.today().isoformat(),
                by,
                models=names,
                questions=questions,
                fingerprint=fingerprint,
                run=run,
            )
            try:
                with self.file.open("a") as file:
                    file.write(json.dumps(asdict(use)) + "\n")
            except OSError as error:
                logger.warning("%s can't be written (%s): this use is not counted.", self.file, error.strerror)
        return others


def used_data(uses: TaskUses | None) -> dict[str, Any]:
    """Return what results tell of a task's uses: nothing where they are not counted."""
    if uses is None:
        return {}
    return {"task_uses": {"sentence": uses.sentence, "earlier": [asdict(use) for use in uses.earlier]}}


def uses_file(task: str) -> Path | None:
    """Return the file that counts a task's uses, None where there is none."""
    path = Path(task.removeprefix("datasets:")).expanduser()
    file = path.with_name((path.name if path.is_dir() else path.stem) + SUFFIX) if path.name else None
    return file if file is not None and path.exists() and file.is_file() else None


def uses_of(task: str) -> TaskUses | None:
    """Read who has used a task, None where its uses are not counted. Raises InputError for a damaged file."""
    file = uses_file(task)
    if file is None:
        return None
    uses = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            data = json.loads(line)
            check(data, USE)
            uses.append(Use(**{**data, "models": tuple(data["models"])}))
        except (ValueError, TypeError, Misfit, RecursionError) as error:
            raise InputError(
                f"{file} line {number} does not say who used the questions: take that line out, if it is not a use."
            ) from error
    return TaskUses(Path(task).name, file, tuple(uses))


def warned_of_uses(task: str) -> TaskUses | None:
    """Return who has used a task, None where its uses are not counted, and warn where it is no fresh test any more."""
    uses = uses_of(task)
    if uses is not None and uses.earlier:
        logger.warning("%s", uses.sentence)
    return uses


def begin_use(
    task: str, by: str, models: Sequence[str], questions: int, fingerprint: str, run: str | None
) -> TaskUses | None:
    """Count a use that begins, and warn of earlier ones; return those, None where uses are not counted."""
    uses = uses_of(task)
    if uses is None:
        return None
    others = uses.note(by, models, questions, fingerprint, run)
    if others.earlier:
        logger.warning("%s", others.sentence)
    return others


def check_not_kept_aside(data: str, what: str) -> None:
    """Raise InputError for questions whose uses are counted, where something is to be chosen by them, or learnt."""
    if file := uses_file(data):
        raise InputError(
            f"{data} is kept for a last test, as {file.name} beside it says, and not for {what}: name other questions, "
            "or take that file away."
        )


def run_of(out: Path) -> str:
    """Return the name of a run that goes on in a folder; it tells nothing of where that is."""
    return hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
