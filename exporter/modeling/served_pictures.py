"""The rows of pictures, taken apart and put together as a stock model of transformers has them.

Shapes: B sequences, S tokens of a prompt, P pictures or tiles, N rows of a picture, n of them that stay, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def split_rows(features: Any, pictured: Tensor) -> list[Tensor]:
    """Return the rows of each picture, [N, D] each.

    Args:
        features: one tensor a picture; or one for all tiles of all pictures (InternVL's), whose pictures are told
            apart by the text between their placeholders.
        pictured: [B, S] True at placeholders.
    """
    if not isinstance(features, Tensor):
        return list(features)
    rows = features.flatten(0, -2)
    starts = pictured & ~F.pad(pictured[:, :-1], (1, 0))
    runs = starts.long().cumsum(1) + starts.sum(1).cumsum(0)[:, None] - starts.sum(1)[:, None]  # number of the run
    lengths = torch.bincount(runs[pictured] - 1).tolist()
    return list(torch.split(rows, lengths)) if sum(lengths) == len(rows) else [rows]


def stacked(pictures: list[Tensor], kept: Tensor) -> Tensor:
    """Return all rows as one tensor [P, n, D]: one entry a sequence where all have as many, which beams can repeat."""
    rows = torch.cat(pictures)
    counts = set(kept.sum(1).tolist()) - {0}
    return rows.reshape(-1, counts.pop(), rows.shape[1]) if len(counts) == 1 else rows[None]


def check_copies(kwargs: dict[str, Any], settings: Any) -> None:
    """Refuse beams and several answers where the rows of a batch cannot be repeated sequence by sequence."""
    copies = max(
        kwargs.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    )
    rows = ((kwargs.get("mm_encoder_outputs") or {}).get("image") or {}).get("pooler_output")
    if copies > 1 and isinstance(rows, Tensor) and len(rows) == 1 and len(kwargs["input_ids"]) > 1:
        raise ValueError(
            f"{copies} beams or answers of a batch whose pictures keep different numbers of tokens: ask for one "
            "question at a time, or pass a count as keep_visual_tokens."
        )
