"""From scores and a budget to a plan, and what the plan does to config.json. Pure: no model, no files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .families import LAYER_INDEX_LISTS, PER_LAYER_LISTS, PERIODIC_LISTS


@dataclass(frozen=True)
class PruningPlan:
    """Which decoder layers go."""

    num_layers: int
    drop: tuple[int, ...]  # ascending

    @property
    def keep(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.drop)

    @property
    def new_index(self) -> dict[int, int]:
        """Return the new index of every kept layer by its old one."""
        return {old: new for new, old in enumerate(self.keep)}

    @property
    def gaps(self) -> tuple[tuple[int, ...], ...]:
        """Return the dropped layers in groups of consecutive ones."""
        gaps: list[tuple[int, ...]] = []
        for layer in self.drop:
            if gaps and gaps[-1][-1] == layer - 1:
                gaps[-1] += (layer,)
            else:
                gaps.append((layer,))
        return tuple(gaps)


@dataclass(frozen=True)
class LayerBudget:
    """The layers to remove: exactly one of the four is given."""

    drop_layers: int | None = None
    drop_ratio: float | None = None
    target_params: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        named = [name for name, value in vars(self).items() if value is not None]
        if len(named) != 1:
            raise InputError(
                f"a budget is exactly one of drop_layers, drop_ratio, target_params and layers; "
                f"given: {', '.join(named) or 'none'}."
            )

    def count(self, parameters_per_layer: Sequence[int], other_parameters: int, protect: Collection[int]) -> int:
        """Return how many layers go. Raises InputError where the budget can't be met."""
        total = len(parameters_per_layer)
        free = [layer for layer in range(total) if layer not in protect]
        if self.layers is not None:
            return len(self._explicit(total, protect))
        if self.drop_ratio is not None:
            if not 0 <= self.drop_ratio < 1:
                raise InputError(f"drop_ratio={self.drop_ratio}: a share of the layers, from 0 to below 1, is needed.")
            count = math.floor(self.drop_ratio * total + 0.5)
        elif self.target_params is not None:
            count = self._for_parameters(parameters_per_layer, other_parameters, free)
        else:
            assert self.drop_layers is not None
            count = self.drop_layers
        if count < 0:
            raise InputError(f"drop_layers={count}: a number of layers from 0 is needed.")
        most = min(len(free), total - 1)
        if count > most:
            raise InputError(
                f"dropping {count} layers exceeds the {most} that may go (of {total}, protected: {sorted(protect)}). "
                f"Drop {most} or fewer, or shorten protect."
            )
        return count

    def _explicit(self, total: int, protect: Collection[int]) -> tuple[int, ...]:
        assert self.layers is not None
        if bad := [layer for layer in self.layers if not 0 <= layer < total]:
            raise InputError(f"layer {bad[0]} does not exist: the decoder has layers 0 to {total - 1}.")
        if len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers {list(self.layers)} names a layer twice.")
        if len(self.layers) >= total:
            raise InputError(f"all {total} layers are to go: at least one must stay.")
        if bad := sorted(set(self.layers) & set(protect)):
            raise InputError(f"layer {bad[0]} is protected ({sorted(protect)}): take it out of layers or of protect.")
        return tuple(sorted(self.layers))

    def _for_parameters(self, per_layer: Sequence[int], other: int, free: Sequence[int]) -> int:
        assert self.target_params is not None
        excess = sum(per_layer) + other - self.target_params
        count, gone = 0, 0
        smallest_first = sorted(per_layer[layer] for layer in free)  # whichever layers are chosen, the target is met
        while gone < excess and count < len(smallest_first):
            gone += smallest_first[count]
            count += 1
        if gone < excess or count == len(per_layer):
            least = sum(per_layer) + other - sum(smallest_first)
            raise InputError(
                f"target_params={self.target_params:,} can't be met: without any of the {len(free)} layers that may go "
                f"{least:,} parameters are left."
            )
        return count


def make_plan(num_layers: int, drop: Collection[int]) -> PruningPlan:
    return PruningPlan(num_layers, tuple(sorted(drop)))


