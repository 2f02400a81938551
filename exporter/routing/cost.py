"""FLOPs of a prompt under a budget, counted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.batches import Batch, make_batch, spread
from ..data.samples import Sample
from ..models.loading import text_decoder
from .requests import BudgetRequest
from .rules import make_route

EXACT = 0.01  # of a count, relative
COUNTED_SAMPLES = 8  # questions whose prompts are counted


@dataclass(frozen=True)
class Flops:
    """The FLOPs of prompts, by torch's counter: of the model, and of its decoder with the router alone."""

    total: int = 0
    decoder: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.total + other.total, self.decoder + other.decoder)


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Give torch's counter; attention is made of matrix products meanwhile, since not every kernel of it is counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def prefill_flops(model: Any, batch: Batch, **options: Any) -> Flops:
    """Return one pass over prompts, keys and values cached; `options` as the model's forward takes them."""
    with torch.inference_mode(), counted() as counter:
        model(**batch.to(model.device).inputs, use_cache=True, logits_to_keep=1, **options)
    decoder = text_decoder(model)
    name = next(name for name, module in model.named_modules() if module is decoder)
    of_decoder = counter.get_flop_counts()[f"{type(model).__name__}.{name}"]
    return Flops(counter.get_total_flops(), sum(of_decoder.values()))


def cost_facts(model: Any, router: Any) -> dict[str, Any]:
    """Return what `modeling.routed_cost.DecoderCost` is told of a model and its router: numbers of weights."""
    text, width = model.config.get_text_config(), router.out.in_features
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    block = _linear_weights(router.qkv, router.out, router.mlp)
    question = width  # a sum over the tokens, which is a product too
    return {
        "layers": [_linear_weights(layer) for layer in text_decoder(model).layers],
        "width": text.num_attention_heads * size,
        "router_token": block + _linear_weights(router.down, router.place, router.token_head) + question,
        "router_layer": block + _linear_weights(router.layer_head),
    }


def is_counted_right(model: Any, facts: dict[str, Any], batch: Batch) -> bool:
    """Tell whether the formula of `modeling.routed_cost` is torch's count for a prompt: not so with experts, for one.

    Args:
        facts: `cost_facts` of the model.
        batch: one question.
    """
    length = batch.inputs["input_ids"].shape[1]
    by_formula = sum(2 * length * weights + 4 * length**2 * facts["width"] for weights in facts["layers"])
    counted_ones = prefill_flops(model, batch).decoder
    return bool(abs(counted_ones / by_formula - 1) < EXACT)


def _linear_weights(*modules: Any) -> int:
    """Return the weights that a token is multiplied with, also where they are packed or lie elsewhere."""
    inside = (part for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear))
    return sum(part.in_features * part.out_features for part in inside)


def few_prompts(samples: Sequence[Sample], processor: Any, config: Any, number: int = COUNTED_SAMPLES) -> list[Batch]:
    """Return a few questions, evenly spread, one a batch, so that no padding is counted."""
    chosen = itertools.islice(spread(samples, number / len(samples)), number)
    return [make_batch([sample], processor, config) for sample in chosen]


def flops_of(model: Any, prompts: Sequence[Batch], request: BudgetRequest | None, **rule_options: Any) -> Flops:
    """Count FLOPs under a budget, or of the unrouted model (None): the router counts, a rule's own cost does not.

    Args:
        given: what `make_route` needs more.
    """
    total = Flops()
    for batch in prompts:
        if request is None:
            options: dict[str, Any] = {"preset": "off"}
        elif request.serving is not None:
            options = {"keep_visual_tokens": request.budget.keep_visual_tokens}
        elif request.natural:
            options = {name: value for name, value in vars(request.budget).items() if value is not None}
        else:
            options = {"route": make_route(model, batch, request.budget, request.rule, **rule_options)}
        total += prefill_flops(model, batch, **options)
    return total
