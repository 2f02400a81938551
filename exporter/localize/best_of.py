"""Best of: what several localizers propose, improved by exchanges, and judged as it will be used: folded, on held-out
questions.

Cosines look at one layer at a time: they misrank layers in ways that differ from model to model, and take two that
make up for each other. What leaving a set out does to the last states ranks sets better, and says which few are worth
folding. A greedy search by it finds layers that no ranking names, on a dozen questions. The few are folded and judged
on growing numbers of held-out questions (successive halving; K. Jamieson and A. Talwalkar, 2016), by the same error
unless the answers speak against it: every token adds to the error, where these hang on the few that go wrong.

Shapes: L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..methods import localizer_row, resolve
from ..models.answers import StateError
from ..models.capture import BatchStatistics, layer_statistics
from ..models.divergence import most_faithful
from ..models.originals import ON_DISK_BYTES, originals_of, sweep_on
from ..models.questions import SUFFIX, JobSize, portion
from ..models.residency import ranges_of
from ..models.sweep import Change, Passed
from .greedy import greedy, search_size
from .job import FoldedLoss, LocalizeJob, SetLoss
from .judged import JudgedSets, KeptLoss
from .scores import LayerScores, most_redundant
from .spacing import spaced, spacing_wanted

PROPOSERS = ("tis", "block_influence", "angular")  # from one pass; which ones was decided by measurement
WIDTH = 6  # layers that the greedy search looks at again after each removal
STEPS = 4  # of the greedy search, at most
EXCHANGES, SEARCHED = 2, 1  # exchanges at most; behind a search, which has looked at most of them
AHEAD = 64  # sets that are judged at most before they are asked for, to spare a walk: many cost more than it
SETS_PASSES = 0.5  # that judging sets without a fold may cost: fewer questions judge where there are more sets
FEWEST = 6  # questions that judge them
SPARE = 2  # layers that each ranking names beyond those that are to go: what may be exchanged for others
ROUNDS = ((4, "judge_sets"), (2, "judge_few_sets"))  # sets that are judged with a fold, and by which questions


def best_of(
    statistics: Sequence[BatchStatistics],
    count: int,
    protect: tuple[int, ...],
    loss: SetLoss,
    exchanges: int = EXCHANGES,
    folded: FoldedLoss | None = None,
    search: bool = False,
    ahead: bool = False,
) -> LayerScores:
    """Return the set that folds best; without a fold to judge by, that of the lowest loss.

    Values are those of the localizer whose proposal had the lowest loss.

    Args:
        loss: how far the model's last states are from the original's without each of some sets of layers.
        exchanges: at most so many, each for as many sets judged as layers are named by any ranking.
        folded: judges sets with a fold; None: the loss decides.
        search: whether a greedy search proposes a set too.
        ahead: judge sets that may be asked for next with those before them: more of them, in fewer rounds.
    """
    proposed = _proposals(statistics, count, protect)
    sets = {name: frozenset(scores.drop) for name, scores in proposed.items()}
    if spacing_wanted(count, loss.num_layers):
        sets["spacing"] = frozenset(spaced(loss.num_layers, count, protect))
    known: dict[frozenset[int], float] = {}
    asks_next, alone = ahead and exchanges > 0, [frozenset({layer}) for layer in range(loss.num_layers)]
    first = [*sets.values(), *(_next_asked(sets.values()) if asks_next else []), *(alone if search else [])]
    _judge(known, loss, first)
    remembered = KeptLoss(lambda: loss, loss.num_layers, JudgedSets(losses=known))
    searched = greedy(remembered, count, protect, width=WIDTH, steps=STEPS).drop if search else ()
    if search:
        sets["greedy"] = frozenset(searched)
    shown = min(proposed.values(), key=lambda scores: known[frozenset(scores.drop)])
    named = {layer for scores in proposed.values() for layer in candidates(scores, count, protect)}.union(searched)
    start = min(sets.values(), key=lambda layers: known[layers])
    drop, swaps = exchanged(start, named, known=known, loss=loss, exchanges=exchanges, ahead=ahead)
    details: dict[str, Any] = {
        "chosen": shown.method,
        "proposals": {name: {"drop": sorted(layers), "loss": known[layers]} for name, layers in sets.items()},
        "exchanges": swaps,
    }
    if folded is not None and count:
        drop, details["rounds"] = halved([drop, *sets.values()], known, folded, count)
    in_order = tuple(sorted(drop, key=lambda layer: (-shown.values[layer], -layer)))
    return LayerScores("best_of", shown.values, in_order, details)


def _proposals(statistics: Sequence[BatchStatistics], count: int, protect: tuple[int, ...]) -> dict[str, LayerScores]:
    proposed: dict[str, LayerScores] = {}
    for name in PROPOSERS:
        row = localizer_row(name)
        try:
            proposed[name] = resolve(row.run)(statistics, count, protect)
        except InputError:
            # No block between protected layers is long enough, or no attention shows what it looks at: the others do.
            if not (row.of_blocks or row.attention):
                raise
    return proposed


def _judge(known: dict[frozenset[int], float], loss: SetLoss, sets: Sequence[frozenset[int]]) -> None:
    """Add the losses of the sets that are not known yet."""
    fresh = list(dict.fromkeys(layers for layers in sets if layers not in known))
    if fresh:
        known.update(zip(fresh, loss.of_sets(fresh), strict=True))


def candidates(scores: LayerScores, count: int, protect: tuple[int, ...]) -> set[int]:
    """Return what a localizer proposes to drop, and would propose next; values of blocks say nothing of the latter."""
    if localizer_row(scores.method).of_blocks:
        return set(scores.drop)
    return {*scores.drop, *most_redundant(scores.values, count + SPARE, protect)}


def exchanged(
    dropped: frozenset[int],
    named: set[int],
    known: dict[frozenset[int], float],
    loss: SetLoss,
    exchanges: int,
    ahead: bool = False,
) -> tuple[frozenset[int], list[dict[str, Any]]]:
    """Put back the layer that is missed most and drop the one that is missed least in its place, while that helps.

    Args:
        known: losses of sets judged so far; those that are judged here are added.
        ahead: judge with the sets of an exchange those that the next one begins with.
    """
    swaps: list[dict[str, Any]] = []
    while dropped and named - dropped and len(swaps) < exchanges:
        fewer_sets = dict(zip(sorted(dropped), _fewer(dropped), strict=True))
        _judge(known, loss, list(fewer_sets.values()))
        back = min(fewer_sets, key=lambda layer: known[fewer_sets[layer]])
        fewer = fewer_sets[back]
        sets = {layer: fewer | {layer} for layer in sorted(named - dropped)}
        asks_next = ahead and len(swaps) + 1 < exchanges
        _judge(known, loss, [*sets.values(), *(_next_asked(sets.values()) if asks_next else [])])
        instead = min(sets, key=lambda layer: known[sets[layer]])
        if known[sets[instead]] >= known[dropped]:
            break
        dropped = sets[instead]
        swaps.append({"back": back, "instead": instead, "loss": known[dropped]})
    return dropped, swaps


def _fewer(layers: frozenset[int]) -> list[frozenset[int]]:
    """Return the sets with one layer less, in the order of the layers."""
    return [layers - {layer} for layer in sorted(layers)]


def _next_asked(sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Return what an exchange that begins with one of the sets judges first; nothing where that is too many."""
    fewer = [layers for several in sets for layers in _fewer(several)]
    return fewer if len(fewer) <= AHEAD else []


