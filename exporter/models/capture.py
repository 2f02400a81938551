"""Statistics of a forward pass over the calibration data: sums and per-token numbers, no activations.

Everything is streamed: at any time there are the activations of the layer that runs and [B, S] numbers for each layer
of the current batch.

Shapes: B samples, S tokens, L layers, D hidden size, I intermediate size, H heads, d head size, Q queries of a block, K
keys they see.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..data.batches import Batch
from ..errors import InputError
from ..families import is_listed
from .attention import AttentionCall, attention_replaced
from .journal import Sums
from .loading import text_decoder
from .replay import last_output, trace, walk
from .sweep import sweep

BLOCK_BYTES = 32 << 20  # of attention probabilities that may exist at a time
IMPLEMENTATION = "lvlm_exporter_blockwise"
RANKINGS = "rankings"  # what their pass is called where it is kept
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}  # of outputs, relative to the largest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionMeans:
    """Head-mean causal attention A [S, S] of one layer, reduced to four block means per token: [B, S] each.

    METHODS section 1 (Short-LVLM, Token Importance Scores). Division by constant counts (|V|, |T|) is left in, so that
    the two terms of a visual token's score weigh alike whatever the lengths.
    """

    visual_from_visual: Tensor  # mean over visual queries i of A[i, j]
    visual_from_text: Tensor  # mean over text queries i of A[i, j]
    text_to_visual: Tensor  # mean over visual keys j of A[i, j]
    text_to_text: Tensor  # mean over earlier text keys j of A[i, j]: along the row
    text_from_text: Tensor  # mean over text queries i' of A[i', i]: along the column


@dataclass(frozen=True)
class BatchStatistics:
    """Per-token numbers of one batch, for every layer."""

    cosine: Tensor  # [L, B, S] between a layer's input and output
    visual_scores: Tensor | None  # [L, B, S] importance among the visual tokens, 0 elsewhere
    text_scores: dict[str, Tensor] | None  # the same among text tokens, by way of averaging: 'rows', 'columns'
    last_states: Tensor  # [L + 1, B, D] at the last token: input of layer 0, outputs of all layers
    is_visual: Tensor  # [B, S]
    is_text: Tensor  # [B, S]


@contextlib.contextmanager
def on_module(module: Any, seen: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `seen(input, output)` after each call of a module with one tensor argument."""
    handle = module.register_forward_hook(lambda _, args, output: seen(args[0], output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def on_output(module: Any, seen: Callable[[Any], object]) -> Iterator[None]:
    """Call `seen(output)` after each call of a module, whatever it takes."""
    handle = module.register_forward_hook(lambda _, __, output: seen(output) and None)
    try:
        yield
    finally:
        handle.remove()


# --- attention, block by block ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention_means(model: Any) -> Iterator[AttentionReducer]:
    """Make the decoder's attention reduce its probabilities as it goes; the model's outputs stay what they were."""
    reducer = AttentionReducer()
    with attention_replaced(model, IMPLEMENTATION, reducer):
        yield reducer


class AttentionReducer:
    """Exact attention over blocks of queries, of which only AttentionMeans are kept: O(S) per layer."""

    def __init__(self) -> None:
        self.is_visual: Tensor | None = None  # [B, S], set for every batch
        self.is_text: Tensor | None = None
        self.means: AttentionMeans | None = None  # of the layer that ran last

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the attention's output [B, S, H, d]."""
        assert self.is_visual is not None and self.is_text is not None
        query, values = call.queries, call.values
        visual, text = (kind.to(query.device, torch.float32) for kind in (self.is_visual, self.is_text))  # [B, S]
        batch, heads, length = query.shape[:3]
        received = query.new_zeros(batch, 2, length, dtype=torch.float32)  # by each key from visual, from text queries
        paid = query.new_zeros(batch, length, 2, dtype=torch.float32)  # by each query to visual, to text keys
        output = torch.empty(batch, length, heads, values.shape[-1], dtype=query.dtype, device=query.device)
        kinds = torch.stack([visual, text], dim=1)  # [B, 2, S]
        block = max(1, BLOCK_BYTES // (batch * heads * length * 4))  # queries
        for start in range(0, length, block):
            stop = min(start + block, length)
            probabilities = call.probabilities(start, stop)  # [B, H, Q, K]
            seen = probabilities.shape[-1]
            mean = probabilities.mean(1)  # [B, Q, K]
            received[:, :, :seen] += kinds[:, :, start:stop] @ mean
            paid[:, start:stop] = mean @ kinds[:, :, :seen].transpose(1, 2)
            attended = torch.matmul(probabilities.to(values.dtype), values[:, :, :seen])
            output[:, start:stop] = attended.transpose(1, 2)
        self.means = _normalised(received, paid, visual, text)
        return output

    def take(self) -> AttentionMeans:
        """Return the means of the layer that ran last, which has attention."""
        means = self.take_any()
        assert means is not None, "a decoder layer whose attention does not go through transformers' interface"
        return means

    def take_any(self) -> AttentionMeans | None:
        """Return the means of the layer that ran last; None where it has no attention."""
        means, self.means = self.means, None
        return means


def _normalised(received: Tensor, paid: Tensor, visual: Tensor, text: Tensor) -> AttentionMeans:
    visual_count = visual.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    text_count = text.sum(1, keepdim=True).clamp(min=1)
    earlier_text = text.cumsum(1).clamp(min=1)  # [B, S] causal rows have unequal lengths
    return AttentionMeans(
        visual_from_visual=received[:, 0] / visual_count,
        visual_from_text=received[:, 1] / text_count,
        text_to_visual=paid[..., 0] / visual_count,
        text_to_text=paid[..., 1] / earlier_text,
        text_from_text=received[:, 1] / text_count,
    )


# --- one pass over the data -------------------------------------------------------------------------------------------


def layer_statistics(model: Any, batches: Iterable[Batch], *, attention: bool = True) -> Iterator[BatchStatistics]:
    """Run one forward pass per batch, and yield everything that the one-pass localizers need.

    Args:
        batches: the share of this process; what is yielded is of all of them.
        attention: also the importance scores of tokens (only `tis` needs them).
    """
    if attention and not is_listed(model.config):
        batches = first = list(batches)
        attention = ranks.from_first(lambda: not first or attention_is_seen(model, first[0].to(model.device)))
    return ranks.in_order(_statistics(model, batches, attention))


def _statistics(model: Any, batches: Iterable[Batch], attention: bool) -> Iterator[BatchStatistics]:
    taken: dict[int, _Statistics] = {}
    with attention_means(model) if attention else contextlib.nullcontext() as reducer:
        for passed in sweep(
            model,
            batches,
            before=lambda batch: aim(reducer, batch),
            seen=lambda lane, layer_idx, state, output: taken.setdefault(lane.number, _Statistics()).add(
                lane.plain, layer_idx, before=state, after=output, reducer=reducer
            ),
            sums=Sums(
                RANKINGS if attention else f"{RANKINGS} without attention",
                lambda: {number: taken[number].told() for number in sorted(taken)},
                lambda told: taken.update({number: _Statistics.of(lists) for number, lists in told.items()}),
            ),
        ):
            yield taken.pop(passed.number).result(passed.batch)


def aim(reducer: AttentionReducer | None, batch: Batch) -> None:
    """Tell the reducer which tokens are which in the batch that runs next."""
    if reducer is not None:
        reducer.is_visual, reducer.is_text = batch.is_visual, batch.is_text


def attention_is_seen(model: Any, batch: Batch) -> bool:
    """Tell whether reduced attention computes what the model's own does, for types that no table names.

    An attention with learned sinks, a bias of its own, or one beside transformers' interface does not: its scores of
    tokens would be those of another model.
    """
    layers = text_decoder(model).layers
    whole = last_output(walk(layers, traced := trace(model, batch)), traced.entry)
    try:
        with attention_means(model) as reducer:
            reducer.is_visual, reducer.is_text = batch.is_visual, batch.is_text
            reduced = last_output(walk(layers, traced := trace(model, batch)), traced.entry)
            seen = reducer.take_any() is not None
    except Exception as error:  # an attention that takes what this one does not
        logger.warning("scores of tokens can't be read from this model's attention: %s", error)
        return False
    real = _no_padding(batch).to(whole.device)  # [B, S]; what padding attends to, each kernel decides for itself
    difference = float((reduced[real] - whole[real]).abs().max() / whole[real].abs().max())
    if seen and difference <= CLOSE[whole.dtype]:
        return True
    logger.warning(
        "scores of tokens can't be read from this model's attention: ours differs from it by %.1e", difference
    )
    return False


def _no_padding(batch: Batch) -> Tensor:
    mask = batch.inputs.get("attention_mask")
    return torch.ones_like(batch.is_visual) if mask is None else mask.bool()


class _Statistics:
    """Gathers one batch's numbers, layer after layer."""

    def __init__(self) -> None:
        self.last_states: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self.visual: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.means: AttentionMeans | None = None  # a layer without attention is given what the last one looked at

    def add(
        self, batch: Batch, layer_idx: int, before: Tensor, after: Tensor, reducer: AttentionReducer | None
    ) -> None:
        visual, text = batch.is_visual, batch.is_text
        if not layer_idx:
            self.last_states.append(before[:, -1].float())
        self.cosines.append(_cosine(before, after, visual | text, layer_idx))
        self.last_states.append(after[:, -1].float())
        if reducer is not None:
            means = self.means = reducer.take_any() or self.means or _alike(visual, text)
            self.visual.append((means.visual_from_visual + means.visual_from_text) * visual / 2)
            self.rows.append((means.text_to_visual + means.text_to_text) * text / 2)
            self.columns.append((means.text_to_visual + means.text_from_text) * text / 2)

    def told(self) -> list[Any]:
        """Return all numbers, for a pass that goes on from here later."""
        means = None if self.means is None else list(vars(self.means).values())
        return [self.last_states, self.cosines, self.visual, self.rows, self.columns, means]

    @classmethod
    def of(cls, told: Sequence[Any]) -> _Statistics:
        """Return those that were told."""
        statistics = cls()
        statistics.last_states, statistics.cosines, statistics.visual, statistics.rows, statistics.columns, means = told
        statistics.means = None if means is None else AttentionMeans(*means)
        return statistics

    def result(self, batch: Batch) -> BatchStatistics:
        text_scores = None
        if self.rows:
            text_scores = {"rows": torch.stack(self.rows).cpu(), "columns": torch.stack(self.columns).cpu()}
        return BatchStatistics(
            cosine=torch.stack(self.cosines).cpu(),
            visual_scores=torch.stack(self.visual).cpu() if self.visual else None,
            text_scores=text_scores,
            last_states=torch.stack(self.last_states).cpu(),
            is_visual=batch.is_visual.cpu(),
            is_text=batch.is_text.cpu(),
        )


def _alike(visual: Tensor, text: Tensor) -> AttentionMeans:
    """Return equal means for all tokens [B, S], for linear layers and state spaces before the first attention."""
    ones = torch.ones_like(visual, dtype=torch.float32)
    return AttentionMeans(ones, ones, text_to_visual=ones, text_to_text=ones, text_from_text=ones)


def _cosine(before: Tensor, after: Tensor, counted: Tensor, layer_idx: int) -> Tensor:
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, S]
    if not cosine[counted].isfinite().all():
        raise InputError(
            f"decoder layer {layer_idx} returns NaN or infinite values: the weights are damaged, or the dtype "
            "overflows (try --dtype float32)."
        )
    return cosine
