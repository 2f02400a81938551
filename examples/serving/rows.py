"""What `against_vllm.py` compares: a folder, the questions on it, and what both sides answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ask_vllm import NEW_TOKENS
from environment import BUILD
from in_transformers import ask_transformers, prompts
from tiny_folders import Asked

# Tokens of a picture see each other both ways in transformers, and only earlier ones on vLLM's CPU: answers differ.
# Those of transformers with the same causal attention have to be equal.
CAUSAL = ("paligemma", "gemma3")


@dataclass
class Row:
    """One engine and what both sides answered."""

    kind: str  # plain, served, trained
    name: str
    folder: Path
    questions: list[Asked]
    options: dict[str, Any] = field(default_factory=dict)
    served: bool = False  # it has a serving router
    times: int = 1  # so often all questions are put: from the second time on, vLLM has them in its caches
    new_tokens: int = NEW_TOKENS
    default: dict[str, Any] = field(default_factory=dict)  # the budget that the engine was started with
    refused: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # part of the sentence, request
    texts: list[str] = field(default_factory=list)
    torch: list[dict[str, Any]] = field(default_factory=list)
    causal: list[dict[str, Any]] = field(default_factory=list)  # transformers' too, where the type is one of CAUSAL
    vllm: dict[str, Any] = field(default_factory=dict)

    def engine(self) -> dict[str, Any]:
        """Return what vLLM is to do: all questions at once, all again, and what has to be refused, one by one."""
        self.texts = prompts(self.folder, self.questions)
        requests = [
            {"prompt": text, "images": question.files, "kwargs": question.budget}
            for text, question in zip(self.texts, self.questions, strict=True)
        ]
        limit = {"limit_mm_per_prompt": {"image": max((len(q.files) for q in self.questions), default=1) or 1}}
        return {
            "name": self.name,
            "folder": str(self.folder),
            "options": {**limit, **self.options},
            "new_tokens": self.new_tokens,
            "rounds": [requests] * self.times + [[request] for _, request in self.refused],
        }

    def ask_transformers(self) -> None:
        questions = [
            Asked(q.chat, q.images, q.files, q.budget or self.default) if self.served else q for q in self.questions
        ]
        self.torch = ask_transformers(self.folder, questions, self.served, self.new_tokens)
        if self.name in CAUSAL:
            self.causal = ask_transformers(self.folder, questions, self.served, self.new_tokens, causal=True)

    def equal(self, time: int, part: str, causal: bool = False) -> int:
        """Count the prompts or the answers that are the same on both sides."""
        if "start" in self.vllm:
            return 0
        torch = self.causal if causal else self.torch
        return sum(a.get(part) == b.get(part) for a, b in zip(self.vllm["rounds"][time], torch, strict=False))

    def answered(self) -> list[str]:
        """Return what had to be refused and was not, or by another sentence."""
        if not self.refused or "start" in self.vllm:
            return []
        rounds = self.vllm["rounds"][-len(self.refused) :]
        wrong = []
        for (sentence, _), (answer, *_) in zip(self.refused, rounds, strict=True):
            if sentence not in answer.get("error", ""):
                wrong.append(f"{self.name}: {sentence!r} was wanted, and it said {answer}")
        return wrong

    @property
    def holds(self) -> bool:
        number = len(self.questions)
        if "start" in self.vllm or self.answered():
            return False
        if self.name in CAUSAL:  # where both are equal, this difference is gone and the document has to say so
            alike = self.equal(0, "prompt") == self.equal(0, "tokens", causal=True) == number
            return alike and self.equal(0, "tokens") < number
        return all(self.equal(time, "tokens") == number for time in range(self.times))

    def lines(self) -> list[str]:
        """Return what is said of it, as lines of the table of its kind."""
        number = len(self.questions)
        if "start" in self.vllm:
            return [f"| {self.name} | does not start: {shown(self.vllm['start'])} | – |"]
        if self.kind == "plain":
            counts = [f"{self.equal(0, part)} of {number}" for part in ("prompt", "tokens")]
            if self.name in CAUSAL:
                counts[1] += f"; {self.equal(0, 'tokens', causal=True)} of {number} with causal attention"
        else:
            counts = [f"{self.equal(time, 'tokens')} of {number}" for time in (0, 1)]
            counts.append(str(sum(answer.get("cached", 0) for answer in self.vllm["rounds"][1])))
        return [f"| {self.name} | {' | '.join(counts)} |"]


def shown(sentence: str) -> str:
    """Return a sentence without the paths of this run."""
    words = sentence.partition(": ")[2] or sentence
    return " ".join("DIR" if word.startswith(str(BUILD)) else word for word in words.split())
