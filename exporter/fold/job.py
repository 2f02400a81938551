"""The inputs of every fold, and the one pass over the calibration data that measures what a gap has lost.

Shapes: B samples, S tokens, N counted tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.samples import Sample
from ..errors import InputError
from ..families import Decoder
from ..localize.tis import important
from ..models.capture import AttentionMeans, AttentionReducer, attention_means, on_module
from ..models.loading import text_decoder
from ..models.replay import Trace, trace, walk
from ..plan import PruningPlan
from .held_out import HeldOut
from .moments import Moments

ORIGINALS_BYTES = 2 << 30


class FoldRefused(InputError):  # noqa: N818 - like CheckFailed, what was found and no fault
    """A fold that this family of models does not take."""


@dataclass
class Originals:
    """The original model's states between layers for the same few batches, computed once for many folds."""

    traces: dict[int, Trace] = field(default_factory=dict)  # by the batch's number
    states: dict[tuple[int, int], Tensor] = field(
        default_factory=dict
    )  # [B, S, D] input of a layer, by batch and layer
    room: int = ORIGINALS_BYTES  # bytes that may still be kept

    def keep(self, number: int, layer_idx: int, state: Tensor) -> None:
        size = state.numel() * state.element_size()
        if (number, layer_idx) not in self.states and size <= self.room:
            self.states[number, layer_idx] = state
            self.room -= size


@dataclass(frozen=True)
class FoldJob:
    """A plan to be made up for, with the data and the weights to do it."""

    model: Any
    batches: Callable[..., Iterable[Batch]]  # of a share of the questions; of all of them if none is given
    plan: PruningPlan
    read: Callable[[int, str], Tensor | None]  # a layer's tensor by name, from disk; None where there is none
    decoder: Decoder
    multiplier: float = 1.0  # of what a block adds to the residual stream
    memo: dict[Any, GapMoments] = field(default_factory=dict)  # gaps measured before, for folds that share a model
    held_out: HeldOut | None = None  # questions to choose a fold by; None: there are none
    originals: Originals | None = None  # states of the original model that several folds share
    half_of: Callable[[Sample], bool] = lambda sample: False  # which half of the pictures a question belongs to
    report: dict[str, Any] = field(default_factory=dict)  # what a fold has to say of itself, for the record

    @property
    def gaps(self) -> dict[int, tuple[int, ...]]:
        """Return the kept layer before each gap, and the gap. A gap that begins at layer 0 has none."""
        return {run[0] - 1: run for run in self.plan.gaps if run[0] > 0}

    def trace(self, number: int, batch: Batch) -> Trace:
        """Return what the layers are given for the batch of that number, with what is kept of it if anything is."""
        if self.originals is None:
            return trace(self.model, batch)
        if number not in self.originals.traces:
            self.originals.traces[number] = trace(self.model, batch)
        return self.originals.traces[number]

    def refuse_unfoldable(self, fold: str) -> None:
        """Raise FoldRefused where no fold is exact."""
        if reason := self.decoder.unfoldable:
            raise FoldRefused(
                f"fold '{fold}' is not exact for this family: {reason}, so that no matrix can be moved into "
                "down_proj. Use --fold none."
            )

    def refuse_post_norm(self, fold: str) -> None:
        """Raise FoldRefused where a linear map can't be moved into the output matrices."""
        self.refuse_unfoldable(fold)
        if self.decoder.post_norm:
            raise FoldRefused(
                f"fold '{fold}' is not exact for this family: a norm follows the MLP inside each layer, so that no "
                "matrix can be moved into down_proj. Use --fold reconstruction, or none."
            )


@dataclass(frozen=True)
class GapMoments:
    """The effect of one gap's layers, seen from the kept layer before it."""

    differences: list[Tensor]  # [D, D] HᵀH, H = X^p - X^r, of the last dropped layer p, or of each one of the run
    mlp: Moments  # predictors: the MLP's output M [N, D]; targets: M + H, what it should have been

    @classmethod
    def empty(cls, like: Gap) -> GapMoments:
        width = like.mlp.shape[-1]
        grams = [torch.zeros(width, width, dtype=torch.double) for _ in like.added]
        return cls(grams, Moments.empty(width, width))

    def add(self, gap: Gap, counted: Tensor, multiplier: float) -> None:
        """Add the counted tokens [B, S] of one batch."""
        mlp = gap.mlp[counted].float()  # [N, D]
        for gram, added in zip(self.differences, gap.added, strict=True):
            difference = added[counted].float()  # [N, D]
            gram.add_((difference.T @ difference).cpu().double())
        self.mlp.add(mlp, mlp + difference / multiplier)


