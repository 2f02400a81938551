"""The shorter prompt that the decoder sees, and how it lies in the prompt that the caller knows.

Shapes: B sequences, S tokens of the caller's prompt, W of the shorter one, T of either with what came after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .served_places import served_positions


@dataclass(frozen=True)
class Layout:
    """Which token of the caller's prompt each token of the shorter one is."""

    columns: Tensor  # [B, W] column of the caller's prompt; -1 at padding
    length: int  # S
    positions: Tensor | None = None  # [3, B, W] in models that keep places; None: they run without gaps

    @classmethod
    def of(cls, keep: Tensor, visible: Tensor) -> Layout:
        """Lay out what stays, padded anew: on the left, or on the right if the caller's batch is padded there.

        Args:
            keep: [B, S] False at placeholders whose rows leave.
            visible: [B, S] False at padding.
        """
        stays = keep & visible
        counts = stays.sum(1).tolist()
        width, on_the_right = max(counts), not bool(visible[:, -1].all())
        columns = torch.full((len(keep), width), -1, device=keep.device)
        for sequence, number in enumerate(counts):
            place = slice(0, number) if on_the_right else slice(width - number, width)
            columns[sequence, place] = stays[sequence].nonzero()[:, 0]
        return cls(columns, keep.shape[1])

    @property
    def width(self) -> int:
        return self.columns.shape[1]

    @property
    def visible(self) -> Tensor:
        """Return [B, W] False at padding."""
        return self.columns >= 0

    def narrowed(self, tensor: Tensor, padding: int) -> Tensor:
        """Take what stays of [B, T], and all that came after the prompt: [B, W + T - S]."""
        columns = self.columns.to(tensor.device)
        prompt = tensor[:, : self.length].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, padding)
        return torch.cat([prompt, tensor[:, self.length :]], 1)

    def spread(self, states: Tensor) -> Tensor:
        """Put [B, W, ...] where it lies in the caller's prompt, [B, S, ...]; zeros in place of what left."""
        columns = self.columns.to(states.device)
        columns = columns.masked_fill(columns < 0, self.length)  # padding goes to a column that is cut off
        index = columns.reshape(*columns.shape, *[1] * (states.ndim - 2)).expand_as(states)
        wide = states.new_zeros(len(states), self.length + 1, *states.shape[2:])
        return wide.scatter(1, index, states)[:, : self.length]

    def ends_alike(self, number: int) -> bool:
        """Tell whether the last `number` tokens are the same ones in both prompts."""
        last = torch.arange(self.length - number, self.length, device=self.columns.device)
        return number <= self.width and bool((self.columns[:, self.width - number :] == last).all())

    def repeated(self, times: int) -> Layout:
        """Return the layout of a batch in which each sequence stands several times in a row."""
        if times == 1:
            return self
        positions = None if self.positions is None else self.positions.repeat_interleave(times, 1)
        return Layout(self.columns.repeat_interleave(times, 0), self.length, positions)

    def deltas(self) -> Tensor:
        """Return how much further the positions of later tokens are than their number in the prompt, [B, 1]."""
        counts = self.visible.sum(1, keepdim=True)
        if self.positions is None:
            return torch.zeros_like(counts)
        last: Tensor = self.positions.masked_fill(~self.visible, 0).amax((0, 2))
        return last[:, None] + 1 - counts

    def numbered(self, visible: Tensor, axes: int | None) -> Tensor:
        """Return the positions of the shorter prompt and all that came after it, [B, T], or [axes, B, T].

        Args:
            visible: [B, T] nonzero at tokens, zero at padding.
        """
        positions = served_positions(visible, axes)
        if self.positions is None:
            return positions
        later = positions[..., self.width :] + self.deltas().to(positions.device)
        return torch.cat([self.positions.to(positions.device), later], -1)


def layout_in(cache: Any) -> Layout | None:
    """Return the layout of the shorter prompt that a cache holds; None where it holds none, or was reset."""
    layout: Layout | None = getattr(cache, "served", None)
    if layout is not None and not cache.get_seq_length():
        cache.served = layout = None
    return layout


def in_callers_ids(args: tuple[Any, ...], named: dict[str, Any], ids: Tensor, layout: Layout) -> tuple[Any, ...]:
    """Give the caller's own logits processors and stopping criteria the ids that the caller knows.

    Args:
        args: of `generate`, from its second on; `named`: by name, changed here.
        ids: [B, T] that the caller gave, of which the first S are now W.
    """
    width, positional = layout.width + ids.shape[1] - layout.length, list(args)

    def whole(tokens: Tensor) -> Tensor:
        prompt = ids.to(tokens.device).repeat_interleave(len(tokens) // len(ids), 0)
        return torch.cat([prompt, tokens[:, width:]], 1)

    def processor(inner: Any) -> Any:
        return lambda tokens, scores: inner(whole(tokens), scores)

    def criterion(inner: Any) -> Any:
        return lambda tokens, scores, **more: inner(whole(tokens), scores, **more)

    for place, name, wrapped in ((1, "logits_processor", processor), (2, "stopping_criteria", criterion)):
        callers = positional[place] if len(positional) > place else named.get(name)
        if callers is None:
            continue
        kept = type(callers)([wrapped(member) for member in callers])
        if len(positional) > place:
            positional[place] = kept
        else:
            named[name] = kept
    return tuple(positional)


def question_rows(question_ids: Tensor | list[list[int]], embedding: torch.nn.Module, number: int) -> list[Tensor]:
    """Return the embedded tokens of each sequence's question, [Q, D] each.

    Args:
        question_ids: a list of ids for each sequence, or [B, Q] with negative numbers as padding.
        number: of sequences, B.
    """
    lists = question_ids.tolist() if isinstance(question_ids, Tensor) else question_ids
    if not isinstance(lists, list) or not all(isinstance(ids, list) for ids in lists) or len(lists) != number:
        raise ValueError(
            f"question_ids has to hold one list of token ids for each of the {number} sequences: [[17, 4], ...], or a "
            "tensor [B, Q] with -1 as padding."
        )
    device = next(embedding.parameters()).device
    return [embedding(torch.tensor([i for i in ids if i >= 0], dtype=torch.long, device=device)) for ids in lists]


def padded_questions(questions: list[list[int]]) -> Tensor:
    """Return [B, Q] ids of questions, -1 as padding."""
    longest = max(map(len, questions), default=0)
    return torch.stack(
        [F.pad(torch.tensor(ids, dtype=torch.long), (0, longest - len(ids)), value=-1) for ids in questions]
    )
