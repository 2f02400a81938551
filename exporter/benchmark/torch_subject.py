"""A checkpoint run by torch, as `bench` times it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.own_types import routed_class
from ..checkpoints.source import Source, open_source
from ..checkpoints.trust import warn_of_foreign_code
from ..clean_room import load_processor
from ..data.batches import Batch
from ..errors import InputError
from ..modeling.routed_api import cache_name, cache_of
from ..models.loading import compute_dtype, load_model, text_decoder
from ..probe.writes import is_mixer
from ..routing.cost import counted
from .subject import ATTENTIONS, Cost, GenerateKwargs, Setup, budget_to_run
from .torch_counting import PIXELS, cache_bytes, kv_bytes, weights_read


@dataclass(frozen=True)
class TorchDecodingState:
    """After a pass: what decoding goes on from."""

    cache: Any
    mask: Tensor | None  # [B, S so far]; None without padding
    token: Tensor  # [B, 1] chosen greedily, not looked at: that would synchronise
    route: Any = None


@dataclass(frozen=True)
class TorchSubject:
    """A plain checkpoint, or a routed one under a budget."""

    path: str
    budget: GenerateKwargs | None
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
    def _asked(self) -> GenerateKwargs:
        return (self.budget or {"preset": "off"}) if self.routed else {}

    @torch.inference_mode()
    def encode_images(self, prompt: Batch) -> Any:
        encoded = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in prompt.inputs:
                encode = getattr(self.model.base_model, f"get_{kind}_features")
                names = inspect.signature(encode).parameters
                encoder_inputs = {name: prompt.inputs[name] for name in names if name in prompt.inputs}
                encoded[kind] = encode(**encoder_inputs, return_dict=True)
        return encoded or None

    @torch.inference_mode()
    def prefill(self, prompt: Batch, seen: Any) -> TorchDecodingState:
        inputs: dict[str, Any] = {name: value for name, value in prompt.inputs.items() if name not in PIXELS}
        mask = inputs.get("attention_mask")
        if seen is not None:
            inputs["mm_encoder_outputs"] = dict(seen)  # the model adds to it
        return self._state(self.model(**inputs, **self._positions(mask), use_cache=True, **self._rest), mask)

    @torch.inference_mode()
    def decode(self, state: TorchDecodingState) -> TorchDecodingState:
        mask = None if state.mask is None else torch.nn.functional.pad(state.mask, (0, 1), value=1)
        inputs = {"input_ids": state.token, cache_name(self.model.forward): state.cache, "attention_mask": mask}
        return self._state(self.model(**inputs, **self._positions(mask, -1), **self._rest), mask, state.route)

    @property
    def _rest(self) -> dict[str, Any]:
        return {**self._asked, "logits_to_keep": 1}

    def _positions(self, mask: Tensor | None, start: int = 0) -> dict[str, Any]:
        """Return positions for padded sequences, from a column on; without padding a model counts right by itself."""
        if mask is None:
            return {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        if not hasattr(self.model.base_model, "rope_deltas"):
            return {"position_ids": positions}
        if start == 0:  # models that count in three dimensions (mRoPE) find where images lie, and note what comes after
            return {}
        return {"position_ids": (positions + self.model.base_model.rope_deltas).expand(3, -1, -1)}

    @staticmethod
    def _state(output: Any, mask: Tensor | None, route: Any = None) -> TorchDecodingState:
        token = output.logits[:, -1:].argmax(-1)
        return TorchDecodingState(
            cache_of(output), mask, token, getattr(output, "route", None) if route is None else route
        )

    def cost(self, prompt: Batch, new_tokens: int) -> Cost:
        with counted() as vision:
            seen = self.encode_images(prompt)
        with counted() as prefill:
            state = self.prefill(prompt, seen)
        begin, formula = cache_bytes(state.cache), self._kv_bytes(prompt, state.route)
        with counted() as step:
            state = self.decode(state)
        for _ in range(new_tokens - 1):
            state = self.decode(state)
        tensors = {id(p): p for p in (*self.model.parameters(), *self.model.buffers())}
        return Cost(
            flops=prefill.get_total_flops(),
            vision_flops=vision.get_total_flops(),
            decode_flops=step.get_total_flops(),
            kv_bytes=begin,
            kv_bytes_formula=formula,
            weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            step_bytes=weights_read(self.model, state.route) + (begin + cache_bytes(state.cache)) // 2,
        )

    def _kv_bytes(self, prompt: Batch, route: Any) -> int:
        drop_at = self.model.router_settings.drop_at if route is not None else 0
        mask = prompt.inputs.get("attention_mask")
        real = torch.ones_like(prompt.is_visual) if mask is None else mask.bool()
        return kv_bytes(self.config, self.model.dtype, real=real, route=route, drop_at=drop_at)


def is_routed(model: Any) -> bool:
    return hasattr(model, "router_settings")


def load_torch(source: Source, setup: Setup) -> Any:
    """Return a plain model, or a routed one where the folder has a router."""
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
    """Return the routed class; None, for the stock class, where the folder has no router."""
    if "router" not in source.raw_config:
        return None
    warn_of_foreign_code(source.folder, source.name)
    return routed_class(source.config.model_type)


def compile_dense(model: Any) -> None:
    """Compile what is dense in each decoder layer, norms and MLP, in place; attention and routing stay as they are."""
    for layer in text_decoder(model).layers:
        for name, part in layer.named_children():
            if not is_mixer(name):
                part.compile(dynamic=True)


def compile_whole(model: Any) -> None:
    """Compile the decoder in place; of a routed model what is dense: its route is decided midway."""
    if is_routed(model):
        compile_dense(model)
    else:
        text_decoder(model).compile(dynamic=True)


def clone_that_shares_weights(model: Any) -> Any:
    """Return modules and configuration of their own around the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def budget_of(model: Any, request: GenerateKwargs | None, path: str) -> GenerateKwargs | None:
    """Return the budget that a model is timed under. Raises InputError for one that it can't run under."""
    if not is_routed(model):
        entry = getattr(model.config, "serving_router", None)
        default = {"preset": entry.get("default", "off") if isinstance(entry, dict) else "off"}
        if entry is not None and (default if request is None else request) != {"preset": "off"}:
            raise InputError(
                f"{path} has a serving router, which is timed where it serves, in an engine: time it here as the plain "
                "model, with --preset off."
            )
        return None
    from ..modeling.routed_route import Budget, RouterSettings

    settings: RouterSettings = model.router_settings

    def checked(preset: str | None = None, **numbers: Any) -> Budget:
        if preset is not None:
            return settings.preset(preset)
        budget = Budget(**numbers)
        budget.check(settings, model.num_layers)
        return budget

    return budget_to_run(path, request, settings.default, checked)


