"""lvlm-exporter: large vision-language models made smaller and faster, as checkpoints that stand on their own.

The verbs of the command line, under the same names. Nothing heavy is imported before one is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "BenchOptions",
    "CheckFailed",
    "Grid",
    "InputError",
    "Recipe",
    "RouterRecipe",
    "RunOptions",
    "Wanted",
    "Workload",
    "bench",
    "card",
    "compare",
    "compare_routes",
    "compress",
    "evaluate",
    "load_grid",
    "load_recipe",
    "onnx",
    "push",
    "reproduce",
    "route",
    "score",
    "set_default",
    "verify",
]

if TYPE_CHECKING:
    from . import onnx
    from .benchmark import BenchOptions, bench
    from .budgets import Wanted
    from .comparison import Grid, compare, load_grid
    from .errors import CheckFailed, InputError
    from .evaluation import evaluate
    from .hub import push
    from .kinds import card, verify
    from .pipeline import compress, route, score
    from .recipe import Recipe, RouterRecipe, RunOptions, load_recipe
    from .reproduction import reproduce
    from .route_comparison import compare_routes
    from .routing import set_default
    from .workload import Workload

_HOMES = {
    "CheckFailed": "errors",
    "InputError": "errors",
    "Recipe": "recipe",
    "RouterRecipe": "recipe",
    "RunOptions": "recipe",
    "load_recipe": "recipe",
    "compress": "pipeline",
    "route": "pipeline",
    "score": "pipeline",
    "evaluate": "evaluation",
    "bench": "benchmark",
    "BenchOptions": "benchmark",
    "Workload": "workload",
    "Wanted": "budgets",
    "compare_routes": "route_comparison",
    "compare": "comparison",
    "Grid": "comparison",
    "load_grid": "comparison",
    "reproduce": "reproduction",
    "set_default": "routing",
    "verify": "kinds",
    "card": "kinds",
    "push": "hub",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "onnx":  # a package of its own: exporter.onnx.export, exporter.onnx.load
        return importlib.import_module(".onnx", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'exporter' has no attribute '{name}'")

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
