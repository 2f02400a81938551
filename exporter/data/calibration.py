"""Images with questions: from a file, a folder of images or a data set to batches that a model takes.

Shapes: B samples, S tokens (padded on the left).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..recipe import CalibrationData
from .given import GivenAnswers
from .images import short
from .records import read_records
from .samples import Sample, TextOnlyError, sample_from
from .tables import is_saved, open_table
from .uses import check_not_kept_aside

logger = logging.getLogger(__name__)
DEFAULT_PROMPT = "Describe this image."
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True)
class Calibration:
    """A seeded choice of samples that can be gone through again and again."""

    samples: tuple[Sample, ...]
    origin: str
    total: int  # samples that there were to choose from
    seed: int
    answers: GivenAnswers | None = None  # that the original gave elsewhere; None: it gives them when they are wanted
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Return SHA-256 over the chosen questions and image bytes, in order."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for sample in self.samples:
                digest.update(json.dumps(sample.messages, sort_keys=True).encode())
                for content in sample.contents():
                    digest.update(content)
            self._fingerprint.append(digest.hexdigest())
        return self._fingerprint[0]


def load_calibration(
    spec: str | Path,
    *,
    samples: int | None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    split: str | None = "train",
    prompt: str = DEFAULT_PROMPT,
    config: str | None = None,
    allow_urls: bool = False,
    skip_text_only: bool = True,
    text_only: bool = False,
    frames: int | None = None,
) -> Calibration:
    """Read a data source and choose `samples` of it (None: all of them, in order).

    Args:
        spec: a JSONL or JSON file, a parquet file, a folder of images or one that `datasets` saved, or
            'datasets:ID_OR_FOLDER'.
        columns: for a data set, what its columns are called: {"image": "img", "question": "text", "answer": "label"}.
        split: of a data set; None: the only one.
        prompt: the question put to every image of a folder.
        config: of a data set that has several.
        allow_urls: fetch images that stand as http and https addresses.
        skip_text_only: leave questions without an image out, others are drawn for them, and log how many; else they
            are an error. Instruction data has them in between.
        text_only: read them as questions like all others.
        frames: the most to take of a video file, evenly spread; None: DEFAULT_FRAMES of `exporter.data.videos`.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples={samples}: at least 1 is needed.")
    spec = str(spec)
    left_out: list[str] | None = [] if skip_text_only else None
    available = read_samples(
        spec,
        columns=columns,
        split=split,
        prompt=prompt,
        config=config,
        allow_urls=allow_urls,
        left_out=left_out,
        text_only=text_only,
        frames=frames,
    )
    chosen = drawn(available, samples, seed, left_out)
    if left_out and not chosen:
        raise InputError(f"{left_out[0].removesuffix('.')}; of {len(left_out)} questions none has one.")
    if left_out:
        logger.warning(
            "%s: questions without an image are left out (%d); %d are read", short(spec), len(left_out), len(chosen)
        )
    return Calibration(tuple(chosen), spec, len(available), seed)


def drawn(
    available: Sequence[Sample], samples: int | None, seed: int, left_out: list[str] | None = None
) -> list[Sample]:
    """Choose samples in the order of the source; those of a table are read here.

    Args:
        left_out: takes the origins of questions without an image, in whose place others are drawn; None: an error.
    """
    order = list(range(len(available)))
    number = len(order) if samples is None else min(samples, len(order))
    if number < len(order):
        random_order = random.Random(seed)
        first = random_order.sample(order, number)
        rest = sorted(set(order) - set(first))
        random_order.shuffle(rest)
        order = sorted(first) + rest
    chosen: dict[int, Sample] = {}
    for index in order:
        if len(chosen) == number:
            break
        try:
            chosen[index] = available[index]
        except TextOnlyError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    return [chosen[index] for index in sorted(chosen)]


def questions_of(data: CalibrationData, seed: int) -> Calibration:
    """Load the questions that a recipe names. Raises InputError, also for those that are kept for a last test."""
    check_not_kept_aside(data.data, "calibration")
    return load_calibration(
        data.data,
        samples=data.samples,
        seed=seed,
        columns=data.columns,
        split=data.split,
        prompt=data.prompt,
        config=data.config,
        allow_urls=data.allow_urls,
        frames=data.frames,
    )


def read_samples(
    spec: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = "train",
    prompt: str = DEFAULT_PROMPT,
    config: str | None = None,
    allow_urls: bool = False,
    left_out: list[str] | None = None,
    text_only: bool = False,
    frames: int | None = None,
) -> Sequence[Sample]:
    """Return every sample of a source. Those of a table are read when they are indexed. Raises InputError.

    Args:
        left_out: takes what is said of the lines of a file that have no image; None: such a line is an error.
    """
    if spec == DATASETS_PREFIX:
        raise InputError(f"{spec} names no data set: {DATASETS_PREFIX}USER/NAME.")
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
        raise InputError(f"frames={frames!r}: at least 1 frame of a video file is needed.")
    how: dict[str, Any] = {"allow_urls": allow_urls, "text_only": text_only, "frames": frames}
    if spec.startswith(DATASETS_PREFIX):
        return open_table(spec.removeprefix(DATASETS_PREFIX), columns or {}, split, config, **how)
    path = Path(spec).expanduser()
    if not spec.strip() or "\0" in spec or not os.path.exists(path):  # an empty name would be the working directory
        raise InputError(f"there is no file or folder '{short(spec)}' to read questions from.")
    if path.suffix.lower() == ".parquet" or (path.is_dir() and is_saved(path)):
        return open_table(str(path), columns or {}, split, config, **how)
    for flag, value in (("--columns", columns), ("--config", config)):
        if value:
            raise InputError(f"{flag} is for data sets and parquet files, which {spec} is not: take it out.")
    return _from_folder(path, prompt) if path.is_dir() else _from_file(path, how, left_out)


def _from_file(path: Path, how: Mapping[str, Any], left_out: list[str] | None) -> list[Sample]:
    samples = []
    for origin, record in read_records(path):
        try:
            samples.append(sample_from(record, origin, path.parent, **how))
        except TextOnlyError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    return samples


def _from_folder(path: Path, prompt: str) -> list[Sample]:
    files = sorted(file for file in path.rglob("*") if _is_image(file.relative_to(path)) and not file.is_dir())
    if not files:
        hint = " Data set files in it are read as datasets:FOLDER." if any(path.rglob("*.parquet")) else ""
        raise InputError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).{hint}")
    turn = {"role": "user", "content": prompt}
    return [Sample(str(file), (file,), (turn,)) for file in files]


def _is_image(file: Path) -> bool:
    """Tell an image by its name; hidden folders and what a Mac leaves beside files (`._a.png`, `__MACOSX`) are none."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in file.parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden
