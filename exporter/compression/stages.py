"""What the steps of a compression have found, on disk, so that a run that was broken off goes on behind its last one.

Each step is a safetensors file in a folder beside the result: its tensors, and the rest as JSON in the header. An index
names the SHA-256 of each, and the fingerprint of all that the run depends on: recipe, source, questions, device, the
package's own code. Steps of another fingerprint are not used, and neither is a file that is not what was written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import ranks
from ..checkpoints.files import hash_once, replace_text, sha256
from ..checkpoints.safetensors_ranges import replace_tensors
from ..checkpoints.source import file_hashes
from ..checkpoints.temporary import LOCK, held
from ..errors import CheckFailed, InputError
from ..localize.judged import JudgedSets
from ..localize.scores import LayerScores
from ..models import journal
from ..models.capture import RANKINGS
from ..models.loading import alike_options
from ..models.questions import Questions
from ..plan import Folded
from ..version import code_hash, versions
from .job import CompressionJob

logger = logging.getLogger(__name__)
T = TypeVar("T")
INDEX, STEP, DATA = "stages.json", ".safetensors", "data"
Content = tuple[Any, dict[str, Tensor]]  # what goes into JSON, and tensors


@dataclass(frozen=True)
class Codec:
    """How a step's result becomes JSON and tensors, and is made of them again."""

    content: Callable[[Any], Content]
    result: Callable[[Any, dict[str, Tensor]], Any]


def _scores(data: Any, tensors: dict[str, Tensor]) -> LayerScores:
    return LayerScores(data["method"], tuple(data["values"]), tuple(data["drop"]), data["details"])


def _folded_content(result: tuple[Folded, Any]) -> Content:
    folded, told = result
    return told, {f"{layer}:{name}": tensor for (layer, name), tensor in folded.items()}


def _folded(data: Any, tensors: dict[str, Tensor]) -> tuple[Folded, Any]:
    split = {key: key.split(":", 1) for key in tensors}
    return {(int(layer), name): tensors[key] for key, (layer, name) in split.items()}, data


FULL = (errno.ENOSPC, errno.EDQUOT)
FOLLOWED = ("answers", "judged")  # kept as they grow
CODECS = {  # of steps that are kept whole
    "scores": Codec(lambda scores: (asdict(scores), {}), _scores),
    "fold": Codec(_folded_content, _folded),
    "reference": Codec(lambda answer: (answer, {}), lambda data, tensors: data),
}
LAST = "reference"


@dataclass(frozen=True)
class Spent:
    """What a compression took until now."""

    seconds: float = 0.0
    bytes_read: int = 0