def attention_period(config: Any) -> tuple[str, int] | None:
    """Return the per-layer list of a configuration that repeats itself, by name, and after how many layers it does.

    Args:
        config: a loaded configuration of transformers, or config.json as a mapping.
    Returns: None where all layers are of one kind, or no period can be told.
    """
    text = _text_config(config)
    stated = [text.get(name) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
    for name in PERIODIC_LISTS:
        values = text.get(name)
        if not isinstance(values, list | tuple) or len(set(values)) < 2:
            continue
        whole = len(values) // 2  # a period that is not seen twice is one only if the configuration says so
        for period in [*range(2, whole + 1), *(length for length in stated if isinstance(length, int) and length > 1)]:
            if all(value == values[layer % period] for layer, value in enumerate(values)):
                return name, period
    return None


def breaks_period(config: Any, keep: Sequence[int]) -> str | None:
    """Return a warning where the kept layers no longer take turns as the whole model's do, None where they do.

    transformers reads the kind of each layer from config.json. Programs that work it out from a period instead run
    layers of the wrong kind and say nothing: llama.cpp's converter and mlx-vlm do so for Gemma 3.
    """
    name_and_period = attention_period(config)
    if name_and_period is None:
        return None
    name, period = name_and_period
    values = _text_config(config)[name]
    for new, old in enumerate(keep):
        if values[old] != values[new % period]:
            return (
                f"the kept layers break the period of {period} layers in {name}: layer {new} (layer {old} of the base "
                f"model) is {values[old]!r}, where the period has {values[new % period]!r}. transformers reads each "
                "layer's kind from config.json, but programs that assume the period, as llama.cpp and mlx-vlm do for "
                f"Gemma 3, compute something else without an error. Drop whole periods of {period} layers, or the last "
                "layers, where such programs are to run it."
            )
    return None


def may_break_period(config: Any, count: int, layers: Sequence[int] | None) -> str | None:
    """Return the warning of `breaks_period` before it is known which layers go.

    Args:
        count: how many layers go.
        layers: those that go, where they are named: the warning is certain then.
    """
    name_and_period = attention_period(config)
    if name_and_period is None or not count:
        return None
    name, period = name_and_period
    if layers is not None:
        return breaks_period(config, make_plan(len(_text_config(config)[name]), layers).keep)
    return (
        f"{name} has a period of {period} layers, which the kept layers will break unless whole periods or the last "
        "layers go. transformers runs such a checkpoint as it should; llama.cpp and mlx-vlm assume the period for "
        "Gemma 3 and compute something else without an error."
    )


def best_in_period(config: Any, values: Sequence[float], count: int, protect: Collection[int]) -> tuple[int, ...]:
    """Return the layers of the highest total value whose absence keeps the period: kept layers take turns as all did.

    Args:
        values: of each layer; higher is more redundant.
        count: how many layers go.
    Raises: InputError where no set of so many layers keeps it.
    """
    name_and_period = attention_period(config)
    assert name_and_period is not None, "a model whose layers do not take turns"
    name, period = name_and_period
    kinds = _text_config(config)[name]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the number of layers that went so far
    for layer, value in enumerate(values):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for gone, (total, drop) in best.items():
            options = []
            if kinds[layer] == kinds[(layer - gone) % period]:  # it may stay: it is what its new place asks for
                options.append((gone, (total, drop)))
            if layer not in protect and gone < count:
                options.append((gone + 1, (total + value, (*drop, layer))))
            for number, option in options:
                if number not in following or option[0] > following[number][0]:
                    following[number] = option
        best = following
    if count not in best:
        possible = sorted(number for number in best if number)
        raise InputError(
            f"without {count} layers the period of {period} layers in {name} can't be kept; without "
            f"{' or '.join(map(str, possible)) or 'no other number'} it can: drop those, or leave out --keep-period."
        )
    return best[count][1]


def _text_config(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config.get("text_config") or config)
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in (*PERIODIC_LISTS, *vars(text))}


def refuse_unknown_lists(text: Any, plan: PruningPlan) -> None:
    known = {*PER_LAYER_LISTS, *LAYER_INDEX_LISTS, "eos_token_id", "architectures"}
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == plan.num_layers and name not in known and plan.drop:
            raise InputError(
                f"the configuration holds '{name}', a list of {len(value)} entries, one a layer as it seems, that this "
                "version does not know how to prune: add it to the lists in exporter/families.py."
            )


Folded = dict[tuple[int, str], Any]  # (layer index, tensor name inside the layer) -> its new value, a tensor
