"""Reconstruction: refit what stays, layer after layer, to the states that the original model has there.

The last layer before a gap learns to end where the gap ended; every later layer is refitted too, on the inputs that the
smaller model really gives it, so that it makes up for what the layers before it could not. Each refit is a ridge
regression of the output matrix towards its old value: what layer-wise post-training pruning does for sparse weights
(SparseGPT, arXiv 2301.00774, equation 1), done here for whole missing layers. Where a norm stands behind the matrices
(norms.py), its last norm's gain is refitted too.

Shapes: B samples, S tokens, N counted tokens, D hidden size, P inputs of the refitted matrix.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ranks
from ..data.batches import Batch
from ..families import Decoder
from ..models.capture import on_module
from ..models.journal import Bookmark
from ..models.loading import text_decoder
from ..models.originals import Originals, originals_of
from ..models.questions import SUFFIX, JobSize
from ..models.replay import replaced
from ..models.side_by_side import Task, side_by_side
from ..models.sweep import Lane
from ..plan import Folded, PruningPlan
from .job import FoldJob, FoldRefused, counted_tokens
from .moments import RIDGE, Moments, MomentSums, agreed, bounds_of, solve
from .norms import GainMoments, below_the_norm, effective, gain_of, root_mean_square
from .outputs import Matrix
from .streams import Stream, bookmark_of, taken_up, told

GAIN_RIDGE = 1.0  # of a norm's gain where the matrices' is chosen by cross-validation
LAYER_COST = 4.5  # of refitting a layer, in forward passes through it: two regressions with their sums, the state after
MATRICES = ("o_proj", "down_proj")
INNER_BYTES = 2 << 30  # of a layer's inputs of down_proj, that may be kept
TOKENS_PER_INPUT = 4.0  # that a regression needs at least: with fewer, answers were worse than without a fold


@dataclass(frozen=True)
class Fit:
    """Weights and regularisation of the regressions."""

    ridge: float | Literal["auto"] | None = None
    share_of_text: float | None = None
    answer_weight: float = 4.0
    tokens: str = "all"


def steps(job: FoldJob, fit: Fit, originals: Originals, kinds: Sequence[str]) -> Task[Folded]:
    """Reconstruct, asking for each layer before it runs."""
    reached = max(0, min(job.plan.drop) - 1)  # the first layer that changes: up to its input both models are one
    refitted = [layer_idx for layer_idx in job.plan.keep if layer_idx >= reached]
    num_batches = ranks.total(len(originals.lanes))
    streams = [_stream(job, lane, originals, fit, num_batches=num_batches) for lane in originals.lanes]
    tokens = ranks.total(sum(int((stream.weights > 0).sum()) for stream in streams))
    kinds = affordable(job, refitted[0], kinds, tokens)
    if not kinds:  # told before anything runs
        return {}
    folded: Folded = {}
    bookmark = bookmark_of(job.model, [list(job.plan.drop), asdict(fit), kinds], streams)
    done = None if bookmark is None else taken_up(bookmark, streams, folded)
    if done is None:
        yield from _carry(job, streams, originals=originals, start=0, stop=reached)
        for stream in streams:
            stream["smaller"] = stream["original"]
    else:
        reached, refitted = done, [layer_idx for layer_idx in refitted if layer_idx >= done]
    yield from _refitted(
        job, fit, kinds, refitted=refitted, reached=reached,
        streams=streams, originals=originals, folded=folded, bookmark=bookmark,
    )  # fmt: skip
    for stream in streams:
        stream.forget(*list(stream.kept))
    return folded


def _refitted(
    job: FoldJob,
    fit: Fit,
    kinds: Sequence[str],
    *,
    refitted: Sequence[int],
    reached: int,
    streams: Sequence[Stream],
    originals: Originals,
    folded: Folded,
    bookmark: Bookmark | None,
) -> Task[None]:
    """Refit layers one after the other, from the input of layer `reached` on; put their weights into `folded`."""
    for kept, following in itertools.pairwise([*refitted, job.plan.num_layers]):
        yield from _carry(job, streams, originals=originals, start=reached, stop=following, beside=(kept,))
        reached = following
        yield (kept,)
        modules = job.decoder.maps_of(kept, kinds)
        for number, module in enumerate(modules):  # fitted together with those after it, which then adapt to it
            key = (kept, f"{module}.weight")
            weights = _refit(job, kept, modules[number:], streams=streams, folded=folded, ridge=fit.ridge)
            folded[key] = weights[key]
        if modules and (norm := job.decoder.norm_behind(modules[-1])):
            gain = _refit_gain(job, kept, norm, streams=streams, folded=folded, ridge=fit.ridge)
            folded[kept, f"{norm}.weight"] = gain
        if following < job.plan.num_layers:  # something comes behind it
            _advance(job, kept, streams, folded)
        if bookmark is not None:
            last = following == job.plan.num_layers
            bookmark.keep_if_due(functools.partial(told, streams, folded, reached=following), last=last)


def _advance(job: FoldJob, kept: int, streams: Sequence[Stream], folded: Folded) -> None:
    """Bring the smaller model's states behind the refitted layer.

    Where the inputs of `down_proj` were kept, what its new weights change is added to what the layer put out with the
    old ones; else the layer is run again.
    """
    layer = text_decoder(job.model).layers[kept]
    module = job.decoder.down_proj_of(kept)
    with replaced(job.model, _of_layer(folded, kept)), torch.inference_mode():
        for stream in streams:
            if "inner" not in stream.kept:
                output = stream.step(layer, kept, stream["smaller"])
            else:
                assert module is not None, "inputs are kept of down_proj only"
                change = folded[kept, f"{module}.weight"].double() - _weight(job, kept, module).double()
                inner = stream["inner"]
                output = stream["output"] + job.multiplier * (inner @ change.T.to(inner))
            stream["smaller"] = stream.after(kept, output)
            stream.forget("output", "inner")


def refitted_share(plan: PruningPlan) -> float:
    """Return the share of the questions that makes reconstruction cost about one forward pass over all of them."""
    reached = max(0, min(plan.drop, default=0) - 1)
    refitted = sum(layer_idx >= reached for layer_idx in plan.keep)
    return 1 / (1 + LAYER_COST * refitted / plan.num_layers)


def affordable(job: FoldJob, layer_idx: int, kinds: Sequence[str], tokens: int) -> list[str]:
    """Return the kinds of maps that so many tokens suffice for: all, the last, the first, or none."""
    modules = {kind: (job.decoder.maps_of(layer_idx, [kind]) or [""])[0] for kind in kinds}
    widths = {kind: _weight(job, layer_idx, module).shape[1] if module else 0 for kind, module in modules.items()}
    for some in (list(kinds), list(kinds[-1:]), list(kinds[:1])):
        needed = TOKENS_PER_INPUT * sum(widths[kind] for kind in some)
        if tokens >= needed:
            break
    else:
        some = []
    job.report["tokens"] = tokens
    job.report["inputs"] = sum(widths.values())
    if len(some) < len(kinds):
        names, inputs = " and ".join(modules.values()), sum(widths.values())
        job.report["fell_back"] = f"{tokens:,} tokens are too few to refit {names} with {inputs:,} inputs; " + (
            f"only {modules[some[0]]} was" if some else "nothing was"
        )
    return some


def _stream(job: FoldJob, lane: Lane, originals: Originals, fit: Fit, num_batches: int) -> Stream:
    """Return a batch before the first layer."""
    batch, store = lane.plain, originals.store
    half = torch.tensor([job.half_of(sample) for sample in batch.samples], device=job.model.device)
    stream = Stream(lane, store, weights=token_weights(batch, fit), half=half, num_batches=num_batches)
    stream["original"] = store.read(lane.branches[0].state)
    return stream


def _carry(
    job: FoldJob,
    streams: Sequence[Stream],
    originals: Originals,
    start: int,
    stop: int,
    beside: tuple[int, ...] = (),
) -> Generator[tuple[int, ...], None, None]:
    """Bring the original model's states from the input of layer `start` to that of layer `stop`.

    Args:
        beside: layers that are wanted again soon, and stay.
    """
    layers = text_decoder(job.model).layers
    for layer_idx in range(start, stop):
        if any((stream.lane.number, layer_idx + 1) not in originals.states for stream in streams):
            yield tuple(sorted({*beside, layer_idx}))
        for stream in streams:
            key = (stream.lane.number, layer_idx + 1)
            if key in originals.states:
                stream["original"] = originals.store.read(originals.states[key])
                continue
            state = stream.after(layer_idx, stream.step(layers[layer_idx], layer_idx, stream["original"]))
            stream["original"] = state
            originals.keep(key, state)


def token_weights(batch: Batch, fit: Fit) -> Tensor:
    """Return weights [B, S] of mean 1 over the counted tokens: all alike, or text and answers with their own."""
    counted = counted_tokens(batch, fit.tokens).float()
    weights = counted
    if fit.share_of_text is not None and batch.is_visual.any() and batch.is_text.any():
        visual = batch.is_visual * ((1 - fit.share_of_text) / batch.is_visual.sum())
        weights = counted * (visual + batch.is_text * (fit.share_of_text / batch.is_text.sum()))
    if batch.is_answer is not None and fit.answer_weight != 1:
        weights = torch.where(batch.is_answer, weights * fit.answer_weight, weights)
    return weights * (counted.sum() / weights.sum().clamp(min=1e-12))


def _refit(
    job: FoldJob,
    layer_idx: int,
    modules: Sequence[str],
    streams: Sequence[Stream],
    folded: Folded,
    ridge: float | str | None,
) -> Folded:
    """Fit the modules' weights together so that the layer's output is closest to the original's state after it."""
    with replaced(job.model, _of_layer(folded, layer_idx)):
        sums = _sums(job, layer_idx, modules, streams, by_half=ridge == "auto")
        halves = [half.total() for half in sums]
        return ranks.from_first(lambda: _solved(job, layer_idx, modules, streams=streams, halves=halves, ridge=ridge))


