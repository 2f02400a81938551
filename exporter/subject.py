"""What is timed: a model that sees, prefills and decodes. Plain and routed checkpoints in torch are one kind of it.

Another runtime is another class with the attributes and methods of `Subject`; what times it knows nothing else of it.

Shapes: B rows, S tokens of the prompt, L layers.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .budgets import counted
from .calibration import Batch
from .clean_room import load_processor
from .errors import InputError
from .modeling.routed_api import cache_name, cache_of
from .pipeline import kv_bytes_per_token
from .source import Source, compute_dtype, load_model, open_source, text_decoder
from .trust import warn_of_foreign_code

PIXELS = ("pixel_values", "pixel_attention_mask")  # only the vision tower reads them
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
Asked = dict[str, Any]  # a budget as `generate` takes it: keep_visual_tokens and keep_layers, or preset


@dataclass(frozen=True)
class Setup:
    """How models are run."""

    device: str
    dtype: str = "auto"
    attention: str | None = None  # None: the checkpoint's own
    compile: bool = False  # the dense parts of decoder layers


@dataclass(frozen=True)
class Cost:
    """Counted, not timed. None where a runtime can't tell."""

    flops: int | None  # of prefill, by torch's counter
    vision_flops: int | None  # of see
    decode_flops: int | None  # of the first decoding step
    kv_bytes: int | None  # keys and values of the prompt: the sizes of the cache's tensors
    kv_bytes_formula: int | None  # the same from configuration, prompt and route
    weight_bytes: int  # of the whole model
    step_bytes: int | None  # what a decoding step reads: weights of the layers that run, head, keys and values


class Subject(Protocol):
    """A model ready to be timed, under one budget."""

    @property
    def path(self) -> str: ...

    @property
    def budget(self) -> Asked | None:
        """None: it runs whole."""

    @property
    def routed(self) -> bool:
        """It has a router."""

    @property
    def runtime(self) -> str:
        """For people: 'torch, sdpa, float32'."""

    @property
    def processor(self) -> Any: ...

    @property
    def config(self) -> Any: ...

    @property
    def input_device(self) -> Any:
        """Where prompts are to lie."""

    @property
    def gives_memory_back(self) -> bool:
        """What a run takes is free after it, so that the growth in another run can be measured."""

    def see(self, prompt: Batch) -> Any:
        """Vision tower and projector, on pixels that the processor has made already."""

    def prefill(self, prompt: Batch, seen: Any) -> Any:
        """From image features and token ids to the first answer token of each row, and a cache that holds the prompt;
        in a routed model the router too. A runtime that has the tower in this graph returns None from `see`."""

    def decode(self, state: Any) -> Any:
        """One more token for each row: in, and the next one out."""

    def cost(self, prompt: Batch, new_tokens: int) -> Cost:
        """What the three take in counted operations and bytes."""


# --- checkpoints of transformers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """After a pass: what decoding goes on from."""

    cache: Any
    mask: Tensor | None  # [B, S so far]; None without padding
    token: Tensor  # [B, 1] chosen greedily, not looked at: that would synchronise
    route: Any = None