def halved(
    first: Sequence[frozenset[int]], known: dict[frozenset[int], float], folded: FoldedLoss, count: int
) -> tuple[frozenset[int], list[dict[str, Any]]]:
    """Choose, from the first sets and the cheapest others known, the one that folds best on held-out questions."""
    others = sorted((layers for layers in known if len(layers) == count), key=lambda layers: known[layers])
    remaining = list(dict.fromkeys([others[0], *first, *others]))
    remaining.sort(key=lambda layers: known[layers])
    rounds: list[dict[str, Any]] = []
    for (number, judged_by), then in zip(ROUNDS, (ROUNDS[1][1], None), strict=True):
        remaining = remaining[:number]
        judged = dict(zip(remaining, folded.of_folded(remaining, judged_by, then), strict=True))
        remaining.sort(key=lambda layers: judged[layers].state_error)
        chosen = remaining[most_faithful([judged[layers] for layers in remaining])]
        sets = [
            {
                "drop": sorted(layers),
                **judged[layers].compared_with(judged[chosen]),
                **judged[layers].to_data(),
            }
            for layers in remaining
        ]
        rounds.append({"chosen": sorted(chosen), "sets": sets})
        remaining.sort(key=lambda layers: (layers != chosen, judged[layers].state_error))
    return remaining[0], rounds


