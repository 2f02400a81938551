"""Greedy answers by fewer passes: each pass checks several guessed tokens of every sequence, and says one more.

What is guessed right is what the model would have said: the longest beginning of a guess that equals the most likely
tokens is kept, so that answers are those of one token a pass. Behind a pass of several tokens logits differ in their
last bits from those of a pass of one, as they do with another batch size: only a token that is tied with another one
within rounding can be another.

`generate` prepares inputs, positions and cache as for any answer. Sequences keep different numbers of guesses: each
sequence's wrong ones are put in front of it, where they are padding like that of a shorter prompt. So the cache needs
no other shape, a sliding window sees what it always sees, and positions go on from the last right token.

Shapes: B sequences, R rows of a pass (one a guess), S tokens so far, K guessed tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..clean_room import extend
from ..families import OWN_FAMILIES, visual_token_ids
from .drafts import Draft

ALIGNED = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")  # a value for each token so far
NOT_OF_THE_MODEL = (  # what `generate` hands to a way of decoding beside what goes to the model
    "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
    "assistant_model", "tokenizer", "assistant_tokenizer",
)  # fmt: skip
Kept = Callable[[int, Tensor], object]  # takes a sequence's number and the logits [taken, V] of tokens that it says


def may_draft(config: Any) -> bool:
    """Tell whether a pass of several tokens can be taken back: not where a layer's state is no list of tokens.

    Linear attention sums up what it saw, cross attention keeps the image's tokens; such models say one token a pass.
    So do those that run by a modeling file of this package, of which no test shows that several come to the same.
    """
    if config.model_type in OWN_FAMILIES:
        return False
    text = config.get_text_config()
    if getattr(text, "cross_attention_layers", None) or getattr(text, "num_kv_shared_layers", 0):
        return False
    layers = DynamicCache(config=text).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def drafted(
    model: Any,
    inputs: dict[str, Tensor],
    drafts: Sequence[Draft],
    settings: Any,
    *,
    width: int = 1,
    never: Sequence[int] = (),
    kept: Kept = lambda number, logits: None,
) -> None:
    """Let the model answer; each of the drafts, one a sequence, takes what is said.

    Args:
        settings: greedy ones (clean_room.greedy).
        width: guesses at each sequence that a pass checks side by side, behind the first pass; each has a cache.
        never: tokens that are not to be said, whatever the logits.
        kept: called with the logits of what is said.
    """
    guesses = _guesses(model, [draft.guess() for draft in drafts], inputs["input_ids"])  # [B, K]
    begun = extend(inputs, guesses, torch.ones_like(guesses, dtype=torch.bool), model.config.model_type)

    def decoding(model: Any, input_ids: Tensor, **handed_over: Any) -> Tensor:
        keywords = {name: value for name, value in handed_over.items() if name not in NOT_OF_THE_MODEL}
        passes = _Passes(model, input_ids, keywords, guessed=guesses.shape[1])
        passes.follow_cache()
        rows = [[number] for number in range(len(drafts))]  # of each draft
        while not all(draft.done for draft in drafts):
            logits = passes.run()  # [R, K + 1, V]
            likeliest = _most_likely(logits, never)
            right = passes.guessed_right(likeliest)
            best = [max(some, key=lambda row: right[row]) for some in rows]
            for number, (draft, row) in enumerate(zip(drafts, best, strict=True)):
                if taken := draft.take(likeliest[row, : right[row] + 1].tolist()):
                    kept(number, logits[row, :taken])
            ways = [draft.guesses(width) for draft in drafts]
            chosen = [row for row, some in zip(best, ways, strict=True) for _ in some]
            passes.go_on_from(chosen, right)
            more = torch.stack([likeliest[row, right[row]] for row in chosen])[:, None]  # [R, 1]
            passes.append(torch.cat([more, _guesses(model, [guess for some in ways for guess in some], more)], 1))
            numbered = iter(range(len(chosen)))
            rows = [[next(numbered) for _ in some] for some in ways]
        return input_ids

    model.generate(**begun, generation_config=settings, custom_generate=decoding)


@dataclass
class _Passes:
    """Several sequences with their guesses, and what `generate` hands on from a pass to the next."""

    model: Any
    ids: Tensor  # [R, S], the last K of them guessed
    keywords: dict[str, Any]
    guessed: int  # K
    first: bool = True

    def __post_init__(self) -> None:
        self.rows = list(range(len(self.ids)))  # that the rows of the next pass go on from
        self.by = [0] * len(self.ids)  # tokens by which each of them moves to the right, over its wrong guesses

    def follow_cache(self) -> None:
        """Let the layers of the cache move their tokens as these do."""
        for value in self.keywords.values():
            if isinstance(value, DynamicCache):
                for layer in value.layers:
                    _move_before_update(layer, self)

    def run(self) -> Tensor:
        """Return the logits of a pass behind the last token that is known, and behind each guess: [R, K + 1, V]."""
        length = None if self.first else self.guessed + 1
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=length, is_first_iteration=self.first, **self.keywords
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = self.guessed + 1
        self.first = False
        logits: Tensor = self.model(**inputs, return_dict=True).logits
        return logits[:, -self.guessed - 1 :].float()

    def guessed_right(self, likeliest: Tensor) -> list[int]:
        """Return how many of each row's guesses are the most likely tokens [R, K + 1], up to the first other."""
        same = likeliest[:, :-1] == self.ids[:, self.ids.shape[1] - self.guessed :]  # [R, K]
        counts: list[int] = same.int().cumprod(1).sum(1).tolist()
        return counts

    def go_on_from(self, rows: Sequence[int], right: Sequence[int]) -> None:
        """Take rows of this pass, each as often as it stands there, as those of the next one.

        Each moves to the right, over its wrong guesses, which become padding in front of it.
        """
        self.rows, self.by = list(rows), [self.guessed - right[row] for row in rows]
        mask = self._mask().clone()
        for row, count in enumerate(right):
            mask[row, mask.shape[1] - self.guessed + count :] = 0
        self.keywords["attention_mask"] = mask
        so_far = len(self.ids)
        self.ids = self.moved(self.ids, batch_dim=-2, dim=-1)
        for name in ALIGNED:
            if (value := self.keywords.get(name)) is not None:
                value = value.expand(*value.shape[:-2], so_far, -1)  # positions may be one row for all
                self.keywords[name] = self.moved(value, batch_dim=-2, dim=-1)

    def moved(self, values: Tensor, *, batch_dim: int, dim: int) -> Tensor:
        """Return what the rows of the next pass have of a tensor that has it for those of this one."""
        if not any(self.by) and self.rows == list(range(values.shape[batch_dim])):
            return values
        of_rows = values.unbind(batch_dim)
        return torch.stack([of_rows[row].roll(by, dim) for row, by in zip(self.rows, self.by, strict=True)], batch_dim)

    def _mask(self) -> Tensor:
        """Return which tokens so far are real [R, S]: `generate` may leave that out where all are."""
        mask = self.keywords.get("attention_mask")
        return torch.ones_like(self.ids) if mask is None else mask

    def append(self, new: Tensor) -> None:
        """Append the next token of each sequence and what is guessed behind it, [R, K + 1]."""
        positions = self.keywords.get("position_ids")
        so_far = {**self.keywords, "input_ids": self.ids, "attention_mask": self._mask()}
        grown = extend(so_far, new, torch.ones_like(new, dtype=torch.bool), self.model.config.model_type)
        if positions is not None:  # [R, S], or [3 or 4, R, S]
            more = torch.arange(1, new.shape[1] + 1, device=positions.device) + positions[..., -1:]
            grown["position_ids"] = torch.cat([positions, more.to(positions.dtype)], -1)
        self.ids = grown.pop("input_ids")
        self.keywords, self.guessed = grown, new.shape[1] - 1


