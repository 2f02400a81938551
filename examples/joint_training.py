"""The parts that training scripts of the examples share: packed questions, throw-away heads, optimisers, checkpoints.

Several questions share the tokens of one picture through a block mask: each sees the picture and itself, at the
positions that it would have alone. Throw-away heads name what each visual token shows and where it stands, and where
the things are that a question's words mean: without them a small model learns to compare places last.

Shapes: B pictures (one row each), S tokens, V visual tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NOWHERE = (-100, -100)  # of a word that means no thing of the picture
Report = Callable[[str], None]


@dataclass(frozen=True)
class PackedQuestion:
    """A question and its answer as tokens."""

    ids: list[int]
    answer_start: int  # index in ids; the answer goes on to the end, its end token included
    places: list[tuple[int, int]]  # (x, y) bin of the thing that a token means, or NOWHERE


def word_places(ids: Sequence[int], mentions: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Return the place of each token, given (token, x, y) of those that mean a thing, in order."""
    left = list(reversed(mentions))
    places = []
    for token in ids:
        named = bool(left) and token == left[-1][0]
        _, x, y = left.pop() if named else (token, *NOWHERE)
        places.append((x, y))
    return places


def pack_rows(
    prefixes: Sequence[list[int]], questions: Sequence[Sequence[PackedQuestion]], pad: int
) -> dict[str, torch.Tensor]:
    """Put each picture's prefix and its questions into one row, padded on the right.

    Returns:
        input_ids, segment (0 for the prefix, then 1, 2 … by question, -1 for padding), position (as if each question
        stood alone behind the prefix) and target (-100 where nothing is to be said), all [B, S]; places [B, S, 2].
    """
    rows = []
    for prefix, asked in zip(prefixes, questions, strict=True):
        size = len(prefix)
        row: list[list[Any]] = [prefix[:], [0] * size, list(range(size)), [-100] * size, [NOWHERE] * size]
        for number, question in enumerate(asked, 1):
            length, start = len(question.ids), question.answer_start
            row[0] += question.ids
            row[1] += [number] * length
            row[2] += range(size, size + length)
            row[3] += [-100] * (start - 1) + question.ids[start:] + [-100]
            row[4] += question.places
        rows.append(row)
    longest = max(len(row[0]) for row in rows)
    names = ("input_ids", "segment", "position", "target", "places")
    fill = (pad, -1, 0, -100, NOWHERE)
    return {
        name: torch.tensor([row[k] + [fill[k]] * (longest - len(row[k])) for row in rows])
        for k, name in enumerate(names)
    }


def visible(segment: torch.Tensor) -> torch.Tensor:
    """Return which tokens each token sees: those before it in the prefix and in its own question. [B, S, S] bool"""
    length = segment.shape[1]
    same = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return same & torch.ones(length, length, dtype=torch.bool).tril() | torch.eye(length, dtype=torch.bool)


def additive(mask: torch.Tensor) -> torch.Tensor:
    """Return what is added to attention logits: [B, S, S] bool as [B, 1, S, S] float."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min / 2)[:, None]


class Heads(nn.Module):
    """Throw-away heads: what a visual token shows and where it stands, and where the thing is that a word means."""

    def __init__(self, hidden_size: int, sizes: Mapping[str, int], bins: int):
        """Make heads of these numbers of classes; the first one's class 0 is the ground."""
        super().__init__()
        self.named = nn.ModuleDict({name: nn.Linear(hidden_size, size) for name, size in sizes.items()})
        self.mentioned = nn.ModuleDict({name: nn.Linear(hidden_size, bins) for name in ("x", "y")})

    def named_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [V, D], labels [V, heads]; the ground counts a third, since most patches show nothing else."""
        weight = torch.where(labels[:, 0] == 0, 0.3, 1.0)
        total = hidden.new_zeros((), dtype=torch.float32)
        for index, head in enumerate(self.named.values()):
            each = F.cross_entropy(head(hidden).float(), labels[:, index], ignore_index=-100, reduction="none")
            total = total + (each * weight).sum() / weight.sum()
        return total / len(self.named)

    def mentioned_loss(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """hidden [M, D], places [M, 2]"""
        heads = self.mentioned.values()
        losses = [F.cross_entropy(head(hidden).float(), places[:, k]) for k, head in enumerate(heads)]
        return sum(losses, hidden.new_zeros(())) / len(losses)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Of the highest learning rate: a warm-up, level, and down by a cosine in the second half."""
    down = max(0.0, (step / steps - 0.5) / 0.5)
    return min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, down))))


def muon_and_adamw(matrices: list[nn.Parameter], groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    """Return Muon for matrices, which gets to a loss in fewer steps, and AdamW for everything else."""
    adamw = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    return [adamw, torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")]


def schedules(optimizers: Sequence[torch.optim.Optimizer], steps: int, factor: float = 1.0) -> list[Any]:
    """Return a schedule of `rate`, times a factor, for each optimiser."""
    return [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor * rate(step, steps))
        for optimizer in optimizers
    ]


def save_state(path: Path, step: int, modules: Mapping[str, nn.Module], stateful: Sequence[Any]) -> None:
    """Write a checkpoint of training; it appears whole or not at all."""
    state: dict[str, Any] = {name: module.state_dict() for name, module in modules.items()}
    state |= {"optimizers": [each.state_dict() for each in stateful], "step": step}
    staged = path.with_suffix(".writing")
    torch.save(state, staged)
    staged.replace(path)


def load_state(path: Path, modules: Mapping[str, nn.Module], stateful: Sequence[Any]) -> int:
    """Go on from a checkpoint of training: load it, return its step; 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    for resumed, saved in zip(stateful, state["optimizers"], strict=True):
        resumed.load_state_dict(saved)
    return int(state["step"])
