"""lvlm-exporter: large vision-language models made smaller and faster, as checkpoints that stand on their own.

The subcommands of the command line, under the same names. Nothing heavy is imported before one is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = [
    "BenchOptions",
    "BudgetGrid",
    "CheckFailed",
    "Grid",
    "HealRecipe",
    "InputError",
    "Recipe",
    "RouterRecipe",
    "RunOptions",
    "SearchGoal",
    "SearchRecipe",
    "Workload",
    "__version__",
    "bench",
    "card",
    "compare",
    "compare_routes",
    "compare_seeds",
    "compress",
    "convert",
    "evaluate",
    "heal",
    "load_grid",
    "load_recipe",
    "onnx",
    "push",
    "reproduce",
    "route",
    "score",
    "search",
    "set_default",
    "update_modeling_files",
    "verify",
]

if TYPE_CHECKING:
    from .benchmark.bench import bench
    from .benchmark.figures import BenchOptions
    from .benchmark.workload import Workload
    from .comparison.grid import Grid, load_grid
    from .comparison.layers import compare
    from .comparison.routers import compare_routes
    from .comparison.seeds import compare_seeds
    from .conversion.convert import convert
    from .errors import CheckFailed, InputError
    from .evaluation.evaluate import evaluate
    from .outcome.goal import SearchGoal, SearchRecipe
    from .outcome.search import search
    from .pipeline import compress, heal, route, score
    from .publishing.folder_kinds import card, verify
    from .publishing.push import push
    from .publishing.reproduction import reproduce
    from .recipe import HealRecipe, Recipe, RouterRecipe, RunOptions, load_recipe
    from .routing.folder import set_default, update_modeling_files
    from .routing.requests import BudgetGrid

_HOMES = {
    "CheckFailed": "errors",
    "InputError": "errors",
    "HealRecipe": "recipe",
    "Recipe": "recipe",
    "RouterRecipe": "recipe",
    "RunOptions": "recipe",
    "load_recipe": "recipe",
    "search": "outcome.search",
    "SearchGoal": "outcome.goal",
    "SearchRecipe": "outcome.goal",
    "compress": "pipeline",
    "heal": "pipeline",
    "route": "pipeline",
    "score": "pipeline",
    "evaluate": "evaluation.evaluate",
    "bench": "benchmark.bench",
    "BenchOptions": "benchmark.figures",
    "Workload": "benchmark.workload",
    "BudgetGrid": "routing.requests",
    "compare_routes": "comparison.routers",
    "compare": "comparison.layers",
    "compare_seeds": "comparison.seeds",
    "convert": "conversion.convert",
    "Grid": "comparison.grid",
    "load_grid": "comparison.grid",
    "reproduce": "publishing.reproduction",
    "set_default": "routing.folder",
    "update_modeling_files": "routing.folder",
    "verify": "publishing.folder_kinds",
    "card": "publishing.folder_kinds",
    "push": "publishing.push",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "onnx":  # a package of its own: exporter.onnx.export, exporter.onnx.load
        return importlib.import_module(".onnx", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'exporter' has no attribute '{name}'")

    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    ranks: Any = importlib.import_module(".ranks", __name__)
    return ranks.entry_point(value) if name in ranks.SHARED else value


def __dir__() -> list[str]:
    """List what is imported when it is asked for, too: what editors and notebooks complete."""
    return sorted({*globals(), *_HOMES, "onnx"})
