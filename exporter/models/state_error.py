"""The error of the states that the head reads: little noise, and it says what folds can make up for.

Every token tells something of a change, where the divergence hangs on the few answers that go wrong. But most tokens
are of the picture, and nothing is read off behind them: a mean over all tokens forgives what hurts the answers. So each
kind of tokens has a mean of its own, and the geometric mean of these counts: no kind outweighs another one, however
many tokens it has and however large its error is. Without a fold all three kinds count. Where a fold has made up for
what it could, the picture's tokens say nothing more (examples/results.md has what was compared).

Shapes: B samples, S tokens, N tokens of one kind, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..probe.stack import final_norm
from .divergence import KINDS, StateErrors


def kinds_of(batch: Batch) -> dict[str, Tensor]:
    """Return which tokens are of which kind, each [B, S]: of the picture, of the question, and where an answer is said.

    The last are the tokens behind which one of the answer follows. Prompts alone have none.
    """
    answers = torch.zeros_like(batch.is_text)
    if batch.is_answer is not None:
        answers[:, :-1] = batch.is_answer[:, 1:]
    return {"visual": batch.is_visual & ~answers, "text": batch.is_text & ~answers, "answers": answers}


def head_states(model: Any, output: Tensor, kinds: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what the head reads of each kind's tokens, one [N, D] a kind, of the last layer's output [B, S, D]."""
    with torch.inference_mode():
        return [final_norm(model)(output[kinds[name].to(output.device)]) for name in KINDS]


def errors_of(original: Sequence[Tensor], changed: Sequence[Tensor]) -> StateErrors:
    """Return the errors of states [N, D], one tensor a kind."""
    with torch.inference_mode():
        sums = [
            float(((after.float() - before.float()).square().sum(-1) / before.float().square().sum(-1)).sum())
            for before, after in zip(original, changed, strict=True)
        ]
    return StateErrors(tuple(sums), tuple(len(states) for states in original))
