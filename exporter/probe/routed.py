"""Whether a type can be routed: a small model of it, routed, against its stock layers run one by one.

What a router's files need of a type is found in its code (what decoder and layers take, where layers keep what they
have seen) and by running it: off, the routed model is the stock one bit for bit; with tokens dropped and layers skipped
it gives what stock layers give on what is left, in the prompt and, from the cache, behind it.

Shapes: B sequences, S tokens, K of them that stay, L layers, D hidden size.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..families import OWN_FAMILIES, is_listed, visual_token_ids
from .pictures import NoPicture, picture_prompts
from .stack import NoStack, build, check_stack, head_logits
from .stock_layers import Stock, Unroutable, close
from .tiny_config import tiny_config
from .writes import watched

NAMED = 64  # the tokens of a small model that its configuration may name come before this one
NEW = 3  # tokens said from the cache
DROP_AT = (0, 2)
SEQUENCES = 2
WINDOW = 16  # of layers that see so many tokens back: shorter than the prompts
MEANINGS = {  # of what a layer or the decoder is given beside states, masks and positions
    "per_layer_inputs": "each layer is given embeddings of its own",
    "per_layer_input": "each layer is given embeddings of its own",
    "ple_input_ids": "each layer is given embeddings of its own",
    "shared_kv_states": "layers use the keys and values of earlier ones",
    "prev_topk_indices": "layers use the tokens that earlier ones have chosen",
    "cross_attention_states": "layers attend to the picture beside the text",
    "encoder_hidden_states": "layers attend to the picture beside the text",
    "conv_mask": "layers run a convolution over neighbouring tokens",
    "vision_mask": "features of the picture are added between layers that the configuration names",
    "moe_mm_token_type_ids": "experts are chosen by which tokens are visual",
    "pixel_values": "the stack of layers makes features of pictures itself",
    "image_embeds": "the stack of layers puts features of pictures into the text itself",
}


def why_not_routed(config: Any) -> str | None:
    """Return why a model of a loaded configuration can't have a router: a clause; None if it can.

    Types of the tables can: the tests run a model of each.
    """
    if is_listed(config) or config.model_type in OWN_FAMILIES:
        return None
    data = {name: value for name, value in config.to_dict().items() if name not in ("router", "auto_map")}
    return tried(config.model_type, json.dumps(data, sort_keys=True, default=str)).reason


class Tried(NamedTuple):
    """The outcome of a trial."""

    reason: str | None  # why the type does not route: a clause; None: it does
    with_picture: bool = False  # False: placeholders stood for themselves


@functools.lru_cache(maxsize=16)
def tried(model_type: str, data: str, layers: int | None = None) -> Tried:
    """Try whether a small model of a configuration routes.

    Args:
        data: the configuration as JSON.
        layers: how many layers the small model has; None: as many as the configuration says.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type].from_dict(json.loads(data))
    try:
        model = build(with_short_windows(tiny_config(config, layers)))
    except Exception as error:  # whatever a class makes of sizes that it does not foresee
        return Tried(f"no small model could be made to look ({first_line(error)})")
    try:
        check_kinds(config)
        return Tried(None, check_routes(model))
    except (NoStack, NoPicture, Unroutable) as error:
        return Tried(str(error))


def with_short_windows(config: Any) -> Any:
    """Shorten sliding windows, in place, so that prompts are longer."""
    text = config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(WINDOW, getattr(text, name)))
    return config


def check_routes(model: Any) -> bool:
    """Try a small model routed. Returns whether it was shown a picture. Raises: Unroutable, NoPicture, NoStack."""
    if not visual_token_ids(model.config):
        raise NoPicture("its configuration names no token that stands for a picture's features")
    check_structure(model)
    prompts, with_pixels = picture_prompts(model, SEQUENCES)
    if not with_pixels and "deepstack_visual_embeds" in inspect.signature(type(check_stack(model)).forward).parameters:
        raise NoPicture("no picture could be put before its small model, whose layers are given features of it")
    stock = Stock(model, prompts)
    with torch.no_grad():
        try:
            check_caches(cache_of_pass(model, prompts[0]))
            check_head(stock)
            routed = as_routed(copy.deepcopy(model))
            check_off(stock, routed)
            for drop_at in DROP_AT:
                check_on(stock, routed, drop_at)
            check_router(stock, routed)
        except Unroutable:
            raise
        except Exception as error:  # whatever its code makes of a text with gaps
            raise Unroutable(
                f"its small model does not run with fewer tokens and layers: {first_line(error)}"
            ) from error
    return with_pixels


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- what its code says -----------------------------------------------------------------------------------------------