class TorchRuntime:
    """Opens checkpoints of transformers. Models are loaded once, however many budgets they are timed under."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._loaded: dict[str, tuple[Any, Any]] = {}  # model, processor
        self._to_compile: list[Any] = []

    def open(self, path: str, request: GenerateKwargs | None) -> TorchSubject:
        if path not in self._loaded:
            source = open_source(path)
            self._loaded[path] = load_torch(source, self.setup), load_processor(source.folder)
        model, processor = self._loaded[path]
        runtime = describe_way(model) + (", dense parts compiled" if self.setup.compile else "")
        return TorchSubject(
            path=path, budget=budget_of(model, request, path), model=model, processor=processor, runtime=runtime
        )

    def other_ways(self, subject: TorchSubject) -> list[TorchSubject]:
        """Return the same weights with eager attention, and compiled; none where the setup asks for one way."""
        if self.setup.attention is not None or self.setup.compile:
            return []
        eager, compiled = clone_that_shares_weights(subject.model), clone_that_shares_weights(subject.model)
        eager.set_attn_implementation("eager")
        self._to_compile.append(compiled)
        return [
            replace(subject, model=eager, runtime=describe_way(eager)),
            replace(subject, model=compiled, runtime=f"{describe_way(compiled)}, compiled"),
        ]

    def compile(self) -> None:
        """Compile the models. Call it after everything has been counted: compiled layers can't be looked into."""
        if self.setup.compile:
            for model, _ in self._loaded.values():
                compile_dense(model)
        for model in self._to_compile:
            compile_whole(model)


def describe_way(model: Any) -> str:
    kind = str(model.dtype).removeprefix("torch.")
    return f"torch, {model.config.get_text_config()._attn_implementation}, {kind}"
