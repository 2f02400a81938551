"""The inputs of every fold, and the one pass over the calibration data that measures what a gap has lost.

Shapes: B samples, S tokens, N counted tokens, D hidden size, I intermediate size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import ranks
from ..data.batches import Batch
from ..data.samples import Sample
from ..errors import InputError
from ..families import Decoder
from ..localize.tis import important
from ..models.boundary import Kept, StateStore
from ..models.capture import AttentionMeans, AttentionReducer, aim, attention_means, on_module
from ..models.journal import Sums
from ..models.loading import text_decoder
from ..models.residency import ranges_of
from ..models.side_by_side import Task, side_by_side
from ..models.sweep import Lane, store_for, sweeping
from ..plan import PruningPlan
from .held_out import HeldOut
from .moments import ExactSum, Moments, MomentSums, agreed, bounds_of


class FoldRefused(InputError):  # noqa: N818 - like CheckFailed, what was found and no fault
    """A fold that this family of models does not take."""


@dataclass(frozen=True)
class FoldJob:
    """A plan to be made up for, with the data and the weights to do it."""

    model: Any
    batches: Callable[..., Iterable[Batch]]  # of a share of the questions; of all of them if none is given
    plan: PruningPlan
    read: Callable[[int, str], Tensor | None]  # a layer's tensor by name, from disk; None where there is none
    decoder: Decoder
    multiplier: float = 1.0  # of what a block adds to the residual stream
    memo: GapMemo = field(default_factory=lambda: GapMemo())  # gaps measured before, for folds that share a model
    held_out: HeldOut | None = None  # questions to choose a fold by; None: there are none
    half_of: Callable[[Sample], bool] = lambda sample: False  # which half of the pictures a question belongs to
    report: dict[str, Any] = field(default_factory=dict)  # what a fold has to say of itself, for the record

    @property
    def gaps(self) -> dict[int, tuple[int, ...]]:
        """Return the kept layer before each gap, and the gap. A gap that begins at layer 0 has none."""
        return {gap[0] - 1: gap for gap in self.plan.gaps if gap[0] > 0}

    def width_of(self, layer_idx: int) -> int:
        """Return how many outputs the last matrix of a layer has."""
        weight = self.read(layer_idx, f"{self.decoder.down_proj_of(layer_idx)}.weight")
        assert weight is not None
        return len(weight)

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
    """The effect of one gap's layers, seen from the kept layer before it. The first process alone has it."""

    differences: list[Tensor]  # [D, D] HᵀH, H = X^p - X^r, of the last dropped layer p, or of each one of the run
    mlp: Moments  # predictors: the MLP's output M [N, D]; targets: M + H, what it should have been
    directions: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # [D, k] of a difference, once known


class GapMemo:
    """Gaps that were measured, for all folds that read them: each is three matrices and more of [D, D] in float64.

    Args:
        store: keeps them; None: all in memory.
    """

    def __init__(self, store: StateStore | None = None) -> None:
        self._store = StateStore() if store is None else store
        self._kept: dict[Any, tuple[Any, int, dict[tuple[int, int], Tensor]]] = {}

    def __contains__(self, key: Any) -> bool:
        return key in self._kept

    def keep(self, key: Any, gap: GapMoments) -> None:
        """Keep what was measured of a gap."""
        tensors = self._store.park((gap.differences, gap.mlp.xx, gap.mlp.xy, gap.mlp.yy))
        self._kept[key] = tensors, gap.mlp.count, gap.directions

    def told(self, key: Any) -> list[Any]:
        """Return what was measured of a gap, for a pass that goes on from here later."""
        gap = self.read(key)
        return [gap.differences, gap.mlp.xx, gap.mlp.xy, gap.mlp.yy, gap.mlp.count]

    def take_up(self, key: Any, told: Sequence[Any]) -> None:
        """Keep what another was told of."""
        differences, *moments = told
        self.keep(key, GapMoments(differences, Moments(*moments)))

    def read(self, key: Any) -> GapMoments:
        """Return what was measured of a gap."""
        tensors, count, directions = self._kept[key]
        differences, xx, xy, yy = self._store.fetch(tensors)
        return GapMoments(differences, Moments(xx, xy, yy, count), directions)


@contextlib.contextmanager
def gap_memo(model: Any) -> Iterator[GapMemo]:
    """Give a memo, that keeps gaps in a file where layers lie on disk."""
    with StateStore(None if ranges_of(model) is None else 0) as store:
        yield GapMemo(store)


