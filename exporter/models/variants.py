"""Many variants of one model judged on the same answers, sharing all that they share.

A variant leaves out layers and replaces a few tensors. Image features, embeddings and the layers before its first
change are computed once a batch for all variants; no copy of the model is made.

Shapes: B samples, S tokens, N answer tokens of a batch, D hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..checkpoints.pruned_config import layer_changes
from ..families import PER_LAYER_TENSORS
from ..plan import Folded, PruningPlan
from .answers import AnsweredBatch
from .divergence import StateErrors
from .loading import text_decoder
from .replay import logits, replaced
from .residency import let_go
from .state_error import errors_of, head_states, kinds_of
from .sweep import ORIGINAL, Change, sweep

UNSETTABLE = ("per_layer_config",)  # kept as objects of their own, and read when layers are built only


@dataclass(frozen=True)
class Variant:
    plan: PruningPlan
    folded: Folded = field(default_factory=dict)

    @property
    def first_change(self) -> int:
        """Return the first layer that the variant does not share with the original."""
        return min([*self.plan.drop, *(layer for layer, _ in self.folded)], default=self.plan.num_layers)


@dataclass
class AnswerAgreement:
    """One variant's agreement with answers given to it: sums over answer tokens, and per sample."""

    nll: float = 0.0  # of the answers
    kl: float = 0.0  # KL(original || variant) at the answers' tokens
    same: int = 0  # answer tokens that the variant ranks first
    tokens: int = 0
    follows: list[bool] = field(default_factory=list)  # per sample: it would say the very same answer
    kl_of: list[float] = field(default_factory=list)  # per sample: KL summed over its answer
    tokens_of: list[int] = field(default_factory=list)  # per sample
    states: StateErrors = field(default_factory=StateErrors)  # of the states that the head reads

    def add(self, other: AnswerAgreement) -> None:
        """Add the agreement on other questions."""
        self.nll += other.nll
        self.kl += other.kl
        self.same += other.same
        self.tokens += other.tokens
        self.follows += other.follows
        self.kl_of += other.kl_of
        self.tokens_of += other.tokens_of
        self.states += other.states


@contextlib.contextmanager
def assembled(model: Any, variant: Variant) -> Iterator[None]:
    """Give the loaded model as the variant's checkpoint would be: for `generate`, which wants a cache without gaps."""
    decoder, config = text_decoder(model), model.config.get_text_config()
    indexed = [module for layer in decoder.layers for module in layer.modules() if hasattr(module, "layer_idx")]
    before = decoder.layers
    changes = {
        name: value for name, value in layer_changes(model.config, variant.plan).items() if name not in UNSETTABLE
    }
    holders = [config, *([decoder] if any(name in vars(decoder) for name in changes) else [])]  # Mllama's keeps a list
    entries = [(holder, name, getattr(holder, name)) for holder in holders for name in changes if hasattr(holder, name)]
    indices = [module.layer_idx for module in indexed]
    keep = variant.plan.keep
    let_go(*(before[layer] for layer in variant.plan.drop))
    try:
        with replaced(model, variant.folded), _of_kept_layers(decoder, variant.plan):
            decoder.layers = nn.ModuleList(decoder.layers[layer] for layer in keep)
            for holder, name, _ in entries:
                setattr(holder, name, changes[name])
            for module in indexed:  # the cache is indexed by it
                module.layer_idx = variant.plan.new_index.get(module.layer_idx, module.layer_idx)
            yield
    finally:
        decoder.layers = before
        for holder, name, value in entries:
            setattr(holder, name, value)
        for module, index in zip(indexed, indices, strict=True):
            module.layer_idx = index


@contextlib.contextmanager
def _of_kept_layers(decoder: Any, plan: PruningPlan) -> Iterator[None]:
    """Leave out the dropped layers' parts of tensors that hold one for every layer, as the writer does."""
    per_layer = [(p, axis) for name, p in decoder.named_parameters() for end, axis in PER_LAYER_TENSORS.items()
             if name.endswith(end)]  # fmt: skip
    whole = [parameter.data for parameter, _ in per_layer]
    try:
        for parameter, axis in per_layer:
            parts = parameter.data.chunk(plan.num_layers, axis)
            parameter.data = torch.cat([parts[layer] for layer in plan.keep], axis)
        yield
    finally:
        for (parameter, _), data in zip(per_layer, whole, strict=True):
            parameter.data = data


def judge(
    model: Any,
    variants: Sequence[Variant],
    batches: Iterable[AnsweredBatch],
    done: Callable[[int], object] = lambda number: None,
) -> list[AnswerAgreement]:
    """Run every variant over the same answered questions.

    Args:
        batches: with the answers appended, the original's own or the right ones; the share of this process.
        done: called with the number of variants after each batch of each.
    """
    return _summed(ranks.gathered(_by_batch(model, variants, batches, done)), len(variants))


def judge_in_parts(
    model: Any, variants: Sequence[Variant], parts: Sequence[Iterable[AnsweredBatch]]
) -> list[list[AnswerAgreement]]:
    """Return what `judge` returns of each of several parts of the questions, from one pass, in a single process."""
    lengths: list[int] = []

    def batches() -> Iterator[AnsweredBatch]:
        for part in parts:
            lengths.append(0)
            for batch in part:
                lengths[-1] += 1
                yield batch

    by_batch = iter(_by_batch(model, variants, batches()))
    return [_summed(itertools.islice(by_batch, length), len(variants)) for length in lengths]


def _summed(by_batch: Iterable[list[AnswerAgreement]], count: int) -> list[AnswerAgreement]:
    results = [AnswerAgreement() for _ in range(count)]
    for agreements in by_batch:
        for result, agreement in zip(results, agreements, strict=True):
            result.add(agreement)
    return results


def _by_batch(
    model: Any,
    variants: Sequence[Variant],
    batches: Iterable[AnsweredBatch],
    done: Callable[[int], object] = lambda number: None,
) -> list[list[AnswerAgreement]]:
    """Return the agreement of each variant on each batch."""
    by_batch: list[list[AnswerAgreement]] = []
    changes = [ORIGINAL, *(Change(frozenset(variant.plan.drop), variant.folded) for variant in variants)]
    for passed in sweep(model, batches, changes):
        answered_batch, outputs = passed.batch, passed.outputs()
        output = next(outputs)[1]
        log_p = logits(model, output[answered_batch.predicts]).float().log_softmax(-1)  # [N, vocabulary]
        kinds = kinds_of(answered_batch.batch)
        original = head_states(model, output, kinds)
        by_batch.append([])
        for (_, changed), variant in zip(outputs, variants, strict=True):
            same = variant.first_change == variant.plan.num_layers
            their_logits = log_p if same else logits(model, changed[answered_batch.predicts]).float()
            states = errors_of(original, original if same else head_states(model, changed, kinds))
            by_batch[-1].append(_agreement(answered_batch, log_p, their_logits, states))
            done(1)
    return by_batch


def _agreement(answered_batch: AnsweredBatch, log_p: Tensor, logits: Tensor, states: StateErrors) -> AnswerAgreement:
    log_q = logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [N]
    right = log_q.argmax(-1) == answered_batch.targets
    lengths = answered_batch.predicts.sum(1).tolist()
    return AnswerAgreement(
        nll=-float(log_q.gather(1, answered_batch.targets[:, None]).sum()),
        kl=float(kl.sum()),
        same=int(right.sum()),
        tokens=len(right),
        follows=[bool(part.all()) for part in torch.split(right, lengths)],
        kl_of=[float(part.double().sum()) for part in torch.split(kl, lengths)],
        tokens_of=lengths,
        states=states,
    )
