"""What every fold works from, and the one pass over the calibration data that measures what a gap has lost.

Shapes: B samples, S tokens, N counted tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..calibration import Batch
from ..capture import AttentionMeans, AttentionReducer, attention_means, on_module
from ..errors import InputError
from ..families import Decoder
from ..localize.tis import important
from ..moments import Moments
from ..plan import PruningPlan
from ..replay import trace, walk
from ..source import text_decoder

Folded = dict[tuple[int, str], Tensor]  # (old layer index, tensor name inside the layer) -> new tensor, source dtype


@dataclass(frozen=True)
class FoldJob:
    """A plan to be made up for, with the data and the weights to do it."""

    model: Any
    batches: Callable[[], Iterable[Batch]]
    plan: PruningPlan
    read: Callable[[int, str], Tensor | None]  # a layer's tensor by name, from disk; None where there is none
    decoder: Decoder
    multiplier: float = 1.0  # of what a block adds to the residual stream
    memo: dict[Any, GapMoments] = field(default_factory=dict)  # gaps measured before, for folds that share a model

    @property
    def gaps(self) -> dict[int, tuple[int, ...]]:
        """The kept layer before each run of dropped ones, and the run. A run that begins at layer 0 has none."""
        return {run[0] - 1: run for run in self.plan.runs if run[0] > 0}

    def refuse_post_norm(self, fold: str) -> None:
        if self.decoder.post_norm:
            raise InputError(
                f"fold '{fold}' is not exact for this family: a norm follows the MLP inside each layer, so that no "
                "matrix can be moved into down_proj. Use --fold none."
            )


@dataclass(frozen=True)
class GapMoments:
    """What one run of dropped layers did, seen from the kept layer before it."""

    difference: Tensor  # [D, D] HᵀH, H = X^p - X^r
    mlp: Moments  # predictors: the MLP's output M [N, D]; targets: M + H, what it should have been
    hidden: Moments | None  # predictors: the input of down_proj [N, I]; the same targets

    @classmethod
    def empty(cls, like: Gap, hidden: bool) -> GapMoments:
        inner, width = like.hidden.shape[-1], like.mlp.shape[-1]
        gram = torch.zeros(width, width, dtype=torch.double)
        return cls(gram, Moments.empty(width, width), Moments.empty(inner, width) if hidden else None)

    def add(self, gap: Gap, counted: Tensor, multiplier: float) -> None:
        """Add the counted tokens [B, S] of one batch."""
        added, mlp = gap.added[counted].float(), gap.mlp[counted].float()  # [N, D]
        self.difference.add_((added.T @ added).cpu().double())
        wanted = mlp + added / multiplier
        self.mlp.add(mlp, wanted)
        if self.hidden is not None:
            self.hidden.add(gap.hidden[counted], wanted)


def measure_gaps(job: FoldJob, *, tokens: str = "all", p: float = 0.5, hidden: bool = False) -> dict[int, GapMoments]:
    """One pass over the data, up to the last dropped layer; none for gaps that were measured before.

    Args:
        tokens: which are counted: 'all' but padding and special ones, or the 'important' ones of the dropped layer.
        hidden: also the [I, I] moments of down_proj's input.
    """

    def key(kept: int) -> tuple[Any, ...]:
        return (kept, job.gaps[kept], tokens, p, hidden)

    wanted = {kept: run for kept, run in job.gaps.items() if key(kept) not in job.memo}
    sums: dict[int, GapMoments] = {}
    if wanted:
        with attention_means(job.model) if tokens == "important" else contextlib.nullcontext() as reducer:
            for batch in job.batches():
                batch = batch.to(job.model.device)
                if reducer is not None:
                    reducer.is_visual, reducer.is_text = batch.is_visual, batch.is_text
                for kept, gap in _gaps_of(job, wanted, batch, reducer).items():
                    if kept not in sums:
                        sums[kept] = GapMoments.empty(gap, hidden)
                    sums[kept].add(gap, gap.counted(batch, p), job.multiplier)
    job.memo.update({key(kept): moments for kept, moments in sums.items()})
    return {kept: job.memo[key(kept)] for kept in job.gaps}


@dataclass(frozen=True)
class Gap:
    """One gap in one batch."""

    hidden: Tensor  # [B, S, I] input of the kept layer's down_proj
    mlp: Tensor  # [B, S, D] its output
    added: Tensor  # [B, S, D] what the dropped layers added: H
    means: AttentionMeans | None  # of the last dropped layer

    def counted(self, batch: Batch, p: float) -> Tensor:
        """[B, S] the tokens to learn from."""
        if self.means is None:
            return batch.is_visual | batch.is_text
        visual = important(self.means.visual_from_visual + self.means.visual_from_text, batch.is_visual, p)
        return visual | important(self.means.text_to_visual + self.means.text_to_text, batch.is_text, p)


def _gaps_of(
    job: FoldJob, wanted: dict[int, tuple[int, ...]], batch: Batch, reducer: AttentionReducer | None
) -> dict[int, Gap]:
    """Run the batch up to the last dropped layer, keeping what each gap's moments are made of."""
    layers = text_decoder(job.model).layers
    ends = {run[-1]: kept for kept, run in wanted.items()}
    tapped: list[tuple[Tensor, Tensor]] = []
    mlps: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[int, Tensor] = {}
    found: dict[int, Gap] = {}
    with contextlib.ExitStack() as taps:
        for kept in wanted:
            module = layers[kept].get_submodule(job.decoder.down_proj)
            taps.enter_context(on_module(module, lambda x, y: tapped.append((x, y))))
        for layer_idx, before, after in walk(layers, trace(job.model, batch)):
            means = reducer.take() if reducer is not None else None
            if layer_idx - 1 in wanted:
                entered[layer_idx - 1] = before
            if layer_idx in wanted:
                mlps[layer_idx] = tapped.pop()
            if layer_idx in ends:
                kept = ends[layer_idx]
                found[kept] = Gap(*mlps.pop(kept), after - entered.pop(kept), means)
                if len(found) == len(wanted):
                    break
    return found
