"""LLaVA-Bench (in the wild): an OpenAI-compatible judge rates a reference answer and the model's, 1 to 10 each.

The figure is the model's mean rating as a share of the reference's, of all questions and of each category (H. Liu et
al. 2023, arXiv 2304.08485). The judge sees a caption in place of the picture. What it is told here is in our own
words; the benchmark's are given as a file. A rating is kept as soon as it is there, so that a run that breaks off
goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.chats import text_of
from ...data.samples import Sample
from ...errors import InputError
from .metric import Figures, by_category

if TYPE_CHECKING:
    from ...data.resumable import ResumableLines

LARGEST = 10  # of a rating
TASK = (
    "Two assistants answered a question about a picture that you know by its description alone. Rate how helpful, "
    "relevant, correct and detailed each answer is, with a whole number from 1 to 10. Neither the order of the answers "
    "nor their length is to matter. Write the two numbers alone on the first line, the first assistant's first, with a "
    "space between them; then say why."
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
KEY = "OPENAI_API_KEY"  # environment variable with what a judge asks for as a key
AGAIN = (429, 500, 502, 503, 504)  # answers of a server that is busy
RATING_FIELDS: dict[str, type] = {"review": str, "ratings": list}


class JudgeSilentError(InputError):
    """The judge does not answer."""


def no_value(_sample: Sample, _answer: str) -> float:
    """Return 0: only the judge says what an answer is worth."""
    return 0.0


@dataclass(frozen=True)
class JudgeClient:
    """An OpenAI-compatible server that rates answers."""

    url: str  # of its API, https://host/v1, or of its chat/completions
    model: str
    task: str = TASK  # what it is told to do
    timeout_s: float = 120.0
    attempts: int = 4
    wait_s: float = 2.0  # before the second attempt; twice as long before each further one
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise InputError(f"--judge {self.url}: an address that begins with http:// or https:// is needed.")
        if not self.model:
            raise InputError(f"--judge {self.url} needs --judge-model NAME: which of its models is to judge.")

    @property
    def endpoint(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    def reply_to(self, text: str) -> str:
        """Return what the judge says. Raises JudgeSilentError after several attempts."""
        body = {"model": self.model, "temperature": 0, "max_tokens": 512}
        data = json.dumps(body | {"messages": [{"role": "user", "content": text}]}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(self.wait_s * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self.endpoint, data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                if isinstance(content, str) and content.strip():
                    return content
                reason = "it answers with no text"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in AGAIN:
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        hint = f" A key is read from the environment variable {KEY}." if "401" in reason else ""
        raise JudgeSilentError(f"the judge {self.endpoint} ({self.model}) does not answer: {reason}.{hint}")

    def rate(self, text: str) -> tuple[str, list[float]]:
        """Return a review and its two ratings; none where it says none, asked twice."""
        review = ""
        for _ in range(2):
            review = self.reply_to(text)
            if ratings := ratings_in(review):
                return review, ratings
        return review, []


def ratings_in(review: str) -> list[float]:
    """Return the two numbers that a review begins with, none where its first line has fewer."""
    first = review.strip().split("\n")[0].replace(",", " ").replace(";", " ")
    numbers = [float(number) for number in NUMBER.findall(first)[:2]]
    return numbers if len(numbers) == 2 else []


def prompt_for(sample: Sample, answer: str, task: str) -> str:
    """Return what the judge is asked: description, question, both answers, and what it is to do."""
    caption = sample.fields["caption"]
    parts = {
        "Context": "\n".join(map(str, caption)) if isinstance(caption, list) else str(caption),
        "Question": text_of(sample.messages[-1]),
    }
    text = "".join(f"[{name}]\n{passage}\n\n" for name, passage in parts.items())
    for number, passage in ((1, str(sample.fields["reference"])), (2, answer)):
        text += f"[Assistant {number}]\n{passage}\n\n[End of Assistant {number}]\n\n"
    return f"{text}[System]\n{task}\n\n"


@dataclass(frozen=True)
class Ratings:
    """What a judge said of a model's answers."""

    pairs: tuple[tuple[float, ...], ...]  # for each question the reference's rating and the model's; () for none
    silent: str | None = None  # why the judge stopped answering

    def values(self) -> tuple[float, ...]:
        """Return the model's ratings, from 0 to 1."""
        return tuple(min(1.0, max(0.0, pair[1] / LARGEST)) if pair else 0.0 for pair in self.pairs)

    def figures(self, samples: Sequence[Sample]) -> Figures:
        """Return the model's mean rating as a share of the reference's, of all and by category."""
        rated = [number for number, pair in enumerate(self.pairs) if pair]
        figures = {"relative score": self._relative(rated)} if rated else {}
        for category, numbers in by_category(samples).items():
            if category != "None" and (of_category := [n for n in numbers if self.pairs[n]]):
                figures[f"relative score ({category})"] = self._relative(of_category)
        return figures | {"without a rating": 1 - len(rated) / len(self.pairs)}

    def _relative(self, numbers: Sequence[int]) -> float:
        reference, model = (sum(self.pairs[n][place] for n in numbers) for place in (0, 1))
        return model / reference if reference else 0.0


def rate_all(
    client: JudgeClient,
    samples: Sequence[Sample],
    answers: Sequence[str],
    kept: ResumableLines,
    progress: Callable[..., Iterable[Any]],
) -> Ratings:
    """Return the ratings of all answers. A judge that stops answering costs nothing that it has said."""
    texts = [prompt_for(sample, answer, client.task) for sample, answer in zip(samples, answers, strict=True)]
    parts = [client.endpoint, client.model, texts]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    entries = kept.entries(fingerprint)
    todo = [number for number in range(len(texts)) if number not in entries]
    silent = None
    for number in progress(todo, f"{client.model} judges", len(todo)):
        try:
            review, ratings = client.rate(texts[number])
        except JudgeSilentError as error:
            silent = f"{str(error).removesuffix('.')}; {len(entries)} of {len(texts)} answers are rated."
            break
        entries[number] = {"review": review, "ratings": ratings}
        kept.add(fingerprint, {number: entries[number]})
    pairs = tuple(tuple(entries[n]["ratings"]) if n in entries else () for n in range(len(texts)))
    return Ratings(pairs, silent)


def ratings_file(predictions: Path | None) -> ResumableLines:
    """Return the file of ratings that lies beside the answers. Raises InputError where there is none for those."""
    from ...data.resumable import ResumableLines

    if predictions is None:
        raise InputError(
            "a judge takes long and may stop answering: give --predictions FILE.jsonl, which keeps the answers, and "
            "beside it what the judge says of them."
        )
    return ResumableLines(
        predictions.with_name(f"{predictions.stem}.ratings.jsonl"), RATING_FIELDS, "rating of a judge"
    )
