"""How good is a checkpoint: exact match of greedy answers on a task, and fidelity to the model it was made from.

Shapes: B samples, S prompt tokens, A answer tokens, N answer tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cards.card_file import results_first
from ..checkpoints.record import check_updatable
from ..checkpoints.source import open_source
from ..data.resumable import ResumableLines, files_key
from ..data.task import load_task
from ..errors import InputError
from ..modeling.routed_route import Budget
from ..recipe import RunOptions
from ..routing.pictures import show_routes
from ..routing.requests import BudgetGrid, BudgetRequest
from .judge import ROW_FIELDS, Judge, Reference
from .loaded import load
from .results import Evaluation, ModelResult, record_evaluation
from .scoring import PairedTest, mcnemar


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
    max_new_tokens: int | None = None,
    predictions: str | Path | None = None,
    update_cards: bool = True,
    progress: Callable[..., Iterable[Any]] = lambda items, *_: items,
) -> Evaluation:
    """Exact match of every checkpoint on a task, and its fidelity to the reference.

    Args:
        reference: the model that the checkpoints were made from; it is evaluated too, and first, as it is.
        budgets: under which routed checkpoints run, one after the other; none: as plain models.
        calibration: questions for rules that measure layers.
        samples: how many of the task's questions, seeded; None: all.
        columns, split, config, allow_urls: of the task, as `load_calibration` takes them.
        predictions: JSONL file that keeps every answer; a run that is broken off and repeated goes on from it.
        update_cards: put the figures into the record and the card of checkpoints that are ours.
    Raises: InputError for a task without answers, images that can't be read, folders that are no checkpoints.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    calibration = None if calibration is None else str(calibration)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: at least 1 is needed.")
    questions = load_task(str(task), samples, seed, columns=columns, split=split, config=config, allow_urls=allow_urls)
    kept = ResumableLines(None if predictions is None else Path(predictions), ROW_FIELDS, "answer of an evaluation")
    names = [str(path) for path in ([] if reference is None else [reference]) + list(paths)]
    asked: dict[str, list[BudgetRequest | None]] = {name: [] for name in names}
    if reference is not None:
        open_source(names[0])
        asked[names[0]].append(None)
    for name in map(str, paths):  # all that is wrong with any of them, before hours are spent on the first
        asked[name] += [ask for ask in budgets.of(open_source(name)) if ask not in asked[name]]
        if update_cards:
            check_updatable(Path(name))
    says: Reference | None = None
    results = []
    for name, asks in asked.items():
        loaded = load(name, options, asks, questions, calibration)
        for ask in asks:
            longest = max_new_tokens or questions.longest(loaded.processor)
            judge = Judge(replace(loaded, ask=ask, seed=seed), questions, options.batch_size, longest)
            if reference is not None and name == str(reference) and ask is None:
                says = judge.remember = Reference.of(loaded, files_key(loaded.source))
            elif says is not None:
                judge.compare_with(says)
            results.append(judge.run(kept, progress))
        if update_cards and (budget := tightest(asks, results[-len(asks) :])):
            with results_first(loaded.source.folder):
                show_routes(
                    loaded.source.folder,
                    loaded.model,
                    processor=loaded.processor,
                    samples=questions.samples,
                    budget=budget,
                )
        del loaded, judge
    pairs = [
        PairedTest(a.label, b.label, *mcnemar(a.correct, b.correct))
        for i, a in enumerate(results)
        for b in results[i + 1 :]
    ]
    done = Evaluation(
        task=Path(str(task)).name,
        fingerprint=questions.fingerprint,
        models=tuple(results),
        reference=None if reference is None else str(reference),
        pairs=tuple(pairs),
    )
    if update_cards:
        for path in paths:
            with results_first(Path(path)):
                record_evaluation(Path(path), done)
    return done


def tightest(asks: Sequence[BudgetRequest | None], results: Sequence[ModelResult]) -> Budget | None:
    """Return the budget under which a router chose and least ran: its routes have the most to show."""
    chosen = [
        (result.decoder_flops_share or 1.0, ask.budget)
        for ask, result in zip(asks, results, strict=True)
        if ask is not None and ask.natural
    ]
    return min(chosen, key=lambda pair: pair[0])[1] if chosen else None
