"""Picks the next token of each sequence, as transformers does with the same settings.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .prepare import Array, InputError

# Settings of a generation_config.json that would change the answer and are not implemented: value that changes nothing.
NOT_DONE = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Greedy unless do_sample."""

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0

    @classmethod
    def of(cls, defaults: dict[str, Any], chosen: dict[str, Any], pad_token_id: int) -> Sampling:
        """Return what the folder's generation_config.json says, and what the caller says instead."""
        settings = {"pad_token_id": pad_token_id} | {k: v for k, v in defaults.items() if v is not None} | chosen
        for name, harmless in NOT_DONE.items():
            if settings.get(name) not in (None, harmless):
                raise InputError(
                    f"generation setting {name}={settings[name]} is not implemented here: pass {name}={harmless}."
                )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(chosen) - known - set(NOT_DONE)):
            raise InputError(f"generate takes no '{unknown[0]}'; it takes: {', '.join(sorted(known))}.")
        end = settings.get("eos_token_id", ())
        settings["eos_token_id"] = (end,) if isinstance(end, int) else tuple(end)
        return cls(**{name: value for name, value in settings.items() if name in known})

    def pick(self, logits: Array, seen: Array, random: np.random.Generator) -> Array:
        """Choose the next tokens [B] from logits [B, V] and the tokens so far [B, S]."""
        if self.repetition_penalty != 1.0:
            logits = logits.copy()
            scores = np.take_along_axis(logits, seen, 1)
            penalty = self.repetition_penalty
            np.put_along_axis(logits, seen, np.where(scores < 0, scores * penalty, scores / penalty), 1)
        if not self.do_sample:
            return logits.argmax(-1)
        return np.array([random.choice(len(p), p=p) for p in self._probabilities(logits.astype(np.float64))])

    def _probabilities(self, logits: Array) -> Array:
        """Return probabilities [B, V] of logits: temperature, then the top_k tokens, then top_p of the mass."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = np.partition(logits, -self.top_k, -1)[:, [-self.top_k]]
            logits = np.where(logits < least, -np.inf, logits)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = weights / weights.sum(-1, keepdims=True)
        if self.top_p < 1:
            order = np.argsort(-probabilities, -1, kind="stable")
            ranked = np.take_along_axis(probabilities, order, -1)
            before = ranked.cumsum(-1) - ranked  # mass of the likelier ones: the first always stays
            kept = np.where(before < self.top_p, ranked, 0)
            np.put_along_axis(probabilities, order, kept, -1)
            probabilities /= probabilities.sum(-1, keepdims=True)
        return probabilities