def by_best_of(
    job: LocalizeJob,
    count: int,
    protect: Sequence[int],
    *,
    samples: int | None = None,
    judged_by: int | None = None,
    exchanges: int | None = None,
    folded: bool = True,
    search: bool | None = None,
) -> LayerScores:
    """Choose the set that folds best, from a part of the questions.

    Args:
        samples: questions that rankings are read from; None: one in 32.
        judged_by: questions that sets are judged by without a fold; None: one in 32 or fewer, see `Effort`.
        exchanges: at most; None: two, or one where a search was made.
        folded: whether the last few sets are judged with a fold, on held-out questions.
        search: whether a greedy search proposes a set too; None: where enough questions
            can be afforded to judge its sets by.
    """
    questions = job.required_questions
    samples = samples or questions.portion("rank")
    effort = Effort.of(len(questions.samples), job.num_layers, count, exchanges=exchanges, search=search)
    judged_by = judged_by or effort.judges
    batches = list(questions.batches("score layers", part="fit", number=samples))
    statistics = list(layer_statistics(job.model, batches))
    judge = job.folded if folded else None
    with contextlib.ExitStack() as stack:
        loss = job.kept_loss(lambda: _state_error(job, judged_by, judge, stack), job.num_layers)
        scores = best_of(
            statistics,
            count,
            protect=tuple(protect),
            loss=loss,
            exchanges=effort.exchanges,
            folded=judge,
            search=effort.search,
            ahead=ranges_of(job.model) is not None,
        )
    read = len(questions.indices("fit", max(samples, judged_by)))
    if judge is not None:
        fitted_on = questions.indices("fit", max(samples, judged_by, questions.portion("fold_sets")))
        read = len(fitted_on) + len(questions.indices("held_out", questions.portion("judge_few_sets")))
    return replace(scores, details=scores.details | {"questions": read})


def _state_error(job: LocalizeJob, judged_by: int, judge: FoldedLoss | None, stack: contextlib.ExitStack) -> StateError:
    """Return what judges sets without a fold; where layers lie on disk, from states of the original that are kept.

    Then only the layers behind the first one that a set leaves out are read, and the first walk takes the original
    along on what sets are folded on later.

    Args:
        stack: at whose end nothing is kept any more.
    """
    questions = job.required_questions
    few = list(questions.batches("score layers", part="fit", number=judged_by))
    if ranges_of(job.model) is None:
        return StateError.of(job.model, few, questions.progress)
    originals = stack.enter_context(originals_of(job.model, few, ON_DISK_BYTES))
    waiting = [] if judge is None else [stack.enter_context(judge.read_before())]

    def walks(changes: Sequence[Change]) -> Iterator[Passed]:
        return sweep_on(job.model, originals, changes, along=waiting.pop() if waiting else None)

    few = [lane.batch for lane in originals.lanes]  # without what the vision tower was given
    return StateError.of(job.model, few, questions.progress, walks)