@dataclass(frozen=True)
class Gaps(Mapping[int, GapMoments]):
    """The gaps of a plan by the kept layer before each; one is read when it is asked for."""

    memo: GapMemo
    keys_of: dict[int, Any]  # in the memo

    def __getitem__(self, kept: int) -> GapMoments:
        return self.memo.read(self.keys_of[kept])

    def __iter__(self) -> Iterator[int]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


class GapSums:
    """Adds up what batches say of one gap.

    Args:
        bounds: of the first batch, for each difference and for the two sides of the regression.
    """

    def __init__(self, width: int, bounds: Sequence[float]) -> None:
        *of_differences, of_x, of_y = bounds
        self.differences = [ExactSum(width, width, largest=largest) for largest in of_differences]
        self.mlp = MomentSums(width, width, (of_x, of_y))

    @staticmethod
    def rows(gap: Gap, counted: Tensor, multiplier: float) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the counted tokens [B, S] of one batch: differences, the MLP's outputs and their targets, [N, D]."""
        mlp = gap.mlp[counted].float()
        differences = [added[counted].float() for added in gap.added]
        return differences, mlp, mlp + differences[-1] / multiplier

    @staticmethod
    def bounds_of(differences: Sequence[Tensor], mlp: Tensor, target: Tensor) -> tuple[float, ...]:
        return *(bounds_of(difference, difference)[0] for difference in differences), *bounds_of(mlp, target)

    def add(self, differences: Sequence[Tensor], mlp: Tensor, target: Tensor) -> None:
        for total, difference in zip(self.differences, differences, strict=True):
            total.add(difference.T @ difference)
        self.mlp.add(mlp, target)

    def told(self) -> list[Any]:
        """Return all of the sums so far, for a pass that goes on from here later."""
        return [[difference.told() for difference in self.differences], self.mlp.told()]

    @classmethod
    def of(cls, told: Sequence[Any]) -> GapSums:
        """Return those that were told."""
        differences, mlp = told
        sums = cls(1, (0.0,) * (len(differences) + 2))
        for some, of_another in zip(sums.differences, differences, strict=True):
            some.take_up(of_another)
        sums.mlp.take_up(mlp)
        return sums

    def total(self) -> GapMoments:
        return GapMoments([difference.total() for difference in self.differences], self.mlp.total())


def counted_tokens(batch: Batch, tokens: str) -> Tensor:
    """Return [B, S] 'all' tokens but padding and special ones, or those of the 'prompt' only."""
    counted = batch.is_visual | batch.is_text
    return counted & ~batch.is_answer if tokens == "prompt" and batch.is_answer is not None else counted


def measure_gaps(job: FoldJob, *, tokens: str = "all", p: float = 0.5, each: bool = False) -> Gaps:
    """Measure gaps in one pass over the data, up to the last dropped layer; none for gaps that were measured before.

    Args:
        tokens: which are counted: 'all' but padding and special ones, those of the 'prompt', or the 'important' ones of
            the dropped layer.
        each: differences after every dropped layer of a gap, not only after its last.
    """
    return side_by_side(job.model, [measuring(job, tokens, p=p, each=each)])[0]


def measuring(job: FoldJob, tokens: str = "all", *, p: float = 0.5, each: bool = False) -> Task[Gaps]:
    """Measure gaps as `measure_gaps` does, as a task that others may run beside: of 'important' tokens none may."""
    keys = {kept: (kept, dropped, tokens, p, each) for kept, dropped in job.gaps.items()}
    unmeasured = {kept: dropped for kept, dropped in job.gaps.items() if keys[kept] not in job.memo}
    sums: dict[int, GapSums] = {}
    added: Counter[int] = Counter()  # batches, by gap
    entered: list[Batch] = []  # those that are on their way, without what the vision tower was given
    at_once = ranges_of(job.model) is not None and ranks.world() == 1  # a layer runs for all batches, and is done

    def add(batch: Batch, kept: int, gap: Gap) -> None:
        rows = GapSums.rows(gap, gap.counted(batch, tokens, p), job.multiplier)
        if kept not in sums:
            sums[kept] = GapSums(gap.mlp.shape[-1], agreed(GapSums.bounds_of(*rows)))
        sums[kept].add(*rows)
        added[kept] += 1
        if at_once and added[kept] == len(entered):
            job.memo.keep(keys[kept], sums.pop(kept).total())

    def told() -> list[Any]:
        closed = {kept: job.memo.told(keys[kept]) for kept in unmeasured if keys[kept] in job.memo}
        return [{kept: some.told() for kept, some in sums.items()}, dict(added), closed]

    def take_up(told: Sequence[Any]) -> None:
        of_open, of_batches, closed = told
        sums.update({kept: GapSums.of(some) for kept, some in of_open.items()})
        added.update(of_batches)
        for kept, gap in closed.items():
            job.memo.take_up(keys[kept], gap)

    def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            entered.append(dataclasses.replace(batch, inputs={}))
            yield batch

    if unmeasured:
        batches = counted(job.batches())  # before attention is changed: the model may have to answer them first
        with attention_means(job.model) if tokens == "important" else contextlib.nullcontext() as reducer:
            taken = Sums(f"gaps {sorted(keys.items())}", told, take_up)
            yield from _cross(job, unmeasured, batches, reducer, each=each, add=add, taken=taken)
        for kept in sorted(unmeasured.keys() - added.keys()):  # of a process that had no batch
            sums[kept] = GapSums(job.width_of(kept), agreed(()))
    for kept in unmeasured:
        if keys[kept] not in job.memo:
            job.memo.keep(keys[kept], sums.pop(kept).total())
    return Gaps(job.memo, keys)


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


