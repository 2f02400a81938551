"""Images with questions: from a file, a folder of images or a data set to batches that a model takes.

Shapes: B samples, S tokens (padded on the left).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError
from .images import open_bytes, short
from .records import read_records
from .samples import Sample as Sample
from .samples import sample_from
from .tables import is_saved, open_table

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEFAULT_PROMPT = "Describe this image."
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True)
class Batch:
    """Model inputs of a few samples, and which tokens are which."""

    inputs: dict[str, torch.Tensor]  # as the processor made them, left-padded
    is_visual: torch.Tensor  # [B, S] image and video placeholders
    is_text: torch.Tensor  # [B, S] neither visual, nor special, nor padding
    samples: tuple[Sample, ...]
    is_answer: torch.Tensor | None = None  # [B, S] text of the model's own answer; None: prompts only

    def to(self, device: Any) -> Batch:
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        is_answer = None if self.is_answer is None else self.is_answer.to(device)
        return Batch(moved, self.is_visual.to(device), self.is_text.to(device), self.samples, is_answer)


@dataclass(frozen=True)
class Calibration:
    """A seeded choice of samples that can be gone through again and again."""

    samples: tuple[Sample, ...]
    origin: str
    total: int  # samples that there were to choose from
    seed: int
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the chosen questions and image bytes, in order."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for sample in self.samples:
                digest.update(json.dumps(sample.messages, sort_keys=True).encode())
                for image in sample.images:
                    digest.update(open_bytes(image, sample.origin))
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
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples={samples}: at least 1 is needed.")
    spec = str(spec)
    found = read_samples(spec, columns=columns, split=split, prompt=prompt, config=config, allow_urls=allow_urls)
    chosen = range(len(found))
    if samples is not None and samples < len(found):
        return Calibration(
            tuple(found[i] for i in sorted(random.Random(seed).sample(chosen, samples))), spec, len(found), seed
        )
    return Calibration(tuple(found[i] for i in chosen), spec, len(found), seed)


def read_samples(
    spec: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = "train",
    prompt: str = DEFAULT_PROMPT,
    config: str | None = None,
    allow_urls: bool = False,
) -> Sequence[Sample]:
    """Every sample of a source. Those of a table are read when they are indexed. Raises InputError."""
    if spec.startswith(DATASETS_PREFIX):
        return open_table(spec.removeprefix(DATASETS_PREFIX), columns or {}, split, config, allow_urls=allow_urls)
    path = Path(spec).expanduser()
    if not os.path.exists(path):
        raise InputError(f"there is no file or folder '{short(spec)}' to read questions from.")
    if path.suffix.lower() == ".parquet" or (path.is_dir() and is_saved(path)):
        return open_table(str(path), columns or {}, split, config, allow_urls=allow_urls)
    for flag, value in (("--columns", columns), ("--config", config)):
        if value:
            raise InputError(f"{flag} is for data sets and parquet files, which {spec} is not: take it out.")
    if path.is_dir():
        return _from_folder(path, prompt)
    return [sample_from(record, origin, path.parent, allow_urls=allow_urls) for origin, record in read_records(path)]


def _from_folder(path: Path, prompt: str) -> list[Sample]:
    files = sorted(file for file in path.rglob("*") if _is_image(file.relative_to(path)) and not file.is_dir())
    if not files:
        hint = " Data set files in it are read as datasets:FOLDER." if any(path.rglob("*.parquet")) else ""
        raise InputError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).{hint}")
    turn = {"role": "user", "content": prompt}
    return [Sample(str(file), (file,), (turn,)) for file in files]


def _is_image(file: Path) -> bool:
    """By its name; what a Mac leaves beside every file (`._a.png`, `__MACOSX`) and hidden folders are none."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in file.parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden


# --- samples to model inputs ------------------------------------------------------------------------------------------


def size_order(samples: Sequence[Sample]) -> list[int]:
    """Indices of the questions by the size of their images: batches in this order hold little padding."""
    return sorted(range(len(samples)), key=lambda index: samples[index].pixels)


def by_size(samples: Sequence[Sample]) -> list[Sample]:
    return [samples[index] for index in size_order(samples)]


def make_batches(samples: Sequence[Sample], processor: Any, config: Any, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(samples), batch_size):
        yield make_batch(samples[start : start + batch_size], processor, config)


def make_batch(samples: Sequence[Sample], processor: Any, config: Any) -> Batch:
    """Questions with the generation prompt, left-padded."""
    from .clean_room import PromptError, encode

    chats, images = [sample.chat() for sample in samples], [sample.open_images() for sample in samples]
    try:
        inputs = encode(processor, chats, images)
    except PromptError as error:
        raise InputError(_prompt_message(error, samples, config)) from error
    except Exception as error:  # processors raise what they like: AttributeError, OverflowError, RuntimeError ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{samples[0].origin} (or a line of its batch) is refused by the processor: {reason}"
        ) from error
    batch = Batch(inputs, *token_kinds(inputs, processor, config), tuple(samples))
    for sample, sees in zip(samples, batch.is_visual.any(1).tolist(), strict=True):
        if sample.images and not sees:
            raise InputError(
                f"{sample.origin}: the prompt has no place for its image: the processor, or image_token_id of "
                "config.json, belongs to another model."
            )
    return batch


def check_prompt(samples: Sequence[Sample], processor: Any, config: Any) -> None:
    """Put the first question, without its images: what is wrong with a template is said before a model is loaded."""
    from .clean_room import PromptError, render

    for sample in samples[:1]:
        try:
            render(processor, sample.chat())
        except PromptError as error:
            raise InputError(_prompt_message(error, samples, config)) from error


def _prompt_message(error: Exception, samples: Sequence[Sample], config: Any) -> str:
    from .families import FAMILIES

    family = FAMILIES.get(config.model_type)
    example = f" ({family.example}, for one)" if family and "copy chat_template" in str(error) else ""
    return f"{samples[0].origin}: {error}{example}."


def token_kinds(inputs: dict[str, torch.Tensor], processor: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are visual, and which are text: [B, S] each. Padding and special tokens are neither."""
    import torch

    from .families import visual_token_ids

    ids = inputs["input_ids"]
    special = torch.tensor(sorted(special_ids(processor.tokenizer)))
    is_visual = torch.isin(ids, torch.tensor(visual_token_ids(config)))
    is_text = inputs["attention_mask"].bool() & ~is_visual & ~torch.isin(ids, special)
    return is_visual, is_text


def special_ids(tokenizer: Any) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def spread(items: Iterable[T], share: float) -> Iterator[T]:
    """A share of the items, evenly spread over all of them; the first one in any case."""
    taken = 0
    for number, item in enumerate(items):
        if taken <= number * share:
            taken += 1
            yield item
