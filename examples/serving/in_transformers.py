"""What transformers answers: the other side of `against_vllm.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ask_vllm import NEW_TOKENS
from tiny_folders import Asked


def ask_transformers(
    folder: Path,
    questions: Sequence[Asked],
    served: bool = False,
    new_tokens: int = NEW_TOKENS,
    causal: bool = False,
) -> list[dict[str, Any]]:
    """Return prompts and greedy answers as token ids, one question after the other.

    Args:
        served: with the folder's serving router, under each question's budget.
        causal: without the ids that tell which tokens are of a picture: no token then sees a later one.
    """
    from exporter.clean_room import encode, greedy_answers, load_processor

    model, processor = loaded(folder, served), load_processor(folder)
    answers = []
    with torch.no_grad():
        for question in questions:
            inputs = encode(processor, [question.chat], [question.images])
            if causal:
                del inputs["token_type_ids"]
            budget = dict(question.budget) if served else {}
            if "question_ids" in budget:
                budget["question_ids"] = [budget["question_ids"]]
            tokens = greedy_answers(model, inputs, new_tokens, **budget)
            answers.append({"prompt": inputs["input_ids"][0].tolist(), "tokens": tokens[0].tolist()})
    return answers


def loaded(folder: Path, served: bool) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not served:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    from exporter.modeling import modeling_served

    name = modeling_served.served_name(AutoConfig.from_pretrained(folder).model_type)
    return getattr(modeling_served, name).from_pretrained(folder, dtype=torch.float32).eval()


def prompts(folder: Path, questions: Sequence[Asked]) -> list[str]:
    """Return the prompts as texts, as vLLM is given them.

    It writes the begin token itself where the tokenizer does, and PaliGemma's picture.
    """
    from exporter.clean_room import load_processor, render

    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    texts = [render(processor, question.chat).removeprefix(bos) for question in questions]
    if "PaliGemma" in type(processor).__name__:
        texts = [text.replace(processor.image_token, "") for text in texts]
    return texts