def _sums(
    job: FoldJob, layer_idx: int, modules: Sequence[str], streams: Sequence[Stream], *, by_half: bool
) -> list[MomentSums]:
    """Return what the streams say of the regression, in halves of the pictures where these are to be told apart."""
    biases = [job.read(layer_idx, f"{module}.bias") for module in modules]  # these stay what they are
    if job.decoder.post_norm and any(bias is not None for bias in biases):
        raise FoldRefused(
            "fold 'reconstruction': this model has biases below the norms of its layers. Use --fold none."
        )

    def regressions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for stream in streams:
            inputs, targets, weights, half = _regression(job, layer_idx, modules, stream)
            targets = targets - sum(bias.to(targets) for bias in biases if bias is not None)
            yield inputs * weights, targets * weights, half

    rows = regressions()
    first = list(itertools.islice(rows, 1))  # none in a process without batches
    bounds = agreed(bounds_of(*first[0][:2]) if first else ())
    shapes = [_weight(job, layer_idx, module).shape for module in modules]
    predictors, targets = sum(shape[1] for shape in shapes), shapes[0][0]
    sums = [MomentSums(predictors, targets, bounds) for _ in range(1 + by_half)]
    for x, y, half in itertools.chain(first, rows):
        for moments, some in zip(sums, (~half, half) if by_half else (half | ~half,), strict=True):
            moments.add(x[some], y[some])
    return sums