@dataclass(frozen=True)
class Effort:
    """How sets of layers are looked for without a fold, and by how many questions they are judged."""

    questions: int
    num_layers: int
    count: int
    exchanges: int
    search: bool

    @classmethod
    def of(
        cls, questions: int, num_layers: int, count: int, exchanges: int | None = None, search: bool | None = None
    ) -> Effort:
        """Return the effort; None: a search where FEWEST questions can be afforded for it, then fewer exchanges."""
        if search is None:
            tried = cls.of(questions, num_layers, count, exchanges=exchanges, search=True)
            search = tried.affordable >= FEWEST
        if exchanges is None:
            exchanges = SEARCHED if search else EXCHANGES
        return cls(questions=questions, num_layers=num_layers, count=count, exchanges=exchanges, search=search)

    @property
    def sets(self) -> int:
        """Return how many sets of layers are judged without a fold, at most."""
        searched = search_size(self.num_layers, self.count, WIDTH, STEPS)[0] if self.search else 0
        return len(PROPOSERS) + 1 + searched + self.exchanges * (2 * self.count + SPARE)

    @property
    def _ahead(self) -> list[int]:
        """Return how many sets are judged ahead in the first walk, and in each exchange but the last, at most."""
        first, others = (len(PROPOSERS) + 1) * self.count, (self.count + SPARE) * self.count
        numbers = [first, *[others] * (self.exchanges - 1)] if self.exchanges else []
        return [number if number <= AHEAD else 0 for number in numbers]

    @property
    def sets_ahead(self) -> int:
        """Return how many sets are judged beside these so that fewer walks are made, at most."""
        return sum(self._ahead)

    @property
    def affordable(self) -> int:
        """Return how many questions SETS_PASSES pays for."""
        return int(SETS_PASSES * self.questions / (self.sets * SUFFIX))

    @property
    def judges(self) -> int:
        """Return how many questions judge the sets: a part of all at most."""
        return min(portion("sets", self.questions), max(FEWEST, self.affordable))

    @property
    def walks(self) -> int:
        """Return how often the weights are read to judge the sets."""
        spared = [number > 0 for number in self._ahead]
        if not self.search:
            return 1 + 2 * self.exchanges - sum(spared)
        # each layer alone is judged with the rankings' sets; the first exchange begins with a set not known before
        searched = search_size(self.num_layers, self.count, WIDTH, STEPS)[1]
        return searched + 2 * self.exchanges - sum(spared[1:])


def passes(size: JobSize, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return what it costs: rankings, sets without a fold, and the best of them with one."""
    used = size.share("fit") + size.share("held_out")
    effort = _effort(size, options)
    judged_by = options.get("judged_by") or effort.judges
    sets = effort.sets + (effort.sets_ahead if size.streamed else 0)
    cost = 1.15 * size.share("rank") + judged_by / size.questions * (1 + sets * SUFFIX)
    if options.get("folded", True) and size.judges:
        first, few = (number for number, _ in ROUNDS)
        judge_first, judge_few = size.share("judge_sets"), size.share("judge_few_sets")
        cost += size.share("fold_sets") * (1 + first * 2 * SUFFIX)
        cost += judge_first * (1 + first * SUFFIX)
        then = first if size.streamed else few  # the few know what the first questions say
        cost += max(0.0, judge_few - judge_first) * (1 + then * SUFFIX)
    return cost, used


def sweeps(size: JobSize, options: Mapping[str, Any]) -> tuple[float, ...]:
    """Return which shares of the layers are read: by rankings, by each judgement, by the folds of sets.

    Behind the first judgement, which the original takes part in, they are read from the first layer that a set leaves
    out; the folds of sets are judged in one pass, whatever the rounds.
    """
    folded = (SUFFIX, 1.0) if options.get("folded", True) and size.judges else ()
    return 1.0, 1.0, *[SUFFIX] * (_effort(size, options).walks - 1), *folded


def _effort(size: JobSize, options: Mapping[str, Any]) -> Effort:
    exchanges, search = options.get("exchanges"), options.get("search")
    return Effort.of(size.questions, size.plan.num_layers, size.drop, exchanges=exchanges, search=search)
