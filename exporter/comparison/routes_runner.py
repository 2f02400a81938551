"""Runs routers and rules at equal FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.source import open_source
from ..clean_room import greedy_answers
from ..data.batches import Batch, make_batch, size_order
from ..data.resumable import ResumableLines
from ..data.task import Task
from ..evaluation.judge import HALF, Judge, Reference
from ..evaluation.loaded import Loaded, influence_of, load
from ..evaluation.metrics.table import METRICS
from ..evaluation.results import ModelResult
from ..evaluation.scoring import Fidelity, TaskResult
from ..modeling.routed_route import Budget, Route
from ..models.loading import compute_dtype, pick_device
from ..progress import Progress
from ..recipe import RunOptions
from ..routing.cost import few_prompts, flops_of
from ..routing.folder import load_routed, routable
from ..routing.requests import BudgetRequest
from ..routing.rules import Rule, make_route
from .cells_file import CellsFile, as_kept
from .oracle import images_seen_once, search
from .routes import FEWEST, OUT_OF_REACH, RouteCell, RouteTables, Row, row_from_data

FIT_PROMPTS, FIT_STEPS = 2, 3


@dataclass
class RoutesRunner:
    """The unrouted model's answers, and one routed model after the other judged by them."""

    tables: RouteTables
    task: Task
    options: RunOptions
    progress: Progress
    original: ModelResult
    reference: Reference
    unrouted: Loaded
    loaded: dict[str | None, Loaded] = field(default_factory=dict)  # one at a time
    targets: list[float] = field(default_factory=list)  # decoder FLOPs of each column
    shares: dict[Any, float] = field(default_factory=dict)  # decoder FLOPs by budget and drop layer, alike in all rows

    @classmethod
    def of(cls, tables: RouteTables, task: Task, options: RunOptions, progress: Progress) -> RoutesRunner:
        unrouted = load(tables.model, options)
        reference = Reference.of(unrouted)
        longest = task.longest(unrouted.processor)
        judge = Judge(unrouted, task, options.batch_size, longest, remember=reference)
        original = judge.run(ResumableLines(None), progress)
        folder = next((row.folder for row in tables.rows if row.folder), None)
        settings = None if folder is None else open_source(folder).raw_config["router"]
        routable(unrouted.model, settings and {**settings, "presets": {}})
        unrouted.prompts = few_prompts(task.samples, unrouted.processor, unrouted.model.config)
        unrouted.unrouted = flops_of(unrouted.model, unrouted.prompts, None)
        return cls(
            tables, task, options=options, progress=progress, original=original, reference=reference, unrouted=unrouted
        )

    def model_of(self, row: Row) -> Loaded:
        """Return the row's model, loaded if the row before it had another."""
        if row.folder is None:
            loaded = self.unrouted
        elif row.folder in self.loaded:
            loaded = self.loaded[row.folder]
        else:
            source, device = open_source(row.folder), pick_device(self.options.device)
            dtype = compute_dtype(self.options.dtype, source.config, device)
            model = load_routed(source, device, dtype, self.options.memory)
            loaded = replace(self.unrouted, path=row.folder, source=source, model=model, influence=None)
            self.loaded = {row.folder: loaded}
        if row.parsed().layers == "shortgpt" and loaded.influence is None:
            loaded.influence = influence_of(
                loaded, str(self.tables.calibration), self.options.batch_size, self.tables.seed
            )
        return replace(loaded, seed=self.tables.seed)

    # budgets at equal cost

    def requests(self, row: Row, loaded: Loaded) -> list[BudgetRequest | None]:
        """Return what the row runs under in each column; None where it can't cost so little."""
        if not self.targets:
            first = self.tables.rows[0]
            model = self.model_of(first)
            self.targets = [self._share(model, self._plain(first, model, budget)) for budget in self.tables.budgets]
        columns = enumerate(zip(self.tables.budgets, self.targets, strict=True))
        numbers = range(len(self.targets)) if row.columns is None else row.columns
        return [self.fitted(row, loaded, *pair) if number in numbers else None for number, pair in columns]

    def _plain(self, row: Row, loaded: Loaded, budget: Budget) -> BudgetRequest:
        """Return the column's counts, as far as the row uses them."""
        rule = row.parsed()
        tokens = None if rule.tokens == "all" else budget.keep_visual_tokens
        layers = None if rule.layers == "all" else budget.keep_layers
        return BudgetRequest(Budget(tokens, layers), rule)

    def _share(self, loaded: Loaded, request: BudgetRequest) -> float:
        """Return decoder FLOPs under a budget, whoever chooses, as a share of the unrouted model's."""
        rule = Rule("random", "random", request.rule.drops_at(loaded.model.router_settings))
        prompts = loaded.prompts[:FIT_PROMPTS]
        for counted in (None, BudgetRequest(request.budget, rule)):
            key = counted and (counted.budget, rule.drop_at)
            if key not in self.shares:
                self.shares[key] = flops_of(loaded.model, prompts, counted).decoder
        return self.shares[request.budget, rule.drop_at] / self.shares[None]

    def fitted(self, row: Row, loaded: Loaded, column: Budget, target: float) -> BudgetRequest | None:
        """Return the column's budget made to cost what its first row costs."""
        request = self._plain(row, loaded, column)
        if request.budget.is_off and self.tables.equal == "budget":
            return None
        if self.tables.equal == "budget" or abs(self._share(loaded, request) - target) < 1e-3:
            return request
        rule, layers = request.rule, request.budget.keep_layers
        if rule.tokens == "all":
            settings = loaded.model.router_settings
            least = loaded.model.num_layers - len(settings.candidates)
            tried = [replace(request, budget=Budget(None, count)) for count in range(least, loaded.model.num_layers)]
            request = min(tried, key=lambda candidate: abs(self._share(loaded, candidate) - target))
        else:
            request = self._fewer_tokens(loaded, rule, layers, target)
        return request if abs(self._share(loaded, request) - target) <= OUT_OF_REACH else None

    def _fewer_tokens(self, loaded: Loaded, rule: Rule, layers: int | None, target: float) -> BudgetRequest:
        """Interpolate the share of tokens at which the FLOPs are the target's: they are nearly linear in it."""

        def request_at(share: float) -> BudgetRequest:
            return BudgetRequest(Budget(round(min(1.0, max(FEWEST, share)), 4), layers), rule)

        (low, below), (high, above) = ((share, self._share(loaded, request_at(share))) for share in (FEWEST, 1.0))
        middle = low
        for _ in range(FIT_STEPS):
            if not below < target < above:
                return request_at(low if target <= below else high)
            middle = low + (high - low) * (target - below) / (above - below)
            cost = self._share(loaded, request_at(middle))
            (low, below), (high, above) = (
                ((low, below), (middle, cost)) if cost > target else ((middle, cost), (high, above))
            )
        return request_at(middle)

    # cells

    def fill(self, row: Row) -> list[RouteCell]:
        loaded = self.model_of(row)
        requests = self.requests(row, loaded)
        answers: list[dict[int, dict[str, Any]]] = [{} for _ in requests]
        size, samples = self.options.batch_size, self.task.samples
        order = size_order(samples)
        starts = range(0, len(samples), size)
        for start in self.progress(starts, f"judge {row.name}", len(starts)):
            indices = order[start : start + size]
            batch = make_batch([samples[i] for i in indices], loaded.processor, loaded.model.config)
            batch = batch.to(loaded.model.device)
            for request, results in zip(requests, answers, strict=True):
                if request is not None:
                    results |= dict(
                        zip(indices, self.judged(row, replace(loaded, request=request), batch, indices), strict=True)
                    )
        return [
            self._cell(row, column, replace(loaded, request=request), results)
            for column, (request, results) in enumerate(zip(requests, answers, strict=True))
            if request is not None
        ]

    def judged(self, row: Row, loaded: Loaded, batch: Batch, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Return for each question of a batch its divergence, and whether the answer is right."""
        with images_seen_once(loaded.model):
            route = self._searched(loaded, batch, indices) if row.searches else self._route(loaded, batch)
            compared = self.reference.compare(loaded, batch, indices, route)
        departs = [place for place, result in enumerate(compared) if result["same"] < result["tokens"]]
        right = [self.original.trials[i] for i in indices]
        if departs:
            samples = [batch.samples[place] for place in departs]
            few = make_batch(samples, loaded.processor, loaded.model.config).to(loaded.model.device)
            route_of_few = last_columns(route.select(torch.tensor(departs)), few.is_visual.shape[1])
            longest = self.task.longest(loaded.processor)
            tokens = greedy_answers(loaded.model, few.inputs, longest, route=route_of_few)
            texts = loaded.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for place, text, sample in zip(departs, texts, samples, strict=True):
                right[place] = METRICS[self.task.metric].value(sample, text)
        return iter([result | {"correct": correct} for result, correct in zip(compared, right, strict=True)])

    def _route(self, loaded: Loaded, batch: Batch) -> Route:
        assert loaded.request is not None
        request = loaded.request
        return make_route(
            loaded.model, batch, request.budget, request.rule, seed=loaded.seed, influence=loaded.influence
        )

    def _searched(self, loaded: Loaded, batch: Batch, indices: Sequence[int]) -> Route:
        assert loaded.request is not None

        def divergence(route: Route) -> torch.Tensor:
            return torch.tensor([result["kl"] for result in self.reference.compare(loaded, batch, indices, route)])

        rule = loaded.request.rule
        return search(
            loaded.model,
            batch,
            budget=loaded.request.budget,
            divergence=divergence,
            effort=self.tables.oracle,
            layers=rule.layers,
            drop_at=rule.drops_at(loaded.model.router_settings),
            seed=loaded.seed,
            influence=loaded.influence,
        )

    def _cell(self, row: Row, column: int, loaded: Loaded, results: dict[int, dict[str, Any]]) -> RouteCell:
        assert loaded.request is not None
        correct = [results[i]["correct"] for i in range(len(results))]
        fidelity = Fidelity.of(*(sum(told[name] for told in results.values()) for name in ("kl", "same", "tokens")))
        result = TaskResult.of([sample.type for sample in self.task.samples], correct, fidelity)
        total, decoder = loaded.flops_shares()
        assert total is not None and decoder is not None
        data = loaded.request.to_data() | {"rule": row.rule}
        return RouteCell(
            row=row.name, column=column, budget=data, **as_kept(result, self.original.accuracy),
            flops_share=total, decoder_flops_share=decoder,
            wrong=tuple(index for index, right in enumerate(correct) if right < HALF),
            searched=str(self.tables.oracle) if row.searches else None,
        )  # fmt: skip


def last_columns(route: Route, length: int) -> Route:
    """Return the route for the same questions padded to a smaller length, on the left."""
    cut = {name: getattr(route, name) for name in ("keep", "visual", "coordinates", "token_logits")}
    return replace(route, **{name: part if part is None else part[:, -length:] for name, part in cut.items()})


class FinishedRows:
    """Rows of the tables on disk as they are done."""

    def __init__(self, out: Path, tables: RouteTables) -> None:
        columns = [f.name for f in fields(RouteCell)]
        self.file = CellsFile(out / "rows.jsonl", [asdict(tables) | {"task": tables.task.to_data()}, columns])
        self.cells: dict[str, list[RouteCell]] = dict(self.file.read(row_from_data))

    def add(self, name: str, cells: list[RouteCell]) -> None:
        self.cells[name] = cells
        self.file.add([{"row": name, "cells": [asdict(cell) for cell in cells]}])