def _solved(
    job: FoldJob,
    layer_idx: int,
    modules: Sequence[str],
    streams: Sequence[Stream],
    halves: Sequence[Moments],
    ridge: float | str | None,
) -> Folded:
    """Return the modules' new weights."""
    layer = text_decoder(job.model).layers[layer_idx]
    gains = [
        gain_of(layer.get_submodule(norm), streams[0]["smaller"]) if (norm := job.decoder.norm_behind(module)) else None
        for module in modules
    ]
    old = [_weight(job, layer_idx, module) for module in modules]
    pulled_to = torch.cat([effective(weight, gain) for weight, gain in zip(old, gains, strict=True)], dim=1)
    device = job.model.device if job.model.device.type == "cuda" else "cpu"  # others have no float64, or gain nothing
    new = torch.split(solve(halves, pulled_to, ridge, device), [weight.shape[1] for weight in old], dim=1)
    return {
        (layer_idx, f"{module}.weight"): below_the_norm(fitted, weight, gain).to(weight.dtype).contiguous()
        for module, fitted, weight, gain in zip(modules, new, old, gains, strict=True)
    }


def _refit_gain(
    job: FoldJob, layer_idx: int, norm: str, streams: Sequence[Stream], folded: Folded, ridge: float | str | None
) -> Tensor:
    """Return the weight of the norm behind the last matrix, with its gain refitted. [D]"""
    layer = text_decoder(job.model).layers[layer_idx]
    module = layer.get_submodule(norm)
    seen: list[Tensor] = []  # what the norm puts out
    added: list[tuple[Tensor, Tensor]] = []  # by each batch
    with replaced(job.model, _of_layer(folded, layer_idx)):
        with on_module(module, lambda _, put: seen.append(put)):
            for stream in streams:
                output = stream.step(layer, layer_idx, stream["smaller"])
                counted = stream.weights > 0
                missing = stream["original"] - stream.after(layer_idx, output)
                weights = stream.weights[counted][:, None]
                added.append(GainMoments.of_batch(seen.pop()[counted], missing[counted], weights))
        by_batch = ranks.gathered(added)

        def refitted() -> Tensor:
            sums = GainMoments(streams[0]["smaller"].shape[-1])
            for squares, products in by_batch:
                sums.add(squares, products)
            gain = gain_of(module, streams[0]["smaller"])
            weight: Tensor = module.weight.detach()
            change = sums.change(GAIN_RIDGE if isinstance(ridge, str) else RIDGE if ridge is None else ridge)
            solved: Tensor = (weight.double().cpu() + (change - 1) * gain).to(weight.dtype)
            return solved

        return ranks.from_first(refitted)


