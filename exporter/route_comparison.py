"""Who should choose what runs: routers and rules on the user's own model and data, one table and one picture.

Rows are routers (of one or several folders, so that ways of training are compared too), rules, and an oracle; columns
are budgets. By default all rows of a column cost the same counted FLOPs: the first row has the column's budget as it
is, a row that leaves tokens out only, or later, keeps as many of them as that leaves room for.

Batches are made once for all columns of a row, and answers are generated again only where a cell departs from what the
unrouted model says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, report
from .budgets import Ask, few_prompts, flops_of, router_settings
from .calibration import Batch, make_batch, size_order
from .errors import InputError
from .evaluation import Judge, Loaded, ModelResult, Reference, influence_of, load
from .modeling.modeling_routed import Budget, Route
from .oracle import Search, images_seen_once, search
from .pipeline import Progress, silent
from .recipe import RunOptions, check_keys, paths_as_text
from .resumable import ResumableLines
from .routing import load_routed, routable
from .rules import Rule, make_route
from .scoring import Rate, describe, is_right
from .source import compute_dtype, open_source, pick_device
from .task import Task, greedy_answers, load_task

FIT_PROMPTS, FIT_STEPS = 2, 3
FEWEST = 0.004  # share of the visual tokens
OUT_OF_REACH = 0.03  # share of the FLOPs by which a row may miss its column's


# --- what to compare --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Who chooses. `rule` as in `evaluate --rule`; 'oracle' or 'oracle+LAYERS' searches tokens."""

    name: str
    rule: str = "router"
    folder: str | None = None  # a routed checkpoint; None: the comparison's model, for rules and the oracle
    drop_at: int | None = None

    @property
    def searches(self) -> bool:
        return self.rule.split("+")[0] == "oracle"

    def parsed(self) -> Rule:
        """The oracle's tokens stand where a rule's would."""
        tokens, _, layers = self.rule.partition("+")
        rule = f"random+{layers or 'all'}" if tokens == "oracle" else self.rule
        return Rule.parse(rule, self.drop_at)


@dataclass(frozen=True)
class RouteTables:
    """A comparison as data; its YAML has the same keys."""

    model: str  # unrouted: what everything is judged against
    task: str  # questions with answers
    rows: tuple[Row, ...]
    budgets: tuple[Budget, ...]
    calibration: str | None = None  # for the rule shortgpt
    task_samples: int | None = None
    equal: str = "flops"  # or "budget": every row has the column's counts, as far as it uses them
    oracle: Search = field(default_factory=Search)
    seed: int = 0

    def __post_init__(self) -> None:
        paths_as_text(self, "model", "task", "calibration")


