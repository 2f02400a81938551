"""The question alone, as a question-aware serving router reads it: the text of the last user turn, without template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.chats import text_of
from ...data.samples import Sample


def question_ids(samples: Sequence[Sample], processor: Any) -> list[list[int]]:
    """Return the ids of each sample's question, without special tokens."""
    texts = [text_of(next(turn for turn in reversed(sample.messages) if turn["role"] == "user")) for sample in samples]
    return [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