def _regression(
    job: FoldJob, layer_idx: int, modules: Sequence[str], stream: Stream
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs of the modules side by side [N, P], what they should add up to [N, D], roots of the weights [N, 1],
    and the half that each token's picture belongs to [N]. Inputs are over the root mean square where a norm follows."""
    layer = text_decoder(job.model).layers[layer_idx]
    seen: list[tuple[Tensor, Tensor]] = []
    put: list[Tensor] = []  # what the modules, or the norms behind them, put out
    with contextlib.ExitStack() as taps, torch.inference_mode():
        for module in modules:
            taps.enter_context(on_module(layer.get_submodule(module), lambda x, y: seen.append((x, y))))
            last = job.decoder.norm_behind(module) or module
            taps.enter_context(on_module(layer.get_submodule(last), lambda _, y: put.append(y)))
        output = stream.step(layer, layer_idx, stream["smaller"])
    inner = seen[-1][0]
    post_norm = job.decoder.post_norm
    if (
        not post_norm
        and list(modules) == [job.decoder.down_proj_of(layer_idx)]
        and inner.numel() * inner.element_size() * stream.num_batches <= INNER_BYTES
    ):
        stream["output"], stream["inner"] = output, inner
    counted = stream.weights > 0  # [B, S]
    missing = (stream["original"] - stream.after(layer_idx, output)) / job.multiplier
    targets = sum(put, missing)
    half = stream.half[:, None].expand_as(counted)[counted]
    with torch.inference_mode():
        inputs = torch.cat([(x / root_mean_square(y) if post_norm else x)[counted] for x, y in seen], -1)
    return inputs, targets[counted], stream.weights[counted].sqrt()[:, None], half


def _weight(job: FoldJob, layer_idx: int, module: str) -> Tensor:
    weight = job.read(layer_idx, f"{module}.weight")
    assert weight is not None, f"layer {layer_idx} has no {module}.weight"
    return weight


def _of_layer(folded: Folded, layer_idx: int) -> Folded:
    return {key: tensor for key, tensor in folded.items() if key[0] == layer_idx}


def fold_reconstruction(
    job: FoldJob,
    *,
    ridge: float | Literal["auto"] | None = None,
    share: float | None = None,
    text_share: float | None = None,
    answer_weight: float = 4.0,
    tokens: Literal["all", "prompt"] = "all",
    weights: tuple[Matrix, ...] = ("o_proj", "down_proj"),
) -> Folded:
    """Refit everything that stays behind the first gap, layer by layer.

    Args:
        ridge: pull towards the old weights, as a share of the inputs' mean square; None: as many tokens ask for, 0.03
            at least (`ridge_for`); 'auto' is chosen per matrix by two-fold cross-validation over pictures.
        share: of the calibration questions that is used; None: as many as make it cost about one forward pass over all.
        text_share: share of the regression's weight that text tokens have together; None: every token alike.
        answer_weight: of a token of an answer, beside 1 for one of the prompt.
        tokens: 'all', or those of the 'prompt' only.
        weights: which output matrices of a layer are refitted: 'o_proj', 'down_proj' or both.
    """
    fit = Fit(ridge, text_share, answer_weight, tokens)
    kinds = [kind for kind in MATRICES if kind in weights]
    return side_by_side(job.model, [reconstructing(job, share, fit, kinds)])[0]


def reconstructing(
    job: FoldJob, share: float | None = None, fit: Fit = Fit(), kinds: Sequence[str] = MATRICES
) -> Task[Folded]:
    """Walk both models through the calibration data together, refitting maps of each kept layer on the way.

    Args:
        kinds: of maps: 'o_proj', 'down_proj' or both, under the names that each layer has for them.
    """
    job.refuse_unfoldable("reconstruction")
    batches = job.batches(refitted_share(job.plan) if share is None else share)
    with originals_of(job.model, batches) as originals:
        return (yield from steps(job, fit, originals, kinds))


def refits(decoder: Decoder, inner_bytes: float) -> int:
    """Return how often a layer is run to be refitted: for each matrix, and a norm, and for the state behind it.

    Args:
        inner_bytes: of the inputs of its down_proj, over all questions that are fitted on.
    """
    if decoder.post_norm:
        return 4
    return 2 if inner_bytes <= INNER_BYTES else 3


def refitting(size: JobSize) -> float:
    """Return the passes of a question: in all layers, and again in those that are refitted."""
    return 1 + size.refits * SUFFIX


def passes(size: JobSize, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return what it costs."""
    return refitted_share(size.plan) * refitting(size), 1.0
