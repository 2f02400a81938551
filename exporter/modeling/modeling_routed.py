"""LVLMs that run with fewer visual tokens and fewer layers, chosen for each question by a small router.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs, keep_visual_tokens=144, keep_layers=28)
    model.generate(**inputs, flops=0.5)  # a share of the cost: the mix of tokens and layers is the router's affair
    model.generate(**inputs, quality=0.99)  # as many tokens as this question needs
    model.generate(**inputs, preset="fast")  # or once for all: model.set_budget("fast")
    model.generate(**inputs, preset="fast", reversible=True)  # and again with past_key_values: the next question

The classes that this file makes are those of transformers with three additions, each in a file of its own: a router
that scores visual tokens and layers (after "PAR", Pruning All-Rounder, ICCV 2025), a key-value cache that stores less
than it speaks of, and decoder layers that run on what is left. The weights of the LVLM lie where they always lie, those
of the router in router/model.safetensors: loaded without these files, the folder is the plain model.

A question's way from `generate` to the next token:

    call                                        file
    RoutedModel.generate, .forward              modeling_routed   arguments to a request: budget, visual tokens, cache
    coordinates_of                              routed_places     where the visual tokens lie in their images
    _RoutedDecoder.forward -> RoutedForward     routed_pass       takes over the cache, knows padding and drop layer
    prepared_cache -> RoutedCache.take_over     routed_cache      a cache that can hold a route
    _RoutedLayer.forward -> RoutedForward.layer routed_pass       for each decoder layer; at layer `read_at`:
    RoutedForward._decide -> Router.forward     routed_router     scores of visual tokens and layers
    amounts                                     routed_cost       how much the budget keeps of each sequence
    best_tokens, best_layers -> Route           routed_router     what is kept
    RoutedForward._keywords -> narrowed_mask    routed_cache      positions and masks of what is left
    RoutedForward.finish -> RoutedCache.extend  routed_pass       states spread out again; what the cache holds now
    the stock head, the stock generate loop     transformers      the next token; its pass follows the cache's route
    turn_of -> Turn.see, .begin, .hold          routed_turns      in a reversible conversation: earlier turns anew

`routed_route` has what all of them speak of (Budget, RouterSettings, Route), `routed_request` what a call asks of its
passes, `routed_api` what of transformers they rest on, with its probes, `routed_types` what differs between types.

How a question runs. The router reads the states that enter layer `read_at`: visual tokens, text, and one embedding for
each layer that may be skipped. Its scores and the budget make a route, which holds for the whole answer. From layer
`drop_at` on, the visual tokens that were not kept (and padding) are gone from the hidden states, positions, masks and
the cache; what is left keeps its position. A layer that some sequences of a batch skip runs for the others only, with
cache entries for them only. Everything outside the decoder still sees sequences of the original length: the cache
reports it, masks are made for it and narrowed here, and the last hidden state is spread out to it again.

Later turns on the same cache: the layers stay as they were chosen first; the visual tokens that a turn brings are
scored among themselves, under the budget of that call. With `reversible=True` in each turn, the whole conversation is
routed anew by its new question, as if it had not been routed before.

Shapes: B sequences, S tokens of a pass, K <= S tokens that stay, P entries of a layer's cache, L layers, N of them that
may be skipped, D hidden size, R width of the router, H heads.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from typing import Any

import torch
from safetensors.torch import load_file  # transformers cannot do without it either
from torch import Tensor
from torch.nn import functional as F

from .routed_api import (
    CACHE_NAMES,
    cache_in,
    cache_name,
    cache_of,
    checkpointing_spares_caches,
    logger,
    with_cache_as,
)
from .routed_cache import (  # all siblings: older loaders copy what this file names
    RoutedCache,
    RoutedStaticCache,
    check_finished,
)
from .routed_cost import DecoderCost
from .routed_pass import make_routable
from .routed_places import GRIDS, any_resolution_shape, coordinates_of, pass_coordinates
from .routed_request import (
    GENERATION,
    Generation,
    Request,
    RouterInputs,
    hidden_tokens,
    number_of_sequences,
    prompt_length,
    tell_of_default,
    warn_of_excess,
)
from .routed_route import OFF, ROUTER_FORMAT, Budget, Route, RouterSettings
from .routed_router import ROUTER_FILE, Router, best_layers, best_tokens, load_weights, router_file, save_weights
from .routed_turns import check_generation, turn_of
from .routed_types import class_name, placeholders, register_hub_names, stock_class, text_model_of

__all__ = [
    "CACHE_NAMES",
    "GRIDS",
    "OFF",
    "ROUTER_FILE",
    "ROUTER_FORMAT",
    "Budget",
    "DecoderCost",
    "Route",
    "RoutedCache",
    "RoutedModel",
    "RoutedStaticCache",
    "Router",
    "RouterInputs",
    "RouterSettings",
    "any_resolution_shape",
    "best_layers",
    "best_tokens",
    "cache_of",
    "checkpointing_spares_caches",
    "class_name",
    "coordinates_of",
    "logger",
    "make_routable",
    "routed",
    "stock_class",
]


class RoutedModel:
    """The methods that every routed class adds to its stock class.

    `forward` and `generate` take these arguments more:
        keep_visual_tokens: a count (144; a sequence with fewer keeps all) or a share (0.25) of its visual tokens.
        keep_layers: how many decoder layers run.
        flops: a share (0.5) of the decoder's operations for this prompt, in place of the two above; see `routed_cost`.
        quality: the share (0.99) of answers that are to stay what they were, in place of all of them.
        preset: a name of `config.router["presets"]`, or "off", the plain model bit for bit.
        route: a `Route` to follow in place of the router's.
        visual_mask: [B, S] True at visual tokens; needed with `inputs_embeds` only.
        prompt_length: tokens of the text that are the prompt, the router sees no others; `generate` knows it, and with
            `labels`, what is labelled is hidden. None: all of it.
        reversible: True to route earlier turns of the cache anew, and to keep aside what the next turn needs for that;
            "cpu" to keep it there. A pass of one token goes on with the route.
        aside_bytes: the most bytes to keep aside; beyond them all of it is let go. None: no limit.
    Outputs have the route followed as `output.route`.
    """

    _auto_class = "AutoModelForImageTextToText"  # save_pretrained copies this file and names the class in auto_map
    _supports_flex_attn = False  # its block masks cannot be narrowed
    _can_compile_fullgraph = False  # the route is read on the host; compile the layers' dense parts instead
    _budget_is_default = False  # that of config.json, which nobody has chosen here

    def __init__(self, config: Any, *args: Any, with_router: bool = True, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.router_settings = RouterSettings.of(config)
        self.budget = self.router_settings.preset(self.router_settings.default)
        self._budget_is_default = True
        for name in self.router_settings.presets:
            self.router_settings.preset(name).check(self.router_settings, self.num_layers)
        make_routable(self._text_model())
        if with_router:
            self._attach_router()

    def _text_model(self) -> Any:
        return text_model_of(self)

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    # --- budgets ---

    def set_budget(
        self,
        preset: str | None = None,
        *,
        keep_visual_tokens: int | float | None = None,
        keep_layers: int | None = None,
        flops: float | None = None,
        quality: float | None = None,
    ) -> None:
        """Set the budget of all calls that name none: `set_budget("fast")`, `set_budget(flops=0.5)`."""
        self.budget = self._budget(preset, Budget(keep_visual_tokens, keep_layers, flops, quality))
        self._budget_is_default = False

    def _budget(self, preset: str | None, budget: Budget) -> Budget:
        """Return what a call names, checked: a preset or a budget; what was set before, if neither."""
        if preset is not None and budget != OFF:
            raise ValueError(
                f"give either preset={preset!r} or keep_visual_tokens and keep_layers, flops or quality, not both."
            )
        if preset is not None:
            return self.router_settings.preset(preset)
        if budget == OFF:
            return self.budget
        budget.check(self.router_settings, self.num_layers)
        return budget

    # --- running ---

    def _request(
        self,
        named: dict[str, Any],
        *,
        keep_visual_tokens: int | float | None = None,
        keep_layers: int | None = None,
        flops: float | None = None,
        quality: float | None = None,
        preset: str | None = None,
        route: Route | None = None,
        visual_mask: Tensor | None = None,
        coordinates: Tensor | None = None,
        prompt_length: int | None = None,
        reversible: bool | str = False,
        aside_bytes: int | None = None,
        run: bool = True,
    ) -> Request | None:
        """Return what a pass with these inputs asks of the decoder; None: nothing, the plain model runs."""
        budget = self._budget(preset, Budget(keep_visual_tokens, keep_layers, flops, quality))
        cache = cache_in(named)
        check_finished(cache)
        turn = run and turn_of(self, named, budget, reversible=reversible, aside_bytes=aside_bytes, imposed=route)
        held = None if turn and turn.again else getattr(cache, "route", None)
        if held is not None and preset == "off":
            raise ValueError(
                "preset='off' asks for the whole model, and this cache holds a route: tokens and layers are missing in "
                "it. Begin with a new cache, or leave the preset out to go on with the route."
            )
        if held is None and route is None and budget.is_off and run:
            return None
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        decoding = cache is not None and tokens.shape[1] == 1  # no look at the values: it would synchronise
        past = 0 if cache is None or decoding else int(cache.get_seq_length())
        visual = None if decoding else self._visual(named, visual_mask)
        if visual is None and (decoding or past):
            route = None  # it was for the prompt
        if visual is None and route is None and held is None and not turn:
            return None
        router = getattr(self, "router", None)  # none: routes are imposed
        request = Request(router, self.router_settings, budget, visual, imposed=route, run=run)
        labels = named.get("labels")
        request.labels = None if labels is None else labels.clone()
        if visual is not None:
            request.coordinates = pass_coordinates(self.config, visual, named, whole=coordinates, past=past)
        if turn:
            request.turn = turn
            turn.see(request, tokens)
        if request.visual is not None:
            warn_of_excess(budget, request.visual)
            request.hidden = hidden_tokens(request.visual, labels, prompt_length, 0 if turn and turn.again else past)
        return request

    def _visual(self, named: dict[str, Any], visual_mask: Tensor | None) -> Tensor | None:
        """Return [B, S] True at visual tokens; None if there are none."""
        if (input_ids := named.get("input_ids")) is not None:
            visual = placeholders(self.config, input_ids)
        elif visual_mask is not None:
            visual = visual_mask.bool()
        else:
            raise ValueError(
                "inputs_embeds alone do not tell which tokens are visual: pass visual_mask [B, S] with them, input_ids "
                "in place of them, or preset='off'."
            )
        return visual if bool(visual.any()) else None

    def route(self, **inputs: Any) -> Route:
        """Return the route of inputs under a budget: `model.route(**inputs, preset="fast")`. Runs up to the router."""
        request = self._up_to_router(**inputs)
        if request is not None:
            route: Route = request.route
            return route
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
        return Route.of_text(tokens, self.num_layers)

    def router_inputs(self, **inputs: Any) -> RouterInputs:
        """Return the router's inputs, to train it: `model.router(*model.router_inputs(**inputs))`."""
        request = self._up_to_router(**inputs)
        if request is None:
            raise ValueError("these inputs have no visual token: there is nothing to route.")
        seen: RouterInputs = request.router_inputs
        return seen

    @torch.no_grad()
    def _up_to_router(self, **inputs: Any) -> Request | None:
        routing = {name: inputs.pop(name) for name in ROUTING_ARGUMENTS if name in inputs}
        request = self._request(inputs, **routing, run=False)
        inputs.pop("labels", None)
        if request is not None:
            inputs = with_cache_as(cache_name(self._stock.forward), inputs)
            self._stock.forward(self, **{**inputs, "use_cache": False, "logits_to_keep": 1, "routing": request})
            request.check_reached()
        return request

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate` does; the outputs of `return_dict_in_generate` have `.route`.

        A draft for assisted decoding sees nothing of the budget: a routed one runs under its own (`set_budget`).
        """
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        if kwargs.get("prefill_chunk_size") or settings.prefill_chunk_size:
            raise ValueError(
                "prefill_chunk_size would choose the route by the first chunk of the prompt: leave it out."
            )
        kwargs = with_cache_as(cache_name(self._stock.forward), kwargs)
        routing = {name: kwargs.pop(name) for name in ROUTING_ARGUMENTS if name in kwargs}
        if routing.get("reversible"):
            check_generation(settings, kwargs)
        limits = Budget(**{field.name: routing.get(field.name) for field in fields(Budget)})
        self._budget(routing.get("preset"), limits)
        if self._budget_is_default and limits == OFF and routing.get("preset") is None and routing.get("route") is None:
            tell_of_default(self.router_settings)
        routing.setdefault("prompt_length", prompt_length(inputs, kwargs))
        if routing.get("coordinates") is None:
            routing["coordinates"] = self._coordinates(inputs, kwargs, routing["prompt_length"])
        kwargs.setdefault("disable_compile", True)  # of the whole pass, as transformers does with static caches
        generation = Generation(self, routing)
        before = GENERATION.set(generation)
        try:
            output = super().generate(inputs, *args, **kwargs)
        finally:
            GENERATION.reset(before)
        if not isinstance(output, Tensor):
            held = getattr(cache_of(output), "route", None)
            output.route = generation.route if held is None else held
        return output

    def _coordinates(self, inputs: Tensor | None, kwargs: dict[str, Any], total: int | None) -> Tensor | None:
        """Return coordinates for the whole text, [B, T, 3]: `generate` encodes images itself and keeps their grids."""
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        if tokens is None or total is None or all(kwargs.get(name) is None for name in GRIDS):
            return None
        cache = cache_in(kwargs)
        new = tokens if cache is None or tokens.shape[1] < total else tokens[:, cache.get_seq_length() :]
        visual = self._visual({"input_ids": new}, None)
        if visual is None:
            return None
        return F.pad(coordinates_of(self.config, visual, {**kwargs, "input_ids": new}), (0, 0, total - new.shape[1], 0))

    # --- the router's file ---

    def _attach_router(self) -> None:
        """Add the router, last and by torch's own initialisation: transformers neither loads nor places it."""
        self.router = Router(self.config.get_text_config().hidden_size, self.router_settings)
        self._keys_to_ignore_on_save |= {f"router.{name}" for name in self.router.state_dict()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as the stock class does, and the router: on the device of the embeddings, never offloaded (it is small).

        Args:
            kwargs: `preset="fast"` among them is the budget of all calls that name none, as by `set_budget`.
        """
        preset = kwargs.pop("preset", None)
        weights = load_file(router_file(pretrained_model_name_or_path, kwargs))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs, with_router=False)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._attach_router()
        model._load_router(weights)
        if preset is not None:
            model.set_budget(preset)
        return loaded

    def _load_router(self, weights: dict[str, Tensor]) -> None:
        load_weights(self.router, weights, ROUTER_FILE)
        embedding = self.get_input_embeddings()
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        self.router.to(embedding.weight.device if device is None else device, self.dtype).eval()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the stock class does, with this file and the router's weights in a folder of their own."""
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            tensors = kwargs.get("state_dict") or {f"router.{n}": t for n, t in self.router.state_dict().items()}
            router = {n.removeprefix("router."): t for n, t in tensors.items() if n.startswith("router.")}
            save_weights(router, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


ROUTING_ARGUMENTS = {
    name: parameter
    for name, parameter in inspect.signature(RoutedModel._request).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "run"
}


# --- a class for each type --------------------------------------------------------------------------------------------


@functools.cache
def routed(stock: Any, module: str = __name__) -> Any:
    """Make the routed class of a stock one: `forward` takes the arguments of both, the hub's names are kept.

    Args:
        module: that has the class, by which a saved folder finds it.
    """
    signature = inspect.signature(stock.forward)
    names, cache = list(signature.parameters)[1:], cache_name(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = with_cache_as(cache, {**dict(zip(names, args, strict=False)), **kwargs})
        routing = {name: named.pop(name) for name in ROUTING_ARGUMENTS if name in named}
        generation = GENERATION.get()
        if generation is not None and generation.model is self:
            routing = generation.arguments(number_of_sequences(named)) | routing
        request = self._request(named, **routing)
        if request is None:
            return stock.forward(self, **named)
        if request.labels is not None:
            named["labels"] = request.labels
        output = stock.forward(self, **named, routing=request)
        request.check_reached()
        if generation is not None and generation.model is self and generation.route is None:
            generation.route = request.route
        if not isinstance(output, tuple):
            output.route = request.route
        return output

    *stock_parameters, rest = signature.parameters.values()  # `generate` reads the signature
    forward.__signature__ = signature.replace(parameters=[*stock_parameters, *ROUTING_ARGUMENTS.values(), rest])
    name = f"Routed{stock.__name__}"
    register_hub_names(stock, name)
    return type(name, (RoutedModel, stock), {"__module__": module, "forward": forward, "_stock": stock})


def __getattr__(name: str) -> Any:
    """Make the class that is asked for: a checkpoint needs one, and importing all of transformers takes seconds."""
    if (stock := stock_class(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return routed(stock)
