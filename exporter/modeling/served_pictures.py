"""The rows of pictures, taken apart and put together as a stock model of transformers has them.

Shapes: B sequences, S tokens of a prompt, W of the shorter one, P pictures or tiles, N rows of a picture, n of them
that stay, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .served_layout import Layout
from .served_places import positions_in_axes


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


@dataclass(frozen=True)
class Shortened:
    """Where a picture stands in the caller's prompts, and how many of its rows stay."""

    sequence: int
    column: int  # of its first placeholder
    stays: int


def fewer_rows(
    pictured: Tensor, outputs: Any, choose: Callable[[int, Tensor, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Any, list[Shortened]]:
    """Return which tokens stay, [B, S], the pictures' outputs with the rows that stay, and where the pictures stand.

    Args:
        pictured: [B, S] True at placeholders.
        outputs: of the stock model's `get_image_features`, changed here.
        choose: gives the rows that stay, [n, D], and their numbers, [n], from the number of a picture, its rows and the
            number of its sequence.
    """
    places = pictured.nonzero()  # [M, 2], in the order in which rows are scattered
    pictures = split_rows(outputs.pooler_output, pictured)
    if sum(map(len, pictures)) != len(places):
        raise ValueError(
            f"the prompt has {len(places)} placeholders of pictures, and the pictures give "
            f"{sum(map(len, pictures))} rows: process both together."
        )
    keep, chosen, kept_rows, shortened, start = ~pictured, [], [], [], 0
    for number, rows in enumerate(pictures):
        here = places[start : start + len(rows)]
        start += len(rows)
        stays, index = choose(number, rows, int(here[0, 0]))
        sequence, column = here[index.to(here.device)].unbind(1)
        keep[sequence, column] = True
        shortened.append(Shortened(*here[0].tolist(), stays=len(index)))
        chosen.append(stays)
        kept_rows.append(index)
    deepstack = getattr(outputs, "deepstack_features", None)
    if deepstack is not None:
        outputs.deepstack_features = [
            [rows[index.to(rows.device)] for rows, index in zip(level, kept_rows, strict=True)] for level in deepstack
        ]
    is_tensor = isinstance(outputs.pooler_output, Tensor)
    outputs.pooler_output = stacked(chosen, keep & pictured) if is_tensor else chosen
    return keep, outputs, shortened


def positions_in_places(
    layout: Layout, stays: Tensor, pictures: Sequence[Shortened], places: Sequence[tuple[Tensor, int]]
) -> Tensor:
    """Return positions of the shorter prompts that are those of the whole ones, [3, B, W]; 0 at padding.

    Args:
        stays: [B, S] False at placeholders whose rows leave, and at padding.
        places: what `picture_places` says of each picture.
    """
    visible = layout.visible
    positions = torch.zeros(3, *visible.shape, dtype=torch.long, device=visible.device)
    for sequence, seen in enumerate(visible):
        placed = [
            (int(stays[sequence, : picture.column].sum()), where)
            for picture, where in zip(pictures, places, strict=True)
            if picture.sequence == sequence
        ]
        positions[:, sequence, seen] = positions_in_axes(int(seen.sum()), placed).to(positions.device)
    return positions


def stacked(pictures: list[Tensor], kept: Tensor) -> Tensor:
    """Return all rows as one tensor [P, n, D]: one entry a sequence where all have as many, which beams can repeat."""
    rows = torch.cat(pictures)
    counts = set(kept.sum(1).tolist()) - {0}
    return rows.reshape(-1, counts.pop(), rows.shape[1]) if len(counts) == 1 else rows[None]


def refuse_late_pictures(named: dict[str, Any], budget: int | float | None) -> None:
    """Refuse pictures behind a cache that was filled without a budget: the plain model would see all of them."""
    if budget is not None and (named.get("pixel_values") is not None or named.get("mm_encoder_outputs")):
        raise ValueError(
            "a picture that comes behind a cache is not made shorter: begin with a new cache, or pass preset='off'."
        )


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
