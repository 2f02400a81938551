"""The quality of a checkpoint: the rating of greedy answers to a task, and fidelity to the model it was made from.

Shapes: B samples, S prompt tokens, A answer tokens, N answer tokens of a batch, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import ranks
from ..cards.card_file import results_first
from ..checkpoints.record import check_updatable
from ..checkpoints.source import open_source
from ..data.resumable import ResumableLines, files_key
from ..data.task import Task
from ..data.uses import warned_of_uses
from ..errors import InputError
from ..modeling.routed_route import Budget
from ..recipe import RunOptions, TaskData
from ..routing.pictures import show_routes
from ..routing.requests import BudgetGrid, BudgetRequest
from .judge import ROW_FIELDS, Judge, Reference, check_same_task
from .loaded import Loaded, load
from .metrics.judged import JudgeClient, rate_all, ratings_file
from .metrics.table import METRICS
from .metrics.task import Measure, measured_task
from .results import Evaluation, ModelResult, Shown, record_evaluation, with_answers_kept
from .scoring import paired_tests


def evaluate(
    paths: str | Path | Sequence[str | Path],
    task: str | Path,
    *,
    reference: str | Path | None = None,
    budgets: BudgetGrid = BudgetGrid(),
    calibration: str | Path | None = None,
    options: RunOptions = RunOptions(batch_size=32),
    samples: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    allow_urls: bool = False,
    frames: int | None = None,
    measure: Measure = Measure(),
    rated_by: JudgeClient | None = None,
    max_new_tokens: int | None = None,
    predictions: str | Path | None = None,
    update_cards: bool = True,
    show: int = 0,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> Evaluation:
    """Rate the answers of every checkpoint to a task, and its fidelity to the reference.

    Args:
        reference: the model that the checkpoints were made from; it is evaluated first, without a budget.
        budgets: of routed checkpoints, each evaluated; without any, they run as plain models.
        calibration: questions for rules that measure layers.
        samples: how many of the task's questions, seeded; None: all.
        columns, split, config, allow_urls, frames: of the task, as `load_calibration` takes them.
        measure: by which metric, and what is put behind the questions; none: by what the columns clearly ask for.
        rated_by: the judge of a metric that needs one.
        predictions: JSONL file that keeps every answer; a run that broke off goes on from it.
        show: how many of the questions a report is to show, with the visual tokens that stay.
        update_cards: put the figures into the record and the card of checkpoints that are ours.
    Raises: InputError for a task without answers, images that can't be read, folders that are no checkpoints.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    calibration = None if calibration is None else str(calibration)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: at least 1 is needed.")
    data = TaskData(
        str(task),
        columns=dict(columns or {}),
        split=split,
        config=config,
        allow_urls=allow_urls,
        frames=frames,
        metric=measure.metric,
        suffix=measure.suffix,
    )
    questions = measured_task(data, samples, seed)
    uses = warned_of_uses(str(task))
    ratings = _ratings(questions.metric, rated_by, predictions)
    lines = Path(predictions) if predictions is not None and ranks.is_first() else None
    kept = ResumableLines(lines, ROW_FIELDS, "answer of an evaluation")
    check_same_task(kept, questions)
    shown = Shown.spread(show, questions.samples) if show else None
    requests_by_model = budgets_of([str(path) for path in paths], reference, budgets, update_cards)
    says: Reference | None = None
    results = []
    for name, requests in requests_by_model.items():
        loaded = load(name, options, requests=requests, task=questions, calibration=calibration)
        for request in requests:
            longest = max_new_tokens or questions.longest(loaded.processor)
            judge = Judge(replace(loaded, request=request, seed=seed), questions, options.batch_size, longest)
            if shown is not None:
                judge.show = frozenset(shown.numbers)
                shown = replace(shown, processor=shown.processor or loaded.processor)
            if reference is not None and name == str(reference) and request is None:
                says = judge.remember = Reference.of(loaded, files_key(loaded.source))
            elif says is not None:
                judge.compare_with(says)
            result = judge.run(kept, progress)
            if rated_by is not None and ratings is not None:
                rate = functools.partial(rate_all, rated_by, questions.samples, answers=result.answers)
                scores = ranks.from_first(functools.partial(rate, kept=ratings, progress=progress))
                result = result.rated(scores, questions)
            results.append(result)
        results[-len(requests) :] = with_answers_kept(results[-len(requests) :])
        if update_cards and ranks.is_first() and (budget := tightest(requests, results[-len(requests) :])):
            show_in_card(loaded, questions, budget)
        del loaded, judge
    pairs = paired_tests([result.label for result in results], [result.trials for result in results])
    done = Evaluation(
        task=Path(str(task)).name,
        fingerprint=questions.fingerprint,
        models=tuple(results),
        reference=None if reference is None else str(reference),
        pairs=pairs,
        shown=shown,
        uses=uses,
    )
    if not ranks.is_first():
        return done
    if uses is not None:
        uses.note("evaluate", list(requests_by_model), len(questions.samples), questions.fingerprint)
    if update_cards:
        for path in paths:
            with results_first(Path(path)):
                record_evaluation(Path(path), done)
    return done


def budgets_of(
    paths: Sequence[str], reference: str | Path | None, budgets: BudgetGrid, update_cards: bool
) -> dict[str, list[BudgetRequest | None]]:
    """Return what each model runs under, the reference first; None: as a plain model.

    Raises: InputError for whatever is wrong with any of them, before hours are spent on the first.
    """
    requests_by_model: dict[str, list[BudgetRequest | None]] = {}
    if reference is not None:
        open_source(str(reference))
        requests_by_model[str(reference)] = [None]
    for path in paths:
        known = requests_by_model.setdefault(path, [])
        requests = [request for request in budgets.requests_for(open_source(path)) if request not in known]
        if (
            any(request is not None and request.budget.quality is not None for request in requests)
            and None not in known + requests
        ):
            requests.insert(0, None)  # answers are kept that it gives without a budget
        known += requests
        if update_cards and ranks.is_first():
            check_updatable(Path(path))
    return requests_by_model


def show_in_card(loaded: Loaded, questions: Task, budget: Budget) -> None:
    """Draw a few of the questions with the visual tokens that stay under a budget."""
    folder = loaded.source.folder
    with results_first(folder):
        show_routes(folder, loaded.model, processor=loaded.processor, samples=questions.samples, budget=budget)


def _ratings(metric: str, rated_by: JudgeClient | None, predictions: str | Path | None) -> ResumableLines | None:
    """Return the file of a judge's ratings, after the judge has answered once. Raises InputError."""
    if not METRICS[metric].judged:
        if rated_by is not None:
            raise InputError(f"the metric '{metric}' needs no judge: leave --judge out, or choose another --metric.")
        return None
    if rated_by is None:
        raise InputError(f"the metric '{metric}' needs a judge: give --judge URL and --judge-model NAME.")
    ratings = ratings_file(None if predictions is None or not ranks.is_first() else Path(predictions))
    ranks.from_first(lambda: rated_by.reply_to("Answer with the word yes."))
    return ratings


def tightest(requests: Sequence[BudgetRequest | None], results: Sequence[ModelResult]) -> Budget | None:
    """Return the budget under which a router chose and least ran: its routes have the most to show."""
    chosen = [
        (result.decoder_flops_share or 1.0, request.budget)
        for request, result in zip(requests, results, strict=True)
        if request is not None and request.natural
    ]
    return min(chosen, key=lambda pair: pair[0])[1] if chosen else None