def tables_from_data(data: Any) -> RouteTables:
    check_keys(data, [f.name for f in dataclasses.fields(RouteTables)], "a comparison of routes")
    for key in ("model", "task", "rows", "budgets"):
        if not data.get(key):
            raise InputError(f"a comparison of routes needs '{key}'.")
    for key in ("rows", "budgets"):
        if not isinstance(data[key], list):
            raise InputError(f"{key} must be a list, not {data[key]!r}.")
    if data.get("equal", "flops") not in ("flops", "budget"):
        raise InputError(f"equal: {data['equal']!r} is not known: flops, budget.")
    made = {
        "rows": tuple(_part(Row, row, "a row") for row in data["rows"]),
        "budgets": tuple(_part(Budget, budget, "a budget") for budget in data["budgets"]),
        "oracle": _part(Search, data.get("oracle") or {}, "oracle"),
    }
    names = [row.name for row in made["rows"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two rows are called '{twice[0]}'.")
    for row in made["rows"]:
        row.parsed()
    return RouteTables(**{**data, **made})


def _part(cls: Any, data: Any, what: str) -> Any:
    check_keys(data, [f.name for f in dataclasses.fields(cls)], what)
    if missing := [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in data]:
        raise InputError(f"{what} needs '{missing[0]}'.")
    return cls(**data)


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouteCell:
    row: str
    column: int  # number of the budget
    budget: dict[str, Any]  # what the row ran under: `Ask.to_data`
    n: int
    accuracy: float
    interval: tuple[float, float]
    kept: float  # of the unrouted model's accuracy
    by_type: dict[str, float]
    kl: float  # per answer token of the unrouted model
    agreement: float
    flops_share: float
    decoder_flops_share: float
    searched: str | None = None


@dataclass(frozen=True)
class RouteComparison:
    out: Path
    original: Rate
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[RouteCell, ...]  # one that is not here is out of the row's reach

    def cell(self, row: str, column: int) -> RouteCell | None:
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)

    def to_data(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


# --- the verb ---------------------------------------------------------------------------------------------------------


def compare_routes(
    tables: RouteTables, out: Path | str, options: RunOptions = RunOptions(batch_size=32), progress: Progress = silent
) -> RouteComparison:
    """Fill the table; write results.json, table.md and accuracy.png into `out`. Rows that are there are kept."""
    out = Path(out)
    sources = {name: open_source(name) for name in {tables.model, *(row.folder for row in tables.rows if row.folder)}}
    for row in tables.rows:
        source = sources[row.folder or tables.model]
        settings = router_settings(source, row.parsed())
        for budget in tables.budgets:
            try:
                budget.check(settings, source.num_layers)
            except ValueError as error:
                raise InputError(f"row '{row.name}': {error}") from error
        if row.parsed().layers == "shortgpt" and tables.calibration is None:
            raise InputError(f"row '{row.name}': shortgpt measures layers on questions: add calibration: FILE.")
    task = load_task(tables.task, tables.task_samples, tables.seed)
    kept = Finished(out, tables)
    runner = Runner.of(tables, task, options, progress)
    for row in tables.rows:
        if row.name not in kept.cells:
            kept.add(row.name, runner.fill(row))
    names = tuple(describe(Ask(budget).to_data()) for budget in tables.budgets)
    cells = tuple(cell for row in tables.rows for cell in kept.cells[row.name])
    done = RouteComparison(out, Rate.of(runner.original.correct), names, tuple(row.name for row in tables.rows), cells)
    (out / "results.json").write_text(json.dumps(done.to_data(), indent=2) + "\n")
    (out / "table.md").write_text(table_markdown(done))
    plot_routes(done, out / "accuracy.png")
    return done


@dataclass
class Runner:
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
    def of(cls, tables: RouteTables, task: Task, options: RunOptions, progress: Progress) -> Runner:
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
        return cls(tables, task, options, progress, original, reference, unrouted)

    def model_of(self, row: Row) -> Loaded:
        """The row's model, loaded if the row before it had another."""
        if row.folder is None:
            found = self.unrouted
        elif row.folder in self.loaded:
            found = self.loaded[row.folder]
        else:
            source, device = open_source(row.folder), pick_device(self.options.device)
            dtype = compute_dtype(self.options.dtype, source.config, device)
            model = load_routed(source, device, dtype, self.options.memory)
            found = replace(self.unrouted, path=row.folder, source=source, model=model, influence=None)
            self.loaded = {row.folder: found}
        if row.parsed().layers == "shortgpt" and found.influence is None:
            found.influence = influence_of(found, str(self.tables.calibration), self.options.batch_size)
        return replace(found, seed=self.tables.seed)

    # budgets at equal cost

    def asks(self, row: Row, loaded: Loaded) -> list[Ask | None]:
        """What the row runs under in each column; None where it can't cost so little."""
        if not self.targets:
            first = self.tables.rows[0]
            model = self.model_of(first)
            self.targets = [self._share(model, self._plain(first, model, budget)) for budget in self.tables.budgets]
        return [self.fitted(row, loaded, *of) for of in zip(self.tables.budgets, self.targets, strict=True)]

    def _plain(self, row: Row, loaded: Loaded, budget: Budget) -> Ask:
        """The column's counts, as far as the row uses them."""
        rule = row.parsed()
        tokens = None if rule.tokens == "all" else budget.keep_visual_tokens
        layers = None if rule.layers == "all" else budget.keep_layers
        return Ask(Budget(tokens, layers), rule)

    def _share(self, loaded: Loaded, ask: Ask) -> float:
        """Decoder FLOPs under a budget, whoever chooses, as a share of the unrouted model's."""
        rule = Rule("random", "random", ask.rule.drops_at(loaded.model.router_settings))
        prompts = loaded.prompts[:FIT_PROMPTS]
        for one in (None, Ask(ask.budget, rule)):
            key = one and (one.budget, rule.drop_at)
            if key not in self.shares:
                self.shares[key] = flops_of(loaded.model, prompts, one).decoder
        return self.shares[ask.budget, rule.drop_at] / self.shares[None]

    def fitted(self, row: Row, loaded: Loaded, column: Budget, target: float) -> Ask | None:
        """The column's budget made to cost what its first row costs."""
        ask = self._plain(row, loaded, column)
        if ask.budget.is_off and self.tables.equal == "budget":
            return None
        if self.tables.equal == "budget" or abs(self._share(loaded, ask) - target) < 1e-3:
            return ask
        rule, layers = ask.rule, ask.budget.keep_layers
        if rule.tokens == "all":
            settings = loaded.model.router_settings
            least = loaded.model.num_layers - len(settings.candidates)
            tried = [replace(ask, budget=Budget(None, count)) for count in range(least, loaded.model.num_layers)]
            ask = min(tried, key=lambda one: abs(self._share(loaded, one) - target))
        else:
            ask = self._fewer_tokens(loaded, rule, layers, target)
        return ask if abs(self._share(loaded, ask) - target) <= OUT_OF_REACH else None

    def _fewer_tokens(self, loaded: Loaded, rule: Rule, layers: int | None, target: float) -> Ask:
        """The share of tokens at which the FLOPs are the target's, by interpolation: they are nearly linear in it."""

        def ask(share: float) -> Ask:
            return Ask(Budget(round(min(1.0, max(FEWEST, share)), 4), layers), rule)

        (low, below), (high, above) = ((share, self._share(loaded, ask(share))) for share in (FEWEST, 1.0))
        middle = low
        for _ in range(FIT_STEPS):
            if not below < target < above:
                return ask(low if target <= below else high)
            middle = low + (high - low) * (target - below) / (above - below)
            found = self._share(loaded, ask(middle))
            (low, below), (high, above) = (
                ((low, below), (middle, found)) if found > target else ((middle, found), (high, above))
            )
        return ask(middle)

    # cells

    def fill(self, row: Row) -> list[RouteCell]:
        loaded = self.model_of(row)
        asks = self.asks(row, loaded)
        answers: list[dict[int, dict[str, Any]]] = [{} for _ in asks]
        size, samples = self.options.batch_size, self.task.samples
        order = size_order(samples)
        starts = range(0, len(samples), size)
        for start in self.progress(starts, f"judge {row.name}", len(starts)):
            indices = order[start : start + size]
            batch = make_batch([samples[i] for i in indices], loaded.processor, loaded.model.config)
            batch = batch.to(loaded.model.device)
            for ask, found in zip(asks, answers, strict=True):
                if ask is not None:
                    found |= dict(zip(indices, self.judged(row, replace(loaded, ask=ask), batch, indices), strict=True))
        return [
            self._cell(row, column, replace(loaded, ask=ask), found)
            for column, (ask, found) in enumerate(zip(asks, answers, strict=True))
            if ask is not None
        ]

    def judged(self, row: Row, loaded: Loaded, batch: Batch, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """For each question of a batch its divergence, and whether the answer is right."""
        with images_seen_once(loaded.model):
            route = self._searched(loaded, batch, indices) if row.searches else self._route(loaded, batch)
            compared = self.reference.compare(loaded, batch, indices, route)
        departs = [place for place, one in enumerate(compared) if one["same"] < one["tokens"]]
        right = [self.original.correct[i] for i in indices]
        if departs:
            samples = [batch.samples[place] for place in departs]
            few = make_batch(samples, loaded.processor, loaded.model.config).to(loaded.model.device)
            own = last_columns(route.select(torch.tensor(departs)), few.is_visual.shape[1])
            said = greedy_answers(loaded.model, few, self.task.longest(loaded.processor), own)
            texts = loaded.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
            for place, text, sample in zip(departs, texts, samples, strict=True):
                right[place] = is_right(text, sample.answers, sample.choices)
        return iter([one | {"correct": correct} for one, correct in zip(compared, right, strict=True)])

    def _route(self, loaded: Loaded, batch: Batch) -> Route:
        assert loaded.ask is not None
        ask = loaded.ask
        return make_route(loaded.model, batch, ask.budget, ask.rule, seed=loaded.seed, influence=loaded.influence)

    def _searched(self, loaded: Loaded, batch: Batch, indices: Sequence[int]) -> Route:
        assert loaded.ask is not None

        def divergence(route: Route) -> torch.Tensor:
            return torch.tensor([one["kl"] for one in self.reference.compare(loaded, batch, indices, route)])

        rule = loaded.ask.rule
        return search(
            loaded.model, batch, loaded.ask.budget, divergence, self.tables.oracle, layers=rule.layers,
            drop_at=rule.drops_at(loaded.model.router_settings), seed=loaded.seed, influence=loaded.influence,
        )  # fmt: skip

    def _cell(self, row: Row, column: int, loaded: Loaded, found: dict[int, dict[str, Any]]) -> RouteCell:
        assert loaded.ask is not None
        rate = Rate.of(found[i]["correct"] for i in range(len(found)))
        types: dict[str, list[bool]] = {}
        for i, sample in enumerate(self.task.samples):
            types.setdefault(sample.type or "all", []).append(found[i]["correct"])
        tokens = max(1, sum(one["tokens"] for one in found.values()))
        total, decoder = loaded.flops_shares()
        assert total is not None and decoder is not None
        data = loaded.ask.to_data() | {"rule": row.rule}
        return RouteCell(
            row.name, column, data, rate.n, rate.accuracy, rate.interval,
            rate.accuracy / self.original.accuracy if self.original.accuracy else 0.0,
            {name: sum(right) / len(right) for name, right in sorted(types.items())},
            sum(one["kl"] for one in found.values()) / tokens, sum(one["same"] for one in found.values()) / tokens,
            total, decoder, str(self.tables.oracle) if row.searches else None,
        )  # fmt: skip


def last_columns(route: Route, length: int) -> Route:
    """The route for the same questions padded to a smaller length, on the left."""
    cut = {name: getattr(route, name) for name in ("keep", "visual", "places", "token_logits")}
    return replace(route, **{name: part if part is None else part[:, -length:] for name, part in cut.items()})


# --- files ------------------------------------------------------------------------------------------------------------


class Finished:
    """Rows on disk as they are done, so that a broken-off run goes on."""

    def __init__(self, out: Path, tables: RouteTables) -> None:
        self.path, self.cells = out / "rows.jsonl", dict[str, list[RouteCell]]()
        fingerprint = hashlib.sha256(json.dumps(asdict(tables), sort_keys=True).encode()).hexdigest()
        if self.path.exists():
            first, *lines = self.path.read_text().splitlines()
            if json.loads(first).get("tables") != fingerprint:
                raise InputError(f"{out} holds another comparison: name another folder, or remove it.")
            for line in lines:
                row = json.loads(line)
                self.cells[row["row"]] = [RouteCell(**c | {"interval": tuple(c["interval"])}) for c in row["cells"]]
            return
        checkpoint.check_target(out)
        out.mkdir(exist_ok=True)
        self.path.write_text(json.dumps({"tables": fingerprint}) + "\n")

    def add(self, name: str, cells: list[RouteCell]) -> None:
        self.cells[name] = cells
        with self.path.open("a") as file:
            file.write(json.dumps({"row": name, "cells": [asdict(cell) for cell in cells]}) + "\n")


def table_rows(done: RouteComparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: exact match, in brackets the share of the unrouted model's, and decoder FLOPs."""
    header = ["exact match % (kept %) at decoder FLOPs %", *done.columns]
    rows = []
    for name in done.rows:
        cells = [done.cell(name, column) for column in range(len(done.columns))]
        shown = [
            "–" if c is None else f"{100 * c.accuracy:.1f} ({100 * c.kept:.1f}) at {100 * c.decoder_flops_share:.1f}"
            for c in cells
        ]
        rows.append([name, *shown])
    return header, rows


def table_text(done: RouteComparison) -> str:
    low, high = done.original.interval
    text = report.table(*table_rows(done))
    text += (
        f"\n\nunrouted: {100 * done.original.accuracy:.1f} % ({100 * low:.1f}-{100 * high:.1f}) of {done.original.n}"
    )
    for searched in dict.fromkeys((cell.row, cell.searched) for cell in done.cells if cell.searched):
        text += f"\n{searched[0]}: {searched[1]}"
    return text


def table_markdown(done: RouteComparison) -> str:
    header, rows = table_rows(done)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * len(done.columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plot_routes(done: RouteComparison, path: Path) -> None:
    """Exact match against the decoder's FLOPs, a line a row."""
    drawn, axes = report.figure(8.5, 4.6)
    for number, name in enumerate(done.rows):
        cells = sorted((c for c in done.cells if c.row == name), key=lambda c: c.decoder_flops_share)
        axes.plot(
            [100 * c.decoder_flops_share for c in cells], [100 * c.accuracy for c in cells],
            marker=report.MARKERS[number % len(report.MARKERS)], color=report.PALETTE[number % len(report.PALETTE)],
            linestyle=("-", "--", ":")[number // len(report.PALETTE) % 3], markersize=5, linewidth=1, label=name,
        )  # fmt: skip
    axes.plot(100, 100 * done.original.accuracy, "*", color="black", markersize=11, label="unrouted", linestyle="")
    axes.set_xlabel("decoder FLOPs of the prompt (% of the unrouted model's)")
    axes.set_ylabel("exact match (%)")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    report.save(drawn, path)
