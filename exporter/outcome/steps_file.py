"""What a search has found out so far, on disk: a second call with the same arguments goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.shapes import COUNT, FLAG, NUMBER, ListOf, MapOf, Maybe, check, one_of
from ..comparison.cells_file import CellsFile
from .answer_cost import PARTS
from .candidate import Candidate, Mix

STEPS_FILE = "steps.jsonl"
BEGUN, ORIGINAL, MEASURED, PASSED = "begun", "original", "measured", "passed over"
OF_PARTS = dict.fromkeys(PARTS, NUMBER)
CANDIDATE = {"drop": COUNT, "healed": FLAG, "tokens": Maybe(NUMBER), "int8": FLAG}
FIGURES = {
    "speedup": NUMBER,
    "speedup_interval": ListOf(NUMBER, 2),
    "total_ms": NUMBER,
    "original_ms": NUMBER,
    "ms": OF_PARTS,
    "ms_of_original": OF_PARTS,
    "flops_share": Maybe(NUMBER),
    "memory_bytes": COUNT,
    "memory_measured": FLAG,
    "parameters": COUNT,
}
SHAPES: dict[str, dict[str, Any]] = {
    BEGUN: {},
    ORIGINAL: {
        "correct": ListOf(COUNT),
        "answer_tokens": COUNT,
        "depths": MapOf({"ms": OF_PARTS, "flops": OF_PARTS}),
        "beyond": COUNT,
        "seconds": NUMBER,
    },
    MEASURED: {
        "candidate": CANDIDATE,
        "correct": ListOf(COUNT),
        "figures": FIGURES,
        "held_out": Maybe({"same_answers?": NUMBER}),
        "seconds": MapOf(NUMBER),
    },
    PASSED: {"candidate": CANDIDATE, "held_out": {"same_answers": NUMBER}, "expected_loss": NUMBER},
}


class StepsFile:
    """Finished steps of a search."""

    def __init__(self, out: Path, depends_on: Any) -> None:
        self.file = CellsFile(out / STEPS_FILE, depends_on, "search")
        self.steps: list[dict[str, Any]] = list(self.file.read(checked))

    def begin(self) -> None:
        """Make the folder, and the file that says whose it is."""
        if not self.file.path.exists():
            self.add({"step": BEGUN})

    def add(self, step: dict[str, Any]) -> None:
        self.file.add([step])
        self.steps.append(step)

    @property
    def original(self) -> dict[str, Any] | None:
        """Return what is known of the original."""
        return next((step for step in self.steps if step["step"] == ORIGINAL), None)

    def of_kind(self, kind: str) -> dict[Candidate, dict[str, Any]]:
        """Return the steps of a kind, by candidate, in the order in which they were taken."""
        return {candidate_from(step["candidate"]): step for step in self.steps if step["step"] == kind}

    @property
    def done(self) -> set[Candidate]:
        """Return the candidates that need not be looked at again."""
        return {candidate for kind in (MEASURED, PASSED) for candidate in self.of_kind(kind)}


def checked(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step as it was read. Raises: Misfit where it is damaged."""
    check(step, {"step": one_of(*SHAPES)})
    check(step, SHAPES[step["step"]])
    return step


def candidate_from(data: dict[str, Any]) -> Candidate:
    """Return a candidate from plain data."""
    return Candidate(data["drop"], Mix(data["healed"], data["tokens"], data["int8"]))


def candidate_data(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as plain data."""
    return {"drop": candidate.drop, **vars(candidate.mix)}
