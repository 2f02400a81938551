"""A call's request to the decoder beside the model's inputs, and its way to each pass of `generate`.

Shapes: B sequences, S tokens of a pass, D hidden size.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .routed_api import cache_in, logger, unsupported
from .routed_route import Budget, Route, RouterSettings

IGNORED_LABEL = -100
END_OF_IMAGE = 2  # tokens that may follow an image and ask nothing: its end, a line break


@dataclass
class Request:
    """The model's request to its decoder for one pass, and the decoder's results."""

    router: Any  # Router
    settings: RouterSettings
    budget: Budget
    visual: Any  # Tensor [B, S] True at visual tokens, None if the pass has none
    imposed: Route | None = None
    hidden: Tensor | None = None  # [B, S] tokens that the router must not see: answers
    labels: Tensor | None = None  # [B, S] a copy of ours
    coordinates: Any = None  # Tensor [B, S, 3]
    run: bool = True  # False: only up to the router
    turn: Any = None  # Turn of a reversible conversation
    route: Any = None  # result: a Route
    router_inputs: Any = None  # result, if not run: RouterInputs

    def check_reached(self) -> None:
        """Refuse a model that has kept the request from its decoder, and so has run whole."""
        if self.route is None:
            raise RuntimeError(unsupported("the budget did not reach the decoder"))


@dataclass(frozen=True)
class RouterInputs:
    """The arguments of `Router.forward`, in its order: `router(*inputs)`."""

    states: Tensor  # [B, S, D]
    visual: Tensor  # [B, S]
    visible: Tensor  # [B, S]
    coordinates: Tensor  # [B, S, 3]

    def __iter__(self) -> Any:
        return iter((self.states, self.visual, self.visible, self.coordinates))


@dataclass
class Generation:
    """A call of `generate` that is under way. Its passes read here what it was asked for beside the model's inputs.

    transformers would hand such arguments to an assistant too, which need not know them.
    """

    model: Any
    routing: dict[str, Any]  # by the names of ROUTING_ARGUMENTS
    route: Any = None  # of its first routed pass

    def arguments(self, num_sequences: int) -> dict[str, Any]:
        """Return the arguments of a pass: tensors with their sequences repeated, as for beams and samples."""
        return {name: repeated(value, num_sequences) for name, value in self.routing.items()}


GENERATION: ContextVar[Generation | None] = ContextVar("generation", default=None)


def repeated(value: Any, num_sequences: int) -> Any:
    if not isinstance(value, Tensor) or len(value) == num_sequences or num_sequences % len(value):
        return value
    return value.repeat_interleave(num_sequences // len(value), 0)


def number_of_sequences(named: dict[str, Any]) -> int:
    tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    return len(tokens)


def hidden_tokens(visual: Tensor, labels: Tensor | None, prompt_length: int | None, past: int) -> Tensor | None:
    """Return the tokens that are answers and not shown to the router: [B, S], or None."""
    hidden = torch.zeros_like(visual)
    if prompt_length is not None:
        hidden |= torch.arange(past, past + visual.shape[1], device=visual.device) >= prompt_length
    if labels is not None:
        hidden |= (labels.to(visual.device) != IGNORED_LABEL) & ~visual
    return hidden if prompt_length is not None or labels is not None else None


def prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int | None:
    """Return the length of the text that `generate` goes on from: with what a cache holds, without candidates."""
    tokens = next((t for t in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if t is not None), None)
    if tokens is None:
        return None
    cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
    if cache is None:
        return tokens.shape[1]
    return max(mask.shape[-1], tokens.shape[1]) if isinstance(mask, Tensor) else None  # the new ones only, or all


def warn_of_excess(budget: Budget, visual: Tensor) -> None:
    if isinstance(budget.keep_visual_tokens, int) and (most := int(visual.sum(1).max())) < budget.keep_visual_tokens:
        logger.warning_once(
            f"keep_visual_tokens={budget.keep_visual_tokens} is above the {most} visual tokens there are: all are kept."
        )


def warn_of_no_question(visible: Tensor, visual: Tensor) -> None:
    """Warn where a picture is routed before its question: nothing but the end of an image follows it in this pass."""
    order = torch.arange(visual.shape[1], device=visual.device)
    last = torch.where(visual, order, -1).amax(1)  # [B]
    follow = (visible & (order > last[:, None])).sum(1)
    if bool(((last >= 0) & (follow <= END_OF_IMAGE)).any()):
        logger.warning_once(
            "a picture was routed before its question: no text follows it in this pass, and tokens that leave now are "
            "gone for the whole conversation. Give the picture and its question in one pass."
        )


def tell_of_default(settings: RouterSettings) -> None:
    """Log once what runs when no budget is named: some clients drop what they are given for `generate`."""
    logger.warning_once(
        f"No budget reached `generate`: it runs under {settings.default!r}, this checkpoint's default. If you passed "
        f"one to a pipeline, pass it as generate_kwargs={{'preset': {settings.default!r}}}. The presets are "
        f"{', '.join(dict.fromkeys(['off', *settings.presets]))}; `set_budget` chooses one for all calls."
    )