def check_kinds(config: Any) -> None:
    """Refuse a configuration whose layers keep anything but keys and values of each token."""
    from ..modeling.routed_api import DynamicCache

    try:
        cache = DynamicCache(config=config.get_text_config())
    except KeyError:  # kinds that its model makes a cache for itself, which a pass shows
        return
    check_caches(cache)


def check_structure(model: Any) -> None:
    """Refuse a decoder or layers that are handed what a route does not narrow."""
    from ..modeling.routed_api import DECODER_NEEDS, DECODER_TAKES, LAYER_NEEDS, LAYER_TAKES, misfit, unknown_arguments

    decoder = check_stack(model)
    for module_class, known, needed in (
        *((type(layer), LAYER_TAKES, LAYER_NEEDS) for layer in decoder.layers),
        (type(decoder), DECODER_TAKES, DECODER_NEEDS),
    ):
        if unknown := unknown_arguments(module_class, known):
            name = next((name for name in unknown if name in MEANINGS), unknown[0])
            meaning = MEANINGS.get(name, "it is not known what stays of it when tokens leave")
            raise Unroutable(f"{meaning} ({module_class.__name__} takes {name!r})")
        if reason := misfit(module_class, known, needed):
            raise Unroutable(reason)


def cache_of_pass(model: Any, prompt: dict[str, Tensor]) -> Any:
    """Return the cache that a pass over a prompt leaves."""
    from ..modeling.routed_api import cache_of

    cache = cache_of(model(**prompt, use_cache=True))
    if cache is None:
        raise Unroutable("it hands no cache on, in which a route could lie")
    return cache


def check_head(stock: Stock) -> None:
    """Refuse a head that does more than what a router is trained through: a norm, a matrix, a factor."""
    with watched(check_stack(stock.model).layers) as noted:
        expected = stock.model(**stock.prompts[0], use_cache=False).logits
    if not close(head_logits(stock.model, noted.after[-1]), expected):
        raise Unroutable("its logits are made of the last layer's output in a way that is not known")


def check_caches(cache: Any) -> None:
    """Refuse layers that keep anything but keys and values of each token."""
    from ..modeling.routed_api import DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if kinds := {type(layer).__name__: None for layer in cache.layers if type(layer) not in plain}:
        raise Unroutable(
            f"some of its layers keep something else than keys and values of each token ({', '.join(kinds)}), of which "
            "a token cannot be left out"
        )


# --- routed against it ------------------------------------------------------------------------------------------------


def as_routed(model: Any) -> Any:
    """Make a small model a routed one, in place, with a random router."""
    from ..modeling.modeling_routed import routed
    from ..modeling.routed_pass import make_routable
    from ..modeling.routed_route import OFF, ROUTER_FORMAT, RouterSettings

    num_layers = model.config.get_text_config().num_hidden_layers
    model.config.router = {
        "drop_at": min(2, num_layers - 1), "read_at": min(2, num_layers - 1), "candidates": [num_layers - 1],
        "bottleneck": 32, "num_heads": 2, "format": ROUTER_FORMAT, "default": "off",
    }  # fmt: skip
    stock: Any = type(model)
    model.__class__ = routed(stock)
    model.router_settings, model.budget = RouterSettings.of(model.config), OFF
    make_routable(model._text_model())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._attach_router()
    model.router.eval().requires_grad_(False)
    return model