def _move_before_update(layer: Any, passes: _Passes) -> None:
    """Let a layer of a cache move its tokens before it takes those of the next pass.

    It does so then and no earlier because its memory may be emptied meanwhile. One with a sliding window keeps what a
    pass has seen until it is known which tokens stay.
    """
    update = layer.update
    window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None

    def moving(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer.is_initialized:
            for name in ("keys", "values"):
                moved = passes.moved(getattr(layer, name), batch_dim=0, dim=-2)
                setattr(layer, name, moved if window is None else moved[:, :, -window + 1 :])
        keys, values = update(key_states, value_states, *args, **kwargs)
        if window is not None:
            layer.keys, layer.values = keys, values
        return keys, values

    layer.update = moving


def _most_likely(logits: Tensor, never: Sequence[int]) -> Tensor:
    if never:
        logits = logits.index_fill(-1, torch.tensor(never, device=logits.device), -torch.inf)
    return logits.argmax(-1)


def _guesses(model: Any, guesses: Sequence[list[int]], like: Tensor) -> Tensor:
    """Return guesses as one tensor [R, K]; a short one is filled up, which is a guess like any other.

    A guess ends before a token that stands for a part of an image: where such tokens are, the model looks for images.
    """
    visual = visual_token_ids(model.config)
    guesses = [list(itertools.takewhile(lambda token: token not in visual, guess)) for guess in guesses]
    longest = max(map(len, guesses))
    filler = next(token for token in range(len(visual) + 1) if token not in visual)
    rows = [[*guess, *[filler] * (longest - len(guess))] for guess in guesses]
    return torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(len(guesses), longest)