@dataclass
class Stages:
    """The finished steps of one run. Without a folder nothing is kept."""

    folder: Path | None = None
    fingerprint: str = ""
    finished: dict[str, str] = field(default_factory=dict)  # SHA-256 of each step's file
    before: Spent = Spent()  # by runs that were broken off, on what they have finished
    begin: float = field(default_factory=time.monotonic)
    read_here: Callable[[], int] = lambda: 0  # bytes of weights, where layers lie on disk
    journal: journal.Journal | None = None  # of passes over layers on disk, in a single process

    @property
    def spent(self) -> Spent:
        """What this run has spent, with the runs before it that it goes on from."""
        here = time.monotonic() - self.begin
        return Spent(self.before.seconds + here, self.before.bytes_read + self.read_here())

    def run(self, name: str, questions: Questions, compute: Callable[[], T]) -> T:
        """Return what a step finds: from disk where a run before has finished it, else computed, and kept."""
        kept = self._read(name)
        if (data := ranks.from_first(lambda: kept and kept[0])) is not None:
            questions.tokens.update(data["tokens"])
            # Tensors are for the first process alone, which writes them.
            result: T = CODECS[name].result(data["result"], {} if kept is None else kept[1])
            return result
        result = compute()
        data, tensors = CODECS[name].content(result)
        self._keep(name, {"result": data, "tokens": questions.count_tokens()}, tensors)
        return result

    def follow_answers(self, questions: Questions) -> None:
        """Give questions the answers that a run before was given, and keep those that follow."""
        if (kept := ranks.from_first(lambda: self._read("answers"))) is not None:
            questions.go_on_from(*kept)
        questions.on_answers = lambda: self._keep("answers", *questions.so_far())

    def follow_judged(self, judged: JudgedSets, questions: Questions) -> None:
        """Give sets of layers what a run before has judged, and keep what follows."""
        if (kept := ranks.from_first(lambda: self._read("judged"))) is not None:
            judged.go_on_from(kept[0]["result"])
            questions.tokens.update(kept[0]["tokens"])

        def keep() -> None:
            self._keep("judged", {"result": judged.to_data(), "tokens": questions.count_tokens()}, {})

        judged.on_more = keep

    def _read(self, name: str) -> Content | None:
        from safetensors import safe_open

        if self.folder is None or name not in self.finished:
            return None
        path = self._path(name)
        if not path.is_file() or hash_once(path) != self.finished[name]:
            logger.warning("%s is not what was written there: this step is done again", path)
            return None
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[DATA]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def _keep(self, name: str, data: Any, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            return
        path = self._path(name)
        try:
            replace_tensors(path, tensors, {DATA: json.dumps(data)})
            self.finished[name] = sha256(path)
            if self.journal is not None:  # what passes were made for
                self.journal.clear(but=RANKINGS if name in FOLLOWED else "")
            index = {"fingerprint": self.fingerprint, "stages": self.finished, "spent": asdict(self.spent)}
            replace_text(self.folder / INDEX, json.dumps(index))
        except OSError as error:
            if error.errno not in FULL:
                raise
            logger.warning("%s can't be kept, since the disk is full: a run that is broken off does it again", path)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{STEP}"


@contextlib.contextmanager
def stages_in(folder: Path, fingerprint: str) -> Iterator[Stages]:
    """Give the steps that are kept in a folder, which is made.

    The folder stays where the block is broken off behind a finished step, and where it ends well; the caller removes it
    then. It goes where a check does not hold, or a step refuses its input; not where the system fails, on a full disk
    for example, and not once all steps are finished: what is refused then is the place of the result.

    Raises: InputError where another run that is alive holds the folder, or something else has its name.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is no folder, and a run keeps there what it goes on from: move it away.")
    if foreign := _foreign(folder):
        raise InputError(
            f"{folder} holds {foreign[0]}, which no run has left there, and would be removed with it: move it away."
        )
    folder.mkdir(exist_ok=True)
    stages = Stages(folder, fingerprint)
    with held(folder, "another run is compressing"):
        try:
            stages.finished, stages.before = _finished(folder, fingerprint)
            stages.journal = journal.Journal(folder, fingerprint) if ranks.world() == 1 else None
            yield stages
        except BaseException as error:
            failed = isinstance(error, CheckFailed) or isinstance(error.__context__, CheckFailed)
            refused = isinstance(error, InputError) and not (
                LAST in stages.finished or isinstance(error.__cause__, OSError)
            )
            passes = stages.journal is not None and stages.journal.kept
            if failed or refused or not (stages.finished or passes):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _foreign(folder: Path) -> list[str]:
    """Return the names of what lies in a folder and is not from a run."""
    ours = {LOCK, INDEX, journal.INDEX, *(f"{name}{STEP}" for name in (*FOLLOWED, *CODECS))}
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    passes = {name for name in names if name.startswith(journal.PREFIX) and name.endswith(journal.SUFFIX)}
    return [name for name in names if name not in ours | passes and not name.endswith(".partial")]


def _finished(folder: Path, fingerprint: str) -> tuple[dict[str, str], Spent]:
    """Return the SHA-256 of each step that a run before has finished, and what it spent on them.

    What it left is removed where it was another.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        steps = {name: str(digest) for name, digest in index["stages"].items() if name in (*FOLLOWED, *CODECS)}
        spent = Spent(float(index["spent"]["seconds"]), int(index["spent"]["bytes_read"]))
        same = index["fingerprint"] == fingerprint
    except FileNotFoundError:
        return {}, Spent()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        steps, spent, same = {}, Spent(), False
    if same:
        logger.warning("%s: goes on behind what a run before has finished: %s", folder, ", ".join(steps))
        return steps, spent
    logger.warning(
        "%s is of another recipe, model or version, or damaged: it is not used, and all is done anew", folder
    )
    for path in (*folder.glob(f"*{STEP}"), folder / journal.INDEX):
        path.unlink(missing_ok=True)
    (folder / INDEX).unlink()
    return {}, Spent()


def fingerprint_of(job: CompressionJob) -> str:
    """Return one of all that the result of a compression depends on."""
    parts = parts_of(job) | {"threads": torch.get_num_threads(), "versions": versions(), "code": code_hash()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def parts_of(job: CompressionJob) -> dict[str, Any]:
    """Return what is asked for, by names for a message to those whose processes differ."""
    elsewhere = job.calibration.answers
    return {
        "the recipe": job.recipe.to_data(),
        "the source": file_hashes(job.source),
        "the questions": job.calibration.fingerprint if job.calibration.samples else None,
        # guesses at the model's answers are made of the right ones
        "the right answers": [sample.answers for sample in job.calibration.samples],
        "the answers given elsewhere": None if elsewhere is None else elsewhere.sha256,
        "the stored scores": None if job.stored is None else asdict(job.stored),
        "device, dtype, batch size or memory": alike_options(
            job.device, job.dtype, job.options.batch_size, job.options.memory
        ),
    }
