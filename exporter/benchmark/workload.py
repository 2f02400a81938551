"""Prompts for timing: lines of a task, or random images and words of a given number of tokens.

Shapes: B sequences.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..clean_room import REFERENCE_QUESTION
from ..data.batches import Batch, make_batch
from ..data.calibration import read_samples
from ..data.samples import Sample
from ..errors import InputError
from ..plain_data import paths_as_text

DEFAULT_SIDE = 336  # pixels, of the image that is shown where no number of visual tokens is asked for
LARGEST_SIDE = 4096
WORDS = "the a of in is on it to and for with at by one two red blue big".split()  # one token each, almost everywhere
ATTEMPTS = 8


@dataclass(frozen=True)
class Workload:
    """One prompt for each sequence, no two alike: sequences of a batch may be routed differently, as they are in use.

    Args:
        task: a JSONL file as for `evaluate`; its first B lines, again from the first where there are fewer.
        visual_tokens: without a task, how many visual tokens a prompt has; None: those of one image of 336 x 336.
        text_tokens: and how many others, the chat template's included; None: a short question.
    """

    task: str | None = None
    visual_tokens: int | None = None
    text_tokens: int | None = None
    seed: int = 0
    columns: Mapping[str, str] | None = None  # of the task, as `load_calibration` takes them
    split: str | None = None
    config: str | None = None
    allow_urls: bool = False
    frames: int | None = None

    def __post_init__(self) -> None:
        paths_as_text(self, "task")
        if self.task is not None and (self.visual_tokens is not None or self.text_tokens is not None):
            raise InputError("give either a task, which has prompts of its own, or numbers of visual and text tokens.")
        for name in ("visual_tokens", "text_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value}: at least 1 is needed.")

    def batch(self, processor: Any, config: Any, number: int) -> Batch:
        """Return model inputs of that number of prompts, as this processor makes them."""
        if self.task is not None:
            how = {name: getattr(self, name) for name in ("columns", "split", "config", "allow_urls", "frames")}
            lines = read_samples(self.task, **how)
            return make_batch([lines[index % len(lines)] for index in range(number)], processor, config)
        tokens = self.visual_tokens
        side, count = (DEFAULT_SIDE, 1) if tokens is None else image_shape(processor, config, tokens)
        samples = []
        for index in range(number):
            draw = random.Random(self.seed + index)
            shown = tuple(random_image(draw, side) for _ in range(count))
            samples.append(self._question(shown, draw, processor, config))
        return make_batch(samples, processor, config)

    def _question(self, images: tuple[Any, ...], draw: random.Random, processor: Any, config: Any) -> Sample:
        """Return a prompt with exactly the text tokens that are asked for."""
        if self.text_tokens is None:
            return question(images, REFERENCE_QUESTION)
        words = [draw.choice(WORDS)]
        for _ in range(ATTEMPTS):
            sample = question(images, " ".join(words))
            batch = make_batch([sample], processor, config)
            missing = self.text_tokens - int((~batch.is_visual).sum())
            if missing == 0:
                return sample
            if len(words) + missing < 1:
                raise InputError(
                    f"text_tokens={self.text_tokens} is less than the {self.text_tokens - missing} that this model's "
                    f"chat template and one word take: ask for {self.text_tokens - missing} or more."
                )
            words = words[:missing] if missing < 0 else words + draw.choices(WORDS, k=missing)
        raise InputError(f"no text of exactly {self.text_tokens} tokens was found: ask for another number.")

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def question(images: Sequence[Any], text: str) -> Sample:
    return Sample("a random prompt", tuple(images), ({"role": "user", "content": text},))


def random_image(draw: random.Random, side: int) -> Any:
    """Draw noise: no two images, and no two parts of one, are alike."""
    from PIL import Image

    return Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side))


def image_shape(processor: Any, config: Any, tokens: int) -> tuple[int, int]:
    """Return the side of square images, and how many of them, that make so many visual tokens."""

    from PIL import Image

    def visual_tokens(side: int) -> int:
        sample = question([Image.new("RGB", (side, side))], REFERENCE_QUESTION)
        return int(make_batch([sample], processor, config).is_visual.sum())

    usual = visual_tokens(DEFAULT_SIDE)
    if tokens % usual == 0:
        return DEFAULT_SIDE, tokens // usual
    low, high = 1, LARGEST_SIDE  # processors for images of any size make more tokens of larger ones
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if visual_tokens(middle) >= tokens else (middle + 1, high)
    above = visual_tokens(low)
    if above == tokens:
        return low, 1
    below = visual_tokens(max(1, low - 1))
    near = sorted({n for n in (below, above, tokens // usual * usual, (tokens // usual + 1) * usual) if n})
    raise InputError(
        f"visual_tokens={tokens}: this model's processor makes no square images of that many tokens: ask for "
        f"{' or '.join(map(str, near))}."
    )
