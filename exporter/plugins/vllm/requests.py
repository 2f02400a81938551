"""What a request of vLLM asks of a serving router, by its `mm_processor_kwargs`, and a folder's settings.

    {"keep_visual_tokens": 0.25}                       a share of each picture's rows, or a count
    {"preset": "serve-fast"}                           the same by name; "off" is the plain model
    {"preset": "serve-fast", "question_ids": [5, 9]}   chosen by the question, too, where the router was trained so

Needs neither vLLM nor torch loaded before: what is checked here is checked without an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.modeling.served_router import ENTRY, OFF, ServingSettings

KEYS = ("keep_visual_tokens", "preset", "question_ids")  # of mm_processor_kwargs


@dataclass(frozen=True)
class ServedRequest:
    """The budget of a request and its question; `others` is what vLLM's own processor gets."""

    budget: int | float | None  # None: the plain model
    question_ids: tuple[int, ...]
    others: dict[str, Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], settings: ServingSettings, vocabulary: int) -> ServedRequest:
        """Read and check a request. Raises ValueError with one sentence.

        Args:
            vocabulary: the size of the model's table of token embeddings.
        """
        budget = settings.budget(arguments.get("preset"), arguments.get("keep_visual_tokens"))
        question = _checked_question(arguments.get("question_ids"), settings, vocabulary)
        return cls(budget, question if budget is not None else (), without_keys(arguments))

    def normalised(self) -> dict[str, Any]:
        """Return mm_processor_kwargs that are the same for the same request, however it was put.

        vLLM keeps encoded pictures and prefixes by them.
        """
        if self.budget is None:
            return dict(self.others)
        question = {"question_ids": list(self.question_ids)} if self.question_ids else {}
        return {**self.others, "keep_visual_tokens": self.budget, **question}


def _checked_question(ids: Any, settings: ServingSettings, vocabulary: int) -> tuple[int, ...]:
    if ids is None or (isinstance(ids, (list, tuple)) and not ids):
        return ()
    if not settings.question_aware:
        raise ValueError(
            "this serving router was trained without questions and would not use question_ids: leave them out, or "
            "train one with questions."
        )
    if not isinstance(ids, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"question_ids={ids!r} is no list of token ids: give the ids of the question's text.")
    if wrong := [i for i in ids if not 0 <= i < vocabulary]:
        raise ValueError(f"question_ids has {wrong[0]}: this model's token ids go from 0 to {vocabulary - 1}.")
    return tuple(ids)


def asked_for(arguments: Mapping[str, Any]) -> str | None:
    """Return the first of a request's arguments that only a serving router understands; "off" asks for none."""
    if arguments.get("preset") == OFF and arguments.get("keep_visual_tokens") is None:
        return None
    return next((key for key in KEYS if arguments.get(key) is not None), None)


def without_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's arguments for transformers' processor."""
    return {key: value for key, value in arguments.items() if key not in KEYS}


def settings_of(config: Any, in_folder: Mapping[str, Any], folder: str) -> ServingSettings | None:
    """Return the settings of a model that vLLM opens; None for a folder without a serving router.

    Args:
        config: the configuration as vLLM has it, with `--hf-overrides` in place of a whole entry of config.json.
        in_folder: config.json itself: settings that the overrides leave out are read from it.
        folder: its path or name, for messages.
    """
    entry = getattr(config, ENTRY, None)
    if entry is None:
        return None
    on_disk = in_folder.get(ENTRY)
    if on_disk is None:
        raise ValueError(
            f"--hf-overrides names {ENTRY}, and {folder} has no serving router: train one with `lvlm-exporter route "
            "--serve`, or leave the override out."
        )
    if not isinstance(entry, Mapping) or not isinstance(on_disk, Mapping):
        raise ValueError(f"{ENTRY} of {folder} is no table of settings: {entry!r}.")
    setattr(config, ENTRY, {**on_disk, **entry})
    return ServingSettings.of(config)
