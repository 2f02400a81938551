"""The search, top to bottom: what the original takes, what candidates are expected to, the few that matter measured.

Layers removed, healed or not, a router's budget and int8 weights are combined. Speed is expected from the original
itself, timed without some of its layers; loss from held-out questions when layers go. What is promising is made and
measured: its answer timed in turn with the original's, its answers to the task's questions counted.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints.temporary import LOCK, held
from ..errors import CheckFailed, InputError
from ..evaluation.metrics.table import METRICS
from ..evaluation.scoring import Rate
from ..progress import Progress, silent
from ..publishing.folder_kinds import verify
from ..recipe import RunOptions
from .answer_cost import AnswerCost
from .candidate import Candidate, Mix, mixes
from .goal import SearchRecipe
from .job import SearchJob, prepare_search, step_costs
from .prediction import Predictor, wanted_candidates
from .report import write_report
from .result import MeasuredCandidate, SearchResult, choice, nearest_ones
from .steps_file import MEASURED, ORIGINAL, PASSED, StepsFile, candidate_data
from .workshop import Workshop

logger = logging.getLogger(__name__)
MOST_OF_A_MIX = 3  # candidates of a mix that are measured for one goal
RETREATS = 3  # candidates that are tried, with ever fewer layers gone, for one that loses little
HOPELESS = 3.0  # times the loss that is allowed: what is expected to lose more is not measured before it is healed
LEAST_LOSS = 0.5  # points below which an allowed loss is not counted, there
CHOSEN, NEAREST, WORK, ANSWERS = "chosen", "nearest", "work", "answers.jsonl"


def search(
    recipe: SearchRecipe,
    out: Path | str,
    options: RunOptions = RunOptions(batch_size=16),
    minutes: float | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Search for the model that reaches a goal and loses least; write it, and what else was found, into `out`.

    Args:
        minutes: that this call may take. A step begins only if it should end in time, and is not broken off. A second
            call with the same arguments goes on.
    Returns: what was found; its `met` says whether a candidate reaches the goal. That one is in `out`/chosen; if none
        does, the nearest is in `out`/nearest.
    Raises: InputError for wrong input, and for a folder that holds another search.
    """
    out, begin = Path(out), time.monotonic()
    if minutes is not None and not 0 < minutes < 1e6:
        raise InputError(f"time={minutes:g}: minutes above 0 are needed.")
    job = prepare_search(recipe, options, progress)
    steps = StepsFile(out, job.depends_on())
    steps.begin()
    with held(out, "another run is searching"):
        shop = Workshop(job, out / WORK, answers=out / ANSWERS, costs=step_costs(job), progress=progress)
        run = SearchRun(job, steps, shop, None if minutes is None else begin + 60 * minutes)
        run.take_back(out)
        try:
            run.look_at_original()
        except InputError:  # nothing was found out yet
            shutil.rmtree(out, ignore_errors=True)
            raise
        run.look_at_candidates()
        result = run.result(out, time.monotonic() - begin)
        write_report(result, recipe)
        (out / LOCK).unlink(missing_ok=True)
    return result


