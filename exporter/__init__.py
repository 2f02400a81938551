"""lvlm-exporter: large vision-language models made smaller and faster, as checkpoints that stand on their own.

The verbs of the command line, under the same names. Nothing heavy is imported before one is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CheckFailed",
    "Grid",
    "InputError",
    "Recipe",
    "RunOptions",
    "Wanted",
    "card",
    "compare",
    "compare_routes",
    "compress",
    "evaluate",
    "load_grid",
    "load_recipe",
    "push",
    "reproduce",
    "score",
    "verify",
]

if TYPE_CHECKING:
    from .budgets import Wanted
    from .comparison import Grid, compare, load_grid
    from .errors import CheckFailed, InputError
    from .evaluation import evaluate
    from .hub import push
    from .model_card import card
    from .pipeline import compress, score
    from .recipe import Recipe, RunOptions, load_recipe
    from .reproduction import reproduce
    from .route_comparison import compare_routes
    from .verification import verify

_HOMES = {
    "CheckFailed": "errors",
    "InputError": "errors",
    "Recipe": "recipe",
    "RunOptions": "recipe",
    "load_recipe": "recipe",
    "compress": "pipeline",
    "score": "pipeline",
    "evaluate": "evaluation",
    "Wanted": "budgets",
    "compare_routes": "route_comparison",
    "compare": "comparison",
    "Grid": "comparison",
    "load_grid": "comparison",
    "reproduce": "reproduction",
    "verify": "verification",
    "card": "model_card",
    "push": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'exporter' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