@dataclass
class _Crossing:
    """What is kept of one batch while a gap is crossed."""

    mlp: Kept  # [B, S, D]
    entered: Kept | None = None  # [B, S, D]
    added: list[Kept] = field(default_factory=list)

    def told(self, store: StateStore) -> list[Any]:
        """Return all of it, for a pass that goes on from here later."""
        return [None if kept is None else store.read(kept) for kept in (self.mlp, self.entered, *self.added)]

    @classmethod
    def of(cls, told: Sequence[Any], store: StateStore) -> _Crossing:
        """Keep what another was told of."""
        mlp, entered, *added = [None if state is None else store.keep(state) for state in told]
        assert mlp is not None
        return cls(mlp, entered, [state for state in added if state is not None])

    def take(self, store: StateStore, means: AttentionMeans | None) -> Gap:
        """Return the gap, and keep nothing of it."""
        gap = Gap(store.read(self.mlp), tuple(map(store.read, self.added)), means)
        for kept in (self.mlp, self.entered, *self.added):
            if kept is not None:
                store.drop(kept)
        return gap


def _cross(
    job: FoldJob,
    gaps: dict[int, tuple[int, ...]],
    batches: Iterable[Batch],
    reducer: AttentionReducer | None,
    *,
    each: bool,
    add: Callable[[Batch, int, Gap], None],
    taken: Sums,
) -> Task[None]:
    """Run the batches up to the last dropped layer; hand on what each gap's moments are made of, as it closes.

    Args:
        taken: what `add` has made of that.
    """
    layers = text_decoder(job.model).layers
    before_gap = {layer: kept for kept, dropped in gaps.items() for layer in dropped}
    tapped: list[Tensor] = []
    running: list[Batch] = []  # here: in another task's pass through the layer nothing is tapped
    crossing: dict[tuple[int, int], _Crossing] = {}  # by batch and kept layer

    def seen(lane: Lane, layer_idx: int, before: Tensor, after: Tensor) -> None:
        running.clear()
        means = reducer.take_any() if reducer is not None else None
        if layer_idx - 1 in gaps:
            crossing[lane.number, layer_idx - 1].entered = store.keep(before)
        if layer_idx in gaps:
            crossing[lane.number, layer_idx] = _Crossing(store.keep(tapped.pop()))
        if layer_idx not in before_gap:
            return
        kept = before_gap[layer_idx]
        is_last = layer_idx == gaps[kept][-1]
        gap = crossing[lane.number, kept]
        if each or is_last:
            assert gap.entered is not None
            gap.added.append(store.keep(after - store.read(gap.entered)))
        if is_last:
            add(lane.plain, kept, crossing.pop((lane.number, kept)).take(store, means))

    def before(batch: Batch) -> None:
        running.append(batch)
        aim(reducer, batch)

    def take_up(told: Sequence[Any]) -> None:
        of_gaps, crossed = told
        crossing.update({(number, kept): _Crossing.of(states, store) for number, kept, states in crossed})
        taken.take_up(of_gaps)

    sums = Sums(
        taken.name,
        lambda: [taken.told(), [[*key, some.told(store)] for key, some in crossing.items()]],
        take_up,
    )

    def tap(_: Tensor, put: Tensor) -> None:
        if running:
            tapped.append(put)

    with store_for(job.model) as store, contextlib.ExitStack() as taps:
        for kept in gaps:
            module = layers[kept].get_submodule(job.decoder.down_proj_of(kept) or "")
            taps.enter_context(on_module(module, tap))
        last = max(dropped[-1] for dropped in gaps.values())
        yield from sweeping(job.model, batches, before=before, seen=seen, stop=last + 1, sums=sums)