def check_off(stock: Stock, routed: Any) -> None:
    """Refuse where the routed model without a budget is not the stock one bit for bit."""
    expected = stock.model(**stock.batch, use_cache=False).logits
    if not torch.equal(routed(**stock.batch, use_cache=False, preset="off").logits, expected):
        raise Unroutable("without a budget its routed model gives other logits than the stock one")
    answers = [generated(model, stock.batch, **options).sequences
            for model, options in ((stock.model, {}), (routed, {"preset": "off"}))]  # fmt: skip
    if not torch.equal(*answers):
        raise Unroutable("without a budget its routed model says something else than the stock one")


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """Generate a few tokens greedily, with the logits that they were chosen by."""
    names = list(range(NAMED))  # a placeholder that is said would have to have a picture
    return model.generate(
        **batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=names, **options,
    )  # fmt: skip


def check_on(stock: Stock, routed: Any, drop_at: int) -> None:
    """Refuse where logits under a route are not those of stock layers: of the prompt, and of what is said behind it."""
    from ..modeling.routed_route import Route

    random = torch.Generator().manual_seed(drop_at)
    keep = ~stock.visual | (torch.rand(stock.visual.shape, generator=random) < 0.4)
    layers = torch.rand(SEQUENCES, routed.num_layers, generator=random) < 0.7
    layers[0, -1], layers[1, -1] = True, False  # one layer that some sequences skip
    route = Route(keep=keep, layers=layers, drop_at=drop_at)
    for numbers in stock.together:
        batch, chosen = stock.batch_of(numbers), route.select(torch.tensor(numbers))
        prompt = routed(**batch, use_cache=False, route=chosen).logits
        output = generated(routed, batch, route=chosen)
        for place, number in enumerate(numbers):
            steps = torch.stack([step[place] for step in output.logits])
            answer = output.sequences[place, -NEW:]
            check_sequence(stock, route, number, prompt=prompt[place], answer=answer, steps=steps)


def check_sequence(stock: Stock, route: Any, number: int, *, prompt: Tensor, answer: Tensor, steps: Tensor) -> None:
    """Refuse where one sequence's logits under a route are not those of stock layers.

    Args:
        prompt: [S, vocabulary] its logits without a cache.
        answer: [A] what was said with a cache.
        steps: [A, vocabulary] by these logits.
    """
    keep, drop_at = route.keep[number], route.drop_at
    whole = torch.cat([keep, torch.ones_like(answer, dtype=torch.bool)])
    expected = stock.left(stock.extended(number, answer), keep=whole, layers=route.layers[number], drop_at=drop_at)
    before, behind = expected[: -len(answer)], expected[-len(answer) - 1 : -1]
    refuse_gap(prompt[keep], before, f"with tokens dropped at layer {drop_at} and layers skipped")
    refuse_gap(steps, behind, f"with a cache, tokens dropped at layer {drop_at} and layers skipped")
    if close(prompt[keep], stock.alone[number][keep]):
        raise Unroutable("what is left out changes nothing: it is not what its logits come from")


def refuse_gap(logits: Tensor, expected: Tensor, what: str) -> None:
    if not close(logits, expected):
        gap = float((logits - expected).abs().max())
        raise Unroutable(f"{what}, its logits differ by {gap:.1e} from those of its stock layers on what is left")


def check_router(stock: Stock, routed: Any) -> None:
    """Refuse where a budget is not kept, or what the router chooses runs otherwise than the same route by hand."""
    budget = {"keep_visual_tokens": 0.5, "keep_layers": routed.num_layers - 1}
    chosen = routed(**stock.batch, use_cache=False, **budget)
    counts = (chosen.route.keep & stock.visual).sum(1)
    if not torch.equal(counts, (stock.visual.sum(1) * 0.5).round().long()) or bool(chosen.route.layers.all()):
        raise Unroutable("a budget of half its visual tokens and a layer less is not kept")
    by_hand = routed(**stock.batch, use_cache=False, route=chosen.route)
    refuse_gap(chosen.logits[chosen.route.keep], by_hand.logits[chosen.route.keep], "by its router")