@dataclass
class SearchRun:
    """A search that goes on."""

    job: SearchJob
    steps: StepsFile
    shop: Workshop
    deadline: float | None
    not_reached: list[Candidate] = field(default_factory=list)
    failed: dict[Candidate, str] = field(default_factory=dict)  # in this call: what was wrong may be mended by the next

    # the original

    def look_at_original(self) -> None:
        """Put the task to the original, and time its answer with all layers and without some of them."""
        if self.steps.original is not None:
            return
        begin = time.monotonic()
        model = Path(self.job.recipe.model)
        correct, answers = self.shop.answered(model)
        if not any(correct):
            raise InputError(
                f"{model} answers none of the {len(correct)} questions right, so that no loss can be measured."
            )
        encode = self.job.compression.processor.tokenizer.encode
        lengths = [len(encode(answer, add_special_tokens=False)) for answer in answers]
        tokens = max(1, round(sum(lengths) / len(lengths)))  # after the first one: the end token is one of them
        probed = self.shop.probe(tokens)
        told = {"correct": [int(right) for right in correct], "answer_tokens": tokens, **probed}
        self.steps.add({"step": ORIGINAL, **told, "seconds": round(time.monotonic() - begin, 1)})

    @property
    def original(self) -> dict[str, Any]:
        told = self.steps.original
        assert told is not None
        return told

    def predictor(self) -> Predictor:
        """Return what is expected, with all that was measured taken in."""
        layers, depths = self.job.compression.source.num_layers, self.original["depths"]
        at = {int(gone): values for gone, values in depths.items()}
        rough = self.job.predictor()
        if len(at) > 1:
            times, operations = (
                AnswerCost.fitted(layers, {gone: values[unit] for gone, values in at.items()})
                for unit in ("ms", "flops")
            )
        else:
            times, operations = (rough.times.scaled(rough.question, at[0][unit]) for unit in ("ms", "flops"))
        question = self.job.question(self.original["answer_tokens"])
        sizes = replace(rough.sizes, beyond=self.original["beyond"])
        expected = Predictor(sizes, question, times, operations, timed=True)
        for candidate, step in self.steps.of_kind(MEASURED).items():
            expected.learn(candidate, step["figures"])
        return expected

    # candidates

    @property
    def candidates(self) -> list[MeasuredCandidate]:
        original = self.original["correct"]
        return [
            MeasuredCandidate.of(candidate, step, original) for candidate, step in self.steps.of_kind(MEASURED).items()
        ]

    def look_at_candidates(self) -> None:
        """Make and measure one candidate after the other, until none is worth it or the time is up."""
        self.not_reached = []
        self.shop.costs.add("measure", self.original["seconds"])
        for known in self.steps.of_kind(MEASURED).values():
            for name, seconds in known["seconds"].items():
                self.shop.costs.add(name, seconds)
        for candidate in self._next_ones():
            seconds = self.shop.costs.seconds_of(candidate, self.shop.folders)
            if self.deadline is not None and time.monotonic() + seconds > self.deadline:
                self.not_reached.append(candidate)
                continue
            try:
                self._look_at(candidate)
            except (InputError, CheckFailed) as error:
                logger.warning("%s is left out: %s", candidate.label, error)
                self.failed[candidate] = str(error)

    def _next_ones(self) -> Iterator[Candidate]:
        """Yield what is to be looked at next, each time by all that is known by then."""
        while True:
            seen = self.steps.done | {*self.not_reached, *self.failed}
            todo = [candidate for candidate in self.worth() if candidate not in seen]
            if not todo:
                todo = [candidate for candidate in self._retreat() if candidate not in seen]
            if not todo:
                return
            self.shop.prune([*todo, *self._best()])
            yield todo[0]

    def worth(self) -> list[Candidate]:
        """Return the candidates that are worth making, seen or not, as far as is known now."""
        goal, candidates = self.job.recipe.goal, self.candidates
        missed = [measured.candidate for measured in candidates if not goal.met(measured.figures)]
        given_up = {candidate.mix for candidate in self.failed}
        possible = [mix for mix in mixes(self.job.available) if mix not in given_up]
        worthwhile = wanted_candidates(self.predictor(), goal, possible, missed)
        if goal.target is None:
            return worthwhile
        counts: dict[Mix, int] = {}
        for measured in candidates:
            counts[measured.candidate.mix] = counts.get(measured.candidate.mix, 0) + 1
        return [candidate for candidate in worthwhile if counts.get(candidate.mix, 0) < MOST_OF_A_MIX]

    def _retreat(self) -> list[Candidate]:
        """Return a candidate with fewer layers gone than the best one, where nothing keeps to the loss: the nearest."""
        recipe, candidates = self.job.recipe, self.candidates
        if (
            not candidates
            or recipe.goal.target is None
            or any(measured.loss <= recipe.max_loss for measured in candidates)
        ):
            return []
        best = min(candidates, key=lambda measured: measured.loss)
        tried = [measured for measured in candidates if not recipe.goal.met(measured.figures)]
        fewer = Candidate(best.candidate.drop - 1, best.candidate.mix)
        if len(tried) >= RETREATS or fewer.drop < 0 or fewer.is_original or (fewer.mix.healed and not fewer.drop):
            return []
        return [fewer]

    def _best(self) -> list[Candidate]:
        """Return what would be written now."""
        recipe, candidates = self.job.recipe, self.candidates
        best = choice(candidates, recipe.goal, recipe.max_loss)
        near = nearest_ones(candidates, recipe.goal, recipe.max_loss)
        return [best.candidate] if best else [measured.candidate for measured in near[:1]]

    def _look_at(self, candidate: Candidate) -> None:
        """Make a candidate, and measure it unless held-out questions say that it loses far too much."""
        before = {step: len(times) for step, times in self.shop.costs.seen.items()}
        folder = self.shop.folder_of(candidate)
        told = self.shop.held_out(candidate)
        if (loss := self._expected_loss(candidate, told)) is not None:
            step = {"step": PASSED, "candidate": candidate_data(candidate), "held_out": told, "expected_loss": loss}
            self.steps.add(step)
            return
        logger.info("measuring %s", folder.name)
        measured = self.shop.measure(candidate, self.original["answer_tokens"])
        figures = {name: value for name, value in measured.items() if name not in ("correct", "seconds")}
        figures["parameters"] = self.shop.parameters(candidate)
        seen = self.shop.costs.seen
        seconds = {step: round(sum(times[before.get(step, 0) :]), 1) for step, times in seen.items()}
        self.steps.add({
            "step": MEASURED,
            "candidate": candidate_data(candidate),
            "figures": figures,
            "correct": [int(right) for right in measured["correct"]],
            "held_out": told,
            "seconds": {step: value for step, value in seconds.items() if value},
        })  # fmt: skip

    def _expected_loss(self, candidate: Candidate, told: dict[str, Any] | None) -> float | None:
        """Return points that a candidate is expected to lose, where they are too many for it to be measured.

        Held-out questions that are answered otherwise than by the original count as lost. That is asked of what can
        still be healed.
        """
        if candidate.mix != Mix() or "heal" not in self.job.available or not told or "same_answers" not in told:
            return None
        loss = 100 * (1 - told["same_answers"])
        allowed = HOPELESS * max(self.job.recipe.max_loss, LEAST_LOSS)
        return loss if loss > allowed else None

    # the end

    def take_back(self, out: Path) -> None:
        """Put what an earlier call wrote back among the candidates: this one may find something better."""
        best = self._best() if self.steps.original is not None else []
        for folder in (out / CHOSEN, out / NEAREST):
            if not folder.exists():
                continue
            before = self.shop.work / best[0].folder if best else None
            if before is None or before.exists():
                shutil.rmtree(folder)
            else:
                self.shop.work.mkdir(exist_ok=True)
                folder.rename(before)

    def result(self, out: Path, seconds: float) -> SearchResult:
        """Write the chosen folder under its name, verify it, and return what was found."""
        recipe, candidates = self.job.recipe, self.candidates
        best = self._best()
        met = choice(candidates, recipe.goal, recipe.max_loss) is not None
        folder = out / (CHOSEN if met else NEAREST)
        if best:
            candidate_folder = self.shop.folder_of(best[0])
            if self.not_reached:  # the next call goes on from there
                shutil.copytree(candidate_folder, folder)
            else:
                candidate_folder.rename(folder)
            self.shop.set_default(folder, best[0])
            verified = verify(folder)
            if not verified.holds:
                raise CheckFailed(f"{folder} does not verify: {'; '.join(verified.problems)}.")
        if not self.not_reached:
            shutil.rmtree(self.shop.work, ignore_errors=True)
        whole, tokens = self.original["depths"]["0"]["ms"], self.original["answer_tokens"]
        return SearchResult(
            out=out,
            goal=recipe.goal,
            max_loss=recipe.max_loss,
            original=Rate.of(map(bool, self.original["correct"])),
            original_figures={
                "ms": whole,
                "total_ms": whole["vision"] + whole["prefill"] + tokens * whole["decode"],
                "speedup": 1.0,
                "flops_share": 1.0,
                "parameters": self.job.sizes().parameters,
                "answer_tokens": tokens,
            },
            candidates=tuple(candidates),
            passed={candidate.label: step["expected_loss"] for candidate, step in self.steps.of_kind(PASSED).items()},
            failed={candidate.label: reason for candidate, reason in self.failed.items()},
            left_out=self.job.left_out,
            open=tuple(candidate.label for candidate in self.not_reached),
            seconds=seconds,
            chosen=folder if best else None,
            chosen_label=best[0].label if best else None,
            metric=METRICS[self.job.task.metric].title,
        )
