"""A comparison put on several tasks, in the form of the papers' tables: a row a method, a column a task, with the mean.

Every task is a comparison of its own in a folder of its own, which goes on where a broken-off run has left it. Routers
that the rows name are trained first. Rows that can't be made stand in the table with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..checkpoints.record import RECORD, read_record
from ..checkpoints.source import open_source
from ..clean_room import load_processor
from ..errors import InputError
from ..evaluation.metrics.task import compared_task
from ..evaluation.scoring import rights
from ..pipeline import route
from ..progress import Progress, silent
from ..recipe import RunOptions
from ..routing.cost import few_prompts
from ..routing.requests import router_settings
from .grid import Comparison, Grid, Key, key_of
from .layers import compare_together
from .routers import compare_routes
from .routes import RouteComparison, RouteTables
from .saved import write_all
from .seeds import folder_of, made_folder
from .speed import Ratio, samples_per_second
from .task_rows import TaskRow, TasksComparison, over_seeds
from .tasks_recipe import Line, TasksRecipe
from .tasks_table import plot_tasks, tasks_markdown
from .theory import Shape, fastv_tflops


def compare_tasks(
    recipe: TasksRecipe, out: Path | str, options: RunOptions = RunOptions(batch_size=32), progress: Progress = silent
) -> TasksComparison:
    """Train the routers, fill each task's comparison in `out`/TASK; write table.md, accuracy.png and results.json.

    Raises: InputError for wrong input; what was measured before stays in `out`, and the same command goes on from it.
    """
    out = Path(out)
    parts = parts_of(recipe, out)
    shape = shape_of(recipe, parts[0])
    with made_folder(out):
        for seed in recipe.seeds or (None,):
            train_routers(recipe, recipe.routers_in(out, seed), seed=seed, options=options, progress=progress)
        done = _compared(parts, out, options, progress)
    first = next(iter(parts[0].values()))
    if isinstance(first, Grid):
        drops = {len(cell.drop): cell.drop for cell in _first(done[0]).cells}
        speeds = (
            {}
            if recipe.speed is None
            else samples_per_second(first, drops, timing=recipe.speed, options=options, progress=progress)
        )
        there = set.intersection(
            *({key_of(cell) for cell in _first(by_task).cells} for by_task in done)
        )  # with every seed
        rows = [_grid_tables(recipe, by_task, shape=shape, speeds=speeds, there=there) for by_task in done]
        refused = {fold: reason for by_task in done for fold, reason in _first(by_task).refused.items()}
        for of_seed in rows:
            of_seed += [TaskRow("Not taken by this model", fold, reason=reason) for fold, reason in refused.items()]
    else:
        rows = [
            _route_tables(recipe, _first(tables), by_task, shape) for tables, by_task in zip(parts, done, strict=True)
        ]
    result = TasksComparison(
        out=out,
        tasks=tuple(recipe.tasks),
        rows=tuple(over_seeds(rows)),
        metrics={name: compared.metric for name, compared in done[0].items()},
        seeds=recipe.seeds,
        task_uses={name: compared.task_uses for name, compared in done[0].items() if compared.task_uses},
    )
    pictures = {"accuracy.png": lambda path: plot_tasks(result, path)}
    write_all(out, {"table.md": tasks_markdown(result)}, pictures, result.to_data())
    return result


def parts_of(recipe: TasksRecipe, out: Path) -> list[dict[str, Grid | RouteTables]]:
    """Return for each seed, or for the one of the recipe, the comparison on each task."""
    if not recipe.seeds:
        return [{name: recipe.comparison_on(name, recipe.routers_in(out, None)) for name in recipe.tasks}]
    return [
        {name: recipe.comparison_on(name, recipe.routers_in(out, seed)).of_seed(seed) for name in recipe.tasks}
        for seed in recipe.seeds
    ]


def _compared(
    parts: Sequence[Mapping[str, Grid | RouteTables]], out: Path, options: RunOptions, progress: Progress
) -> list[dict[str, Any]]:
    """Fill each comparison in its folder: `out`/TASK, or `out`/TASK/seed-N."""
    folders = [
        {name: folder_of(out / name, part.seed) if len(parts) > 1 else out / name for name, part in by_task.items()}
        for by_task in parts
    ]
    every = {folders[n][name]: part for n, by_task in enumerate(parts) for name, part in by_task.items()}
    for folder in every:
        folder.parent.mkdir(exist_ok=True)
    if isinstance(_first(parts[0]), Grid):
        done: dict[Path, Any] = dict(compare_together(cast("dict[Path, Grid]", every), out, options, progress))
    else:
        tables = cast("dict[Path, RouteTables]", every)
        done = {
            folder: compare_routes(part, folder, options=options, progress=progress, run=out)
            for folder, part in tables.items()
        }
    return [{name: done[folder] for name, folder in by_task.items()} for by_task in folders]


def train_routers(recipe: TasksRecipe, out: Path, seed: int | None, options: RunOptions, progress: Progress) -> None:
    """Train the routers that are not there yet. Raises: InputError for a folder that holds another one.

    Args:
        seed: in place of the routers' own; None: as the recipe says.
    """
    for name, router_recipe in recipe.routers.items():
        folder = out / name
        router = router_recipe if seed is None else replace(router_recipe, seed=seed)
        if not folder.exists():
            out.mkdir(parents=True, exist_ok=True)
            route(
                recipe.model,
                router,
                out=folder,
                options=replace(options, batch_size=min(options.batch_size, 16)),
                progress=progress,
            )
        elif read_record(folder).to_data()["recipe"].get("router") != router.to_data():
            raise InputError(f"{folder / RECORD} tells of a router that was trained otherwise: remove {folder}.")


# --- rows -------------------------------------------------------------------------------------------------------------


def shape_of(recipe: TasksRecipe, parts: Mapping[str, Grid | RouteTables]) -> Shape:
    """Return what the papers' formula counts: the decoder's sizes, and the tokens of a few prompts of each task."""
    source = open_source(recipe.model)
    processor, prompts = load_processor(source.folder), []
    for part in parts.values():
        samples = compared_task(part.task, part.task_samples, part.questions_seed).samples
        prompts += few_prompts(samples, processor, source.config)
    text = source.config.get_text_config()
    return Shape(
        layers=source.num_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None),
        tokens=sum(int(batch.inputs["attention_mask"].sum()) for batch in prompts) / len(prompts),
        visual=sum(int(batch.is_visual.sum()) for batch in prompts) / len(prompts),
    )


def _first(done: Mapping[str, Any]) -> Any:
    return next(iter(done.values()))


def _original(done: Mapping[str, Comparison | RouteComparison], shape: Shape) -> TaskRow:
    first = _first(done)
    return TaskRow(
        table="",
        method="original",
        layers=shape.layers,
        visual_tokens=1.0,
        tflops=fastv_tflops(shape, shape.layers),
        flops_share=None if isinstance(first, Comparison) else 1.0,
        parameters=first.parameters if isinstance(first, Comparison) else None,
        accuracy={name: comparison.original.accuracy for name, comparison in done.items()},
        kept=dict.fromkeys(done, 1.0),
    )


def _grid_tables(
    recipe: TasksRecipe, done: Mapping[str, Comparison], shape: Shape, speeds: Mapping[int, Ratio], there: set[Key]
) -> list[TaskRow]:
    """Return a table for each number of dropped layers, and one of what can't be made.

    Args:
        speeds: by number of dropped layers; empty where they were not timed.
        there: the cells that stand in the tables.
    """
    first, rows = _first(done), []
    original = replace(_original(done, shape), speed=(1.0, 1.0, 1.0) if speeds else None)
    for count in dict.fromkeys(first.counts):
        title = f"{100 * count / shape.layers:.0f} % of the layers gone"
        rows.append(replace(original, table=title))
        for cell in (cell for cell in first.cells if len(cell.drop) == count and key_of(cell) in there):
            same = {
                name: next(c for c in compared.cells if key_of(c) == key_of(cell)) for name, compared in done.items()
            }
            rows.append(
                TaskRow(
                    table=title,
                    method=f"{cell.localizer} + {cell.fold}",
                    layers=shape.layers - count,
                    visual_tokens=1.0,
                    tflops=fastv_tflops(shape, shape.layers - count),
                    parameters=cell.parameters,
                    accuracy={name: c.accuracy for name, c in same.items()},
                    kept={name: c.kept for name, c in same.items()},
                    speed=speeds.get(count),
                    right={name: tuple(rights(c.n, c.wrong)) for name, c in same.items()},
                )
            )
    rows += [TaskRow(title, line.row, reason=line.reason) for title, lines in recipe.tables.items() for line in lines]
    return rows


def _route_tables(
    recipe: TasksRecipe, part: RouteTables, done: Mapping[str, RouteComparison], shape: Shape
) -> list[TaskRow]:
    """Return the tables that the recipe names, the original first in each."""
    drop_at = {}
    for row in part.rows:
        rule = row.parsed()
        drop_at[row.name] = rule.drops_at(router_settings(open_source(row.folder or part.model), rule))
    rows = []
    for title, lines in recipe.tables.items():
        rows.append(replace(_original(done, shape), table=title))
        rows += [_route_row(title, line, done=done, shape=shape, drop_at=drop_at.get(line.row, 0)) for line in lines]
    return rows


def _route_row(title: str, line: Line, done: Mapping[str, RouteComparison], shape: Shape, drop_at: int) -> TaskRow:
    """Return a line of a table out of the cells of all tasks."""
    method = line.name or line.row
    if line.reason is not None:
        return TaskRow(title, method, reason=line.reason)
    assert line.budget is not None
    cells = {name: comparison.cell(line.row, line.budget) for name, comparison in done.items()}
    there = {name: cell for name, cell in cells.items() if cell is not None}
    if len(there) < len(cells):
        return TaskRow(title, method, reason="this row can't keep to this budget")
    budget = next(iter(there.values())).budget
    layers, tokens = budget["keep_layers"] or shape.layers, budget["keep_visual_tokens"]
    share = 1.0 if tokens is None else tokens if isinstance(tokens, float) else min(1.0, tokens / shape.visual)
    return TaskRow(
        table=title,
        method=method,
        layers=layers,
        visual_tokens=share,
        tflops=fastv_tflops(shape, layers, share, drop_at),
        flops_share=sum(cell.decoder_flops_share for cell in there.values()) / len(there),
        accuracy={name: cell.accuracy for name, cell in there.items()},
        kept={name: cell.kept for name, cell in there.items()},
        right={name: tuple(rights(cell.n, cell.wrong)) for name, cell in there.items()},
    )