def counted_tokens(batch: Batch, tokens: str) -> Tensor:
    """Return [B, S] 'all' tokens but padding and special ones, or those of the 'prompt' only."""
    counted = batch.is_visual | batch.is_text
    return counted & ~batch.is_answer if tokens == "prompt" and batch.is_answer is not None else counted


def measure_gaps(job: FoldJob, *, tokens: str = "all", p: float = 0.5, each: bool = False) -> dict[int, GapMoments]:
    """Measure gaps in one pass over the data, up to the last dropped layer; none for gaps that were measured before.

    Args:
        tokens: which are counted: 'all' but padding and special ones, those of the 'prompt', or the 'important' ones of
            the dropped layer.
        each: differences after every dropped layer of a run, not only after its last.
    """

    def key(kept: int) -> tuple[Any, ...]:
        return (kept, job.gaps[kept], tokens, p, each)

    wanted = {kept: run for kept, run in job.gaps.items() if key(kept) not in job.memo}
    sums: dict[int, GapMoments] = {}
    if wanted:
        batches = job.batches()  # before attention is changed: the model may have to answer them first
        with attention_means(job.model) if tokens == "important" else contextlib.nullcontext() as reducer:
            for batch in batches:
                batch = batch.to(job.model.device)
                if reducer is not None:
                    reducer.is_visual, reducer.is_text = batch.is_visual, batch.is_text
                for kept, gap in _gaps_of(job, wanted, batch, reducer, each).items():
                    if kept not in sums:
                        sums[kept] = GapMoments.empty(gap)
                    sums[kept].add(gap, gap.counted(batch, tokens, p), job.multiplier)
    job.memo.update({key(kept): moments for kept, moments in sums.items()})
    return {kept: job.memo[key(kept)] for kept in job.gaps}


@dataclass(frozen=True)
class Gap:
    """One gap in one batch."""

    mlp: Tensor  # [B, S, D] output of the kept layer's MLP
    added: tuple[Tensor, ...]  # [B, S, D] what dropped layers added, H: up to each one of them, or up to the last
    means: AttentionMeans | None  # of the last dropped layer

    def counted(self, batch: Batch, tokens: str, p: float) -> Tensor:
        """Return [B, S] the tokens to learn from."""
        if self.means is None:
            return counted_tokens(batch, tokens)
        visual = important(self.means.visual_from_visual + self.means.visual_from_text, batch.is_visual, p)
        return visual | important(self.means.text_to_visual + self.means.text_to_text, batch.is_text, p)


def _gaps_of(
    job: FoldJob, wanted: dict[int, tuple[int, ...]], batch: Batch, reducer: AttentionReducer | None, each: bool
) -> dict[int, Gap]:
    """Run the batch up to the last dropped layer, keeping what each gap's moments are made of."""
    layers = text_decoder(job.model).layers
    before_run = {layer: kept for kept, run in wanted.items() for layer in run}
    tapped: list[Tensor] = []
    mlps: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}
    added: dict[int, list[Tensor]] = {kept: [] for kept in wanted}
    gaps: dict[int, Gap] = {}
    with contextlib.ExitStack() as taps:
        for before_gap in wanted:
            module = layers[before_gap].get_submodule(job.decoder.down_proj_of(before_gap) or "")
            taps.enter_context(on_module(module, lambda _, y: tapped.append(y)))
        for layer_idx, before, after in walk(layers, trace(job.model, batch)):
            means = reducer.take_any() if reducer is not None else None
            if layer_idx - 1 in wanted:
                entered[layer_idx - 1] = before
            if layer_idx in wanted:
                mlps[layer_idx] = tapped.pop()
            if layer_idx not in before_run:
                continue
            kept = before_run[layer_idx]
            is_last = layer_idx == wanted[kept][-1]
            if each or is_last:
                added[kept].append(after - entered[kept])
            if is_last:
                gaps[kept] = Gap(mlps.pop(kept), tuple(added.pop(kept)), means)
                if len(gaps) == len(wanted):
                    break
    return gaps
