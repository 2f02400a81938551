"""From the flags of the command line to what the library takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .. import ranks
from ..errors import InputError
from ..recipe import (
    DEFAULT_FOLD,
    DEFAULT_LOCALIZER,
    HEAL_SAMPLES,
    ROUTER_SAMPLES,
    HealRecipe,
    Recipe,
    RouterRecipe,
    RunOptions,
    heal_from_data,
    load_recipe,
    recipe_from_data,
    router_from_data,
)
from .arguments import columns_of
from .outputs import save_json


def name_value_pairs(values: Sequence[str], flag: str) -> dict[str, Any]:
    import yaml

    pairs = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not equals:
            raise InputError(f"{flag} {value}: NAME=VALUE is needed.")
        try:
            pairs[name] = yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise InputError(f"{flag} {value}: what follows the equals sign is no YAML value.") from error
    return pairs


def recipe_from_flags(options: argparse.Namespace, budget_needed: bool = True) -> Recipe:
    """Return the recipe that the flags spell out, or the file's."""
    spelled = {key: getattr(options, key) for key in ("drop_layers", "drop_ratio", "target_params")}
    spelled["layers"] = list(options.layers) if options.layers is not None else None
    spelled = {key: value for key, value in spelled.items() if value is not None}
    if not spelled and not budget_needed:
        spelled = {"drop_layers": 0}
    spelled["calibration"] = calibration_from_flags(options)
    for kind in ("localizer", "fold"):
        name = getattr(options, kind, None)
        extra = name_value_pairs(getattr(options, f"{kind}_option", []), f"--{kind}-option")
        default = DEFAULT_LOCALIZER if kind == "localizer" else DEFAULT_FOLD
        if name or extra:
            spelled[kind] = {"name": name or default, **extra}
    for key in ("model", "seed", "base_model"):
        if getattr(options, key, None) is not None:
            spelled[key] = getattr(options, key)
    if options.protect is not None:
        spelled["protect"] = list(options.protect)
    if getattr(options, "keep_period", False):
        spelled["keep_period"] = True
    healing = name_value_pairs(getattr(options, "heal_option", []), "--heal-option")
    if healing or getattr(options, "heal", False):
        spelled["heal"] = healing or True
    if getattr(options, "router", False):
        spelled["router"] = True
    if getattr(options, "recipe", None) is not None:
        if extra_flags := flags_of(spelled):
            raise InputError(f"--recipe says everything: take out {', '.join(extra_flags)}, or the recipe.")
        return load_recipe(options.recipe)
    if "data" not in spelled["calibration"] and (spelled.get("layers") or getattr(options, "scores", None)):
        if "answers" in spelled["calibration"]:
            raise InputError("--answers belong to questions: name --calibration FILE too, or leave them out.")
        del spelled["calibration"]  # whether it can do without is checked with the rest
    if "model" not in spelled or "data" not in spelled.get("calibration", {"data": ""}):
        raise InputError("compress needs MODEL and --calibration FILE, or --recipe FILE.yaml.")
    return recipe_from_data(spelled)


def flags_of(spelled: dict[str, Any]) -> list[str]:
    """Return the flags that something was spelled out by, in the order of the alphabet."""
    names = {"calibration" if name == "data" else name for name in spelled["calibration"]}
    names |= {name for name, value in spelled.items() if value and name != "calibration"}
    return sorted("MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in names)


def calibration_from_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say of the questions. Raises: InputError for an empty name, which is no absent one."""
    if options.calibration == "":
        raise InputError("there is no file or folder '' to read questions from.")
    flags = {
        "data": options.calibration,
        "samples": options.samples,
        "split": options.split,
        "prompt": options.prompt,
        "columns": columns_of(options.columns) or None,
        "config": options.config,
        "allow_urls": options.allow_urls or None,
        "frames": options.frames,
        "answers": getattr(options, "answers", None),
    }
    return {k: v for k, v in flags.items() if v is not None}


def router_from_flags(options: argparse.Namespace) -> RouterRecipe:
    """Return the router that the flags of `route` spell out."""
    names = ("steps", "candidates", "drop_at", "read_at", "learning_rate", "seed", "batch_size")
    spelled = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    spelled |= {name: True for name in ("serve", "question_aware") if getattr(options, name)}
    spelled["calibration"] = {"samples": ROUTER_SAMPLES} | calibration_from_flags(options)
    extra = name_value_pairs(options.loss_option, "--loss-option")
    if options.loss or extra:
        spelled["loss"] = {"name": options.loss or RouterRecipe.loss.name, **extra}
    return router_from_data(spelled)


def heal_from_flags(options: argparse.Namespace) -> HealRecipe:
    """Return the healing that the flags of `heal` spell out."""
    names = ("teacher", "steps", "rank", "learning_rate", "loss", "exchanges", "seed", "batch_size")
    spelled = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    spelled["calibration"] = {"samples": HEAL_SAMPLES} | calibration_from_flags(options)
    return heal_from_data(spelled | ({"norms": True} if options.norms else {}))


def run_options_from_flags(options: argparse.Namespace) -> RunOptions:
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: at least 1 is needed.")
    return RunOptions(options.device, options.dtype, options.memory, options.batch_size)


def progress_bar(options: argparse.Namespace) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()
    quiet = options.quiet or not ranks.is_first()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()

    def bar(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
        from tqdm import tqdm

        return tqdm(items, what, total, disable=True if quiet else None, leave=False)

    return bar


def write_json(options: argparse.Namespace, data: dict[str, Any]) -> None:
    if options.json is not None and not save_json(options.json, data):
        options.unsaved = True


def budgets_from_flags(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each preset that is named, and each number of tokens with each number of layers."""
    budgets: list[dict[str, Any]] = [{"preset": name} for name in options.preset]
    if options.keep_visual_tokens or options.keep_layers:
        for tokens in options.keep_visual_tokens or (None,):
            for layers in options.keep_layers or (None,):
                budgets.append({"keep_visual_tokens": tokens, "keep_layers": layers})
    budgets += [{"flops": share} for share in options.flops] + [{"quality": share} for share in options.quality]
    return budgets
