"""Check a loss's options, and draw the budgets that losses train at. One file a loss; rows in `exporter/methods.py`.

Shapes: B samples, S tokens.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from ...errors import InputError
from ...methods import LOSSES, resolve
from ...recipe import Method, check_method


def drawn_counts(visual: Tensor, least: float, most: float, generator: torch.Generator) -> Tensor:
    """Return how many visual tokens stay, a share of each sequence's drawn log-uniformly: [B, S] -> [B]."""
    share = torch.empty(len(visual)).uniform_(math.log(least), math.log(most), generator=generator).exp()
    return (visual.sum(1) * share.to(visual.device)).round().long().clamp(min=1)


def check_loss(loss: Method) -> None:
    """Raise InputError where an option is not known or out of range, before the model is loaded."""
    check_method(loss, LOSSES, "loss")
    row = LOSSES[loss.name]
    parameters = inspect.signature(resolve(row.run)).parameters.values()
    values = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | loss.options
    least, most = values.get("least", 1), values.get("most", 1)
    if not 0 < least <= most <= 1:
        raise InputError(f"least={least}, most={most}: shares of the visual tokens, 0 < least <= most <= 1.")
    for name, fewest in row.at_least.items():
        if (value := values[name]) < fewest:
            raise InputError(f"loss '{loss.name}': {name}={value}, {fewest} or more are needed.")
    for name in row.shares:
        if (value := values[name]) > 1:
            raise InputError(f"loss '{loss.name}': {name}={value} is a share, at most 1.")
    for name, value in values.items():
        if isinstance(value, str):
            continue
        if math.isinf(value) or (name in row.positive and not value):
            raise InputError(f"loss '{loss.name}': {name}={value} is out of range, a finite number above 0 is needed.")