@dataclass(frozen=True)
class TorchSubject:
    """A plain checkpoint, or a routed one under a budget."""

    path: str
    budget: Asked | None
    model: Any
    processor: Any
    runtime: str
    gives_memory_back = True

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def input_device(self) -> Any:
        return self.model.device

    @property
    def routed(self) -> bool:
        return is_routed(self.model)

    @property
    def _asked(self) -> Asked:
        return (self.budget or {"preset": "off"}) if self.routed else {}

    @torch.inference_mode()
    def see(self, prompt: Batch) -> Any:
        if PIXELS[0] not in prompt.inputs:
            return None
        encode = self.model.base_model.get_image_features
        given = {name: prompt.inputs[name] for name in inspect.signature(encode).parameters if name in prompt.inputs}
        return encode(**given, return_dict=True)

    @torch.inference_mode()
    def prefill(self, prompt: Batch, seen: Any) -> State:
        inputs: dict[str, Any] = {name: value for name, value in prompt.inputs.items() if name not in PIXELS}
        mask = inputs.get("attention_mask")
        if seen is not None:
            inputs["mm_encoder_outputs"] = {"image": seen}
        return self._state(self.model(**inputs, **self._positions(mask), use_cache=True, **self._rest), mask)

    @torch.inference_mode()
    def decode(self, state: State) -> State:
        mask = None if state.mask is None else torch.nn.functional.pad(state.mask, (0, 1), value=1)
        inputs = {"input_ids": state.token, cache_name(self.model.forward): state.cache, "attention_mask": mask}
        return self._state(self.model(**inputs, **self._positions(mask, -1), **self._rest), mask, state.route)

    @property
    def _rest(self) -> dict[str, Any]:
        return {**self._asked, "logits_to_keep": 1}

    def _positions(self, mask: Tensor | None, start: int = 0) -> dict[str, Any]:
        """Of padded rows, from a column on; without padding a model counts right by itself."""
        if mask is None:
            return {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        if not hasattr(self.model.base_model, "rope_deltas"):
            return {"position_ids": positions}
        if start == 0:  # models that count in three dimensions (mRoPE) find where images lie, and note what comes after
            return {}
        return {"position_ids": (positions + self.model.base_model.rope_deltas).expand(3, -1, -1)}

    @staticmethod
    def _state(output: Any, mask: Tensor | None, route: Any = None) -> State:
        token = output.logits[:, -1:].argmax(-1)
        return State(cache_of(output), mask, token, getattr(output, "route", None) if route is None else route)

    def cost(self, prompt: Batch, new_tokens: int) -> Cost:
        with counted() as vision:
            seen = self.see(prompt)
        with counted() as prefill:
            state = self.prefill(prompt, seen)
        begin, formula = cache_bytes(state.cache), self._kv_bytes(prompt, state.route)
        with counted() as step:
            state = self.decode(state)
        for _ in range(new_tokens - 1):
            state = self.decode(state)
        own = {id(p): p for p in (*self.model.parameters(), *self.model.buffers())}
        return Cost(
            flops=prefill.get_total_flops(),
            vision_flops=vision.get_total_flops(),
            decode_flops=step.get_total_flops(),
            kv_bytes=begin,
            kv_bytes_formula=formula,
            weight_bytes=sum(tensor.nbytes for tensor in own.values()),
            step_bytes=weights_read(self.model, state.route) + (begin + cache_bytes(state.cache)) // 2,
        )

    def _kv_bytes(self, prompt: Batch, route: Any) -> int:
        drop_at = self.model.router_settings.drop_at if route is not None else 0
        mask = prompt.inputs.get("attention_mask")
        real = torch.ones_like(prompt.is_visual) if mask is None else mask.bool()
        return kv_bytes(self.config, self.model.dtype, real, route, drop_at)


def cache_bytes(cache: Any) -> int:
    """Size of the keys and values that a cache of transformers holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def kv_bytes(config: Any, dtype: torch.dtype, real: Tensor, route: Any = None, drop_at: int = 0) -> int:
    """Bytes of keys and values after a prompt: rows x tokens of each layer, times what a token takes in one.

    Args:
        real: [B, S] False at padding, which takes room as long as no token leaves.
        route: its layers [B, L] say which rows a layer runs, its keep [B, S] which tokens it has from `drop_at` on.
    """
    text = config.get_text_config()
    per_token = kv_bytes_per_token(config, dtype) // text.num_hidden_layers
    there = torch.ones_like(real)
    kept = there if route is None or bool((route.keep | ~real).all()) else route.keep & real
    entries = 0
    for layer_idx, window in enumerate(windows(text)):
        rows = len(real) if route is None else int(route.layers[:, layer_idx].sum())
        tokens = kept if layer_idx >= drop_at else there
        start = 0 if window is None else max(0, tokens.shape[1] - window + 1)
        entries += rows * int(tokens[:, start:].sum(1).max())
    return entries * per_token


def windows(text: Any) -> list[int | None]:
    """The sliding window of each layer, None where it sees everything."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def weights_read(model: Any, route: Any = None) -> int:
    """Bytes of the weights that a decoding step multiplies with: layers that any row runs, last norm, head."""
    decoder = text_decoder(model)
    layers = [layer for i, layer in enumerate(decoder.layers) if route is None or bool(route.layers[:, i].any())]
    modules = [*layers, decoder.norm, model.get_output_embeddings()]
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


# --- opening ----------------------------------------------------------------------------------------------------------


def is_routed(model: Any) -> bool:
    return hasattr(model, "router_settings")


def load_torch(source: Source, setup: Setup) -> Any:
    """A plain model, or a routed one where the folder has a router."""
    if setup.device == "auto":
        raise InputError("a model spread over several devices can't be timed against another: name one device.")
    if setup.attention is not None and setup.attention not in ATTENTIONS:
        raise InputError(f"attention '{setup.attention}' is not known: {', '.join(ATTENTIONS)}.")
    dtype = compute_dtype(setup.dtype, source.config, setup.device)
    try:
        model, _ = load_model(source, setup.device, dtype, cls=_routed_class(source))
    except InputError:
        raise
    except (ValueError, OSError) as error:  # the router's settings or weights do not fit, or are not there
        raise InputError(f"{source.name}: {error}") from error
    if setup.attention is not None:
        try:
            model.set_attn_implementation(setup.attention)
        except (ImportError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"attention '{setup.attention}' can't run here: {reason}") from error
    return model


def _routed_class(source: Source) -> Any:
    """None where the folder has no router: the stock class."""
    if "router" not in source.raw_config:
        return None
    from .modeling import modeling_routed

    warn_of_foreign_code(source.folder, source.name)
    return getattr(modeling_routed, modeling_routed.class_name(source.config.model_type))


def compile_dense(model: Any) -> None:
    """Compile what is dense in each decoder layer, norms and MLP, in place; attention and routing stay as they are."""
    for layer in text_decoder(model).layers:
        for name, part in layer.named_children():
            if name != "self_attn":
                part.compile(dynamic=True)


def compile_whole(model: Any) -> None:
    """Compile the decoder in place; of a routed model what is dense: its route is decided midway."""
    if is_routed(model):
        compile_dense(model)
    else:
        text_decoder(model).compile(dynamic=True)


def twin(model: Any) -> Any:
    """Modules and configuration of their own around the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def budget_of(model: Any, asked: Asked | None, path: str) -> Asked | None:
    """What a model is to run under: what is asked for, checked; where nothing is, its own default."""
    if not is_routed(model):
        return None
    from .modeling.modeling_routed import Budget

    settings = model.router_settings
    asked = {"preset": settings.default} if asked is None else asked
    try:
        if "preset" in asked:
            budget = settings.preset(asked["preset"])
        else:
            budget = Budget(**asked)
            budget.check(settings, model.num_layers)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return None if budget.is_off else asked


class TorchRuntime:
    """Opens checkpoints of transformers. Models are loaded once, however many budgets they are timed under."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._loaded: dict[str, tuple[Any, Any]] = {}  # model, processor
        self._to_compile: list[Any] = []

    def open(self, path: str, asked: Asked | None) -> TorchSubject:
        if path not in self._loaded:
            source = open_source(path)
            self._loaded[path] = load_torch(source, self.setup), load_processor(source.folder)
        model, processor = self._loaded[path]
        runtime = describe_way(model) + ", dense parts compiled" * self.setup.compile
        return TorchSubject(path, budget_of(model, asked, path), model, processor, runtime)

    def other_ways(self, subject: TorchSubject) -> list[TorchSubject]:
        """The same weights with eager attention, and compiled; none where the setup asks for one way."""
        if self.setup.attention is not None or self.setup.compile:
            return []
        eager, compiled = twin(subject.model), twin(subject.model)
        eager.set_attn_implementation("eager")
        self._to_compile.append(compiled)
        return [
            replace(subject, model=eager, runtime=describe_way(eager)),
            replace(subject, model=compiled, runtime=f"{describe_way(compiled)}, compiled"),
        ]

    def compile(self) -> None:
        """What is to be compiled. To be called after everything has been counted: it can't be looked into any more."""
        if self.setup.compile:
            for model, _ in self._loaded.values():
                compile_dense(model)
        for model in self._to_compile:
            compile_whole(model)


def describe_way(model: Any) -> str:
    kind = str(model.dtype).removeprefix("torch.")
    return f"torch, {model.config.get_text_config()._attn_implementation}, {kind}"
