"""Images with questions: from a JSONL file, a folder of images or a `datasets` data set to batches that a model takes.

Shapes: B samples, S tokens (padded on the left).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

T = TypeVar("T")
DEFAULT_PROMPT = "Describe this image."
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True)
class Sample:
    """One question about zero or more images."""

    origin: str  # 'file.jsonl line 3', for messages
    images: tuple[Any, ...]  # paths, or images of a data set
    messages: tuple[dict[str, Any], ...]  # chat turns; images are still apart from them
    answers: tuple[str, ...] = ()  # any of them is right; empty: unlabelled
    type: str | None = None
    choices: tuple[str, ...] = ()

    @functools.cached_property
    def pixels(self) -> int:
        """Of all its images, by their headers: it brings about as many visual tokens. 0 for one that can't be read."""
        from PIL import Image

        total = 0
        for image in self.images:
            if not isinstance(image, Path):
                total += image.width * image.height
                continue
            with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(image) as file:
                total += file.width * file.height
        return total

    def open_images(self) -> list[Image]:
        """RGB images. Raises InputError that names the file and where it was asked for."""
        from PIL import Image

        opened = []
        for image in self.images:
            if not isinstance(image, Path):
                opened.append(image.convert("RGB"))
                continue
            try:
                with Image.open(image) as file:
                    opened.append(file.convert("RGB"))
            except FileNotFoundError as error:
                raise InputError(f"{self.origin}: there is no image {image}.") from error
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                size = image.stat().st_size
                raise InputError(
                    f"{self.origin}: {image} can't be read as an image ({size} bytes). Replace it or take the line out."
                ) from error
        return opened

    def chat(self) -> list[dict[str, Any]]:
        """The turns as chat templates take them: images first in the first user turn, unless the turns place them."""
        turns: list[dict[str, Any]] = []
        for turn in self.messages:
            content = turn["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            turns.append({"role": turn["role"], "content": parts})
        placed = sum(part.get("type") == "image" for turn in turns for part in turn["content"])
        if placed == 0:
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = [{"type": "image"}] * len(self.images) + first["content"]
        elif placed != len(self.images):
            raise InputError(f"{self.origin}: the messages place {placed} images, the line names {len(self.images)}.")
        return turns


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
                    digest.update(image.read_bytes() if isinstance(image, Path) else image.tobytes())
            self._fingerprint.append(digest.hexdigest())
        return self._fingerprint[0]


def load_calibration(
    spec: str,
    *,
    samples: int | None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    split: str = "train",
    prompt: str = DEFAULT_PROMPT,
) -> Calibration:
    """Read a data source and choose `samples` of it (None: all of them, in order).

    Args:
        spec: a JSONL file, a folder of images, or 'datasets:ID_OR_FOLDER'.
        columns: for a data set, what its columns are called: {"image": "img", "question": "text", "answer": "label"}.
        prompt: the question put to every image of a folder.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples={samples}: at least 1 is needed.")
    found = read_samples(spec, columns=columns, split=split, prompt=prompt)
    total = len(found)
    if samples is not None and samples < total:
        chosen = sorted(random.Random(seed).sample(range(total), samples))
        found = [found[i] for i in chosen]
    return Calibration(tuple(found), spec, total, seed)


def read_samples(
    spec: str, *, columns: dict[str, str] | None = None, split: str = "train", prompt: str = DEFAULT_PROMPT
) -> list[Sample]:
    if spec.startswith(DATASETS_PREFIX):
        return _from_dataset(spec.removeprefix(DATASETS_PREFIX), columns or {}, split)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path, prompt)
    if not path.exists():
        raise InputError(f"there is no file or folder '{spec}' to read questions from.")
    return _from_jsonl(path)


def _from_jsonl(path: Path) -> list[Sample]:
    samples = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file ({error.reason} at byte {error.start}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        origin = f"{path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{origin} is no JSON ({error}): one object a line is needed.") from error
        if not isinstance(record, dict):
            raise InputError(f"{origin} holds a {type(record).__name__}, not a JSON object.")
        samples.append(_sample(record, origin, path.parent))
    if not samples:
        raise InputError(f"{path} holds no lines: one JSON object a line is needed.")
    return samples


def _sample(record: dict[str, Any], origin: str, folder: Path) -> Sample:
    """One record in the project's data format; unknown keys are ignored."""
    images = record.get("images", record.get("image"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not images:
        raise InputError(f"{origin}: a question without an image ('image' or 'images' is missing).")
    if bad := [image for image in images if not isinstance(image, str)]:
        raise InputError(f"{origin}: an image is a path, not {bad[0]!r}.")
    answers = record.get("answer", record.get("answers", []))
    answers = answers if isinstance(answers, list) else [answers]
    messages = record.get("messages")
    if messages is None:
        if not isinstance(record.get("question"), str) or not record["question"].strip():
            raise InputError(f"{origin}: neither 'question' nor 'messages'.")
        messages = [{"role": "user", "content": record["question"]}]
    _check_messages(messages, origin)
    if messages[-1]["role"] == "assistant":  # the wanted answer, written as a turn
        answers = answers or [_text_of(messages[-1])]
        messages = messages[:-1]
    return Sample(
        origin,
        tuple(folder / image for image in images),
        tuple(messages),
        tuple(map(str, answers)),
        record.get("type"),
        tuple(record.get("choices") or ()),
    )


def _check_messages(messages: Any, origin: str) -> None:
    good = isinstance(messages, list) and all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and (
            isinstance(turn.get("content"), str)
            or (isinstance(turn.get("content"), list) and all(isinstance(part, dict) for part in turn["content"]))
        )
        for turn in messages
    )
    if not good or not any(turn["role"] == "user" for turn in messages):
        raise InputError(
            f"{origin}: 'messages' must be a list of {{'role': 'user' | 'assistant' | 'system', 'content': text or "
            "parts}} with a user turn."
        )


def _text_of(turn: dict[str, Any]) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _from_folder(path: Path, prompt: str) -> list[Sample]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    turn = {"role": "user", "content": prompt}
    return [Sample(str(file), (file,), (turn,)) for file in files]


def _from_dataset(name: str, columns: dict[str, str], split: str) -> list[Sample]:
    """A data set of the hub, or a folder that `datasets` saved or can load."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "reading a data set needs the package 'datasets': pip install 'lvlm-exporter[eval]'."
        ) from error
    try:
        if Path(name).is_dir() and (Path(name) / "state.json").exists():
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises dozens of types, each a user's matter: name, split, network
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"data set '{name}' (split '{split}') can't be loaded: {reason}") from error
    name_of = {"image": "image", "question": "question", "answer": "answer", "type": "type"} | columns
    for role in ("image", "question"):
        if name_of[role] not in table.column_names:
            raise InputError(
                f"data set '{name}' has no column '{name_of[role]}' for the {role}; it has: "
                f"{', '.join(table.column_names)}. Say which with --columns {role}=NAME."
            )
    samples = []
    for number, row in enumerate(table):
        image = row[name_of["image"]]
        answer = row.get(name_of["answer"])
        answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
        samples.append(
            Sample(
                f"{name} row {number}",
                tuple(image) if isinstance(image, list) else (image,),
                ({"role": "user", "content": str(row[name_of["question"]])},),
                tuple(map(str, answers)),
                row.get(name_of["type"]),
            )
        )
    return samples


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
    from .clean_room import encode

    try:
        inputs = encode(processor, [sample.chat() for sample in samples], [sample.open_images() for sample in samples])
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(
            f"{samples[0].origin} (or a line of its batch) is refused by the processor: {error}"
        ) from error
    return Batch(inputs, *token_kinds(inputs, processor, config), tuple(samples))


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
