"""ONNX folders as `bench` times them: the runner's halves, with what they take counted from the graphs.

Shapes: B sequences, S tokens of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..clean_room import load_processor
from ..data.batches import Batch
from ..errors import InputError
from ..onnx.manifest import read_manifest
from ..onnx.runtime.load import load
from ..onnx.runtime.model import DecodingState, OnnxModel
from ..onnx.runtime.prepare import Prompt
from ..onnx.runtime.routed import FRONT, OnnxRouteBudget, RoutedOnnxModel, RoutedState
from ..onnx.verification import verify
from .onnx_counting import GraphSize, graph_size
from .subject import Cost, GenerateKwargs, budget_to_run


@dataclass(frozen=True)
class Seen:
    """A prompt laid out for the graphs, and the features of its images."""

    prompt: Prompt
    features: Any


@dataclass(frozen=True)
class OnnxOutputs:
    """After a pass: what decoding goes on from."""

    state: DecodingState
    token: Any  # [B] chosen greedily


@dataclass(frozen=True)
class OnnxSubject:
    """A folder of `lvlm-exporter onnx`, under a budget where it has a router."""

    path: str
    budget: GenerateKwargs | None
    model: OnnxModel
    processor: Any
    config: Any
    new_tokens: int  # that caches are made for
    input_device = "cpu"  # the runner takes what the processor made, and brings it to its device itself
    gives_memory_back = False  # ONNX Runtime keeps what it once took, so that a later run's growth says nothing

    @property
    def runtime(self) -> str:
        facts = self.model.manifest
        quantized = f", {facts['quantize']} weights" if facts["quantize"] else ""
        return f"ONNX Runtime, {facts['device']}, {facts['dtype']}{quantized}"

    @property
    def routed(self) -> bool:
        return isinstance(self.model, RoutedOnnxModel)

    def encode_images(self, prompt: Batch) -> Seen:
        laid_out = self.model.prompt({name: tensor.numpy() for name, tensor in prompt.inputs.items()})
        return Seen(laid_out, self.model.image_features(laid_out))

    def prefill(self, prompt: Batch, seen: Seen) -> OnnxOutputs:
        return self._prefill(seen, self.new_tokens)

    def _prefill(self, seen: Seen, new_tokens: int) -> OnnxOutputs:
        if isinstance(self.model, RoutedOnnxModel):
            self.model.budget = self._limits
        logits, state = self.model.prefill(seen.prompt, new_tokens, seen.features)
        return OnnxOutputs(state, logits.argmax(-1))

    @cached_property
    def _limits(self) -> OnnxRouteBudget:
        assert isinstance(self.model, RoutedOnnxModel)
        return self.model.budget_for(**(self.budget or {"preset": "off"}))

    def decode(self, outputs: OnnxOutputs) -> OnnxOutputs:
        return OnnxOutputs(outputs.state, self.model.step(outputs.state, outputs.token).argmax(-1))

    # --- counted ---

    def cost(self, prompt: Batch, new_tokens: int) -> Cost:
        seen = self.encode_images(prompt)
        state = self._prefill(seen, 0).state
        sequences, length = seen.prompt.input_ids.shape
        passes = self._passes(state, length)
        head = self._sizes["decoder"].head
        router = self._sizes["router"].weights * length if self._chooses(state) else 0
        entries_of_a_step = sum(len(layers) * (entries + (new_tokens + 1) // 2) for _, layers, entries in passes)
        return Cost(
            flops=2 * sequences * (router + head)
            + sum(self._pass_flops(sequences, *graph_pass) for graph_pass in passes),
            vision_flops=None,
            decode_flops=2 * sequences * head + sum(self._step_flops(sequences, *graph_pass) for graph_pass in passes),
            kv_bytes=sum(self._bytes_of(value) for value in state.cache.values()),
            kv_bytes_formula=sequences
            * self._entry_bytes
            * sum(len(layers) * entries for _, layers, entries in passes),
            weight_bytes=sum(size.bytes for size in self._sizes.values()),
            step_bytes=sum(self._sizes[name].bytes - self._sizes[name].looked_up for name, _, _ in passes)
            + sequences * entries_of_a_step * self._entry_bytes,
        )

    @cached_property
    def _sizes(self) -> dict[str, GraphSize]:
        """Return sizes by graph, and by layer where that is a branch of one."""
        sizes = {path.stem: graph_size(path) for path in sorted(Path(self.path).glob("*.onnx"))}
        if isinstance(self.model, RoutedOnnxModel):
            layers = sorted(self.model.router_facts["candidates"])
            sizes |= {f"layer {i}": size for i, size in zip(layers, sizes["decoder"].branches, strict=True)}
        return sizes

    def _chooses(self, state: DecodingState) -> bool:
        """Return whether the router has been asked."""
        return isinstance(state, RoutedState) and (state.index is not None or not bool(state.runs.all()))

    def _passes(self, state: DecodingState, length: int) -> list[tuple[str, list[int], int]]:
        """Yield graph or branch, its layers and the entries of their cache, of everything that any sequence runs."""
        if not isinstance(self.model, RoutedOnnxModel):
            return [("decoder", list(range(self.model.manifest["layers"])), length)]
        assert isinstance(state, RoutedState)
        facts, kept = self.model.router_facts, int(state.kept.max())
        running = self.model.running(state)
        listed = [("decoder", [layer for layer in running if layer not in facts["candidates"]], kept)]
        if facts["drop_at"]:
            listed.append((FRONT, list(range(facts["drop_at"])), length))
        return listed + [(f"layer {layer}", [layer], kept) for layer in running if layer in facts["candidates"]]

    def _pass_flops(self, sequences: int, graph: str, layers: list[int], tokens: int) -> int:
        return 2 * sequences * tokens * (self._sizes[graph].weights + len(layers) * 2 * tokens * self._query_width)

    def _step_flops(self, sequences: int, graph: str, layers: list[int], entries: int) -> int:
        return 2 * sequences * (self._sizes[graph].weights + len(layers) * 2 * (entries + 1) * self._query_width)

    @property
    def _query_width(self) -> int:
        return int(self.config.get_text_config().num_attention_heads * self.model.manifest["head_size"])

    @property
    def _entry_bytes(self) -> int:
        """Return the bytes of one token in one layer."""
        facts = self.model.manifest
        return int(2 * facts["heads"] * facts["head_size"] * np.dtype(self.model.dtype).itemsize)

    def _bytes_of(self, value: Any) -> int:
        return int(np.prod(value.shape())) * np.dtype(self.model.dtype).itemsize


class OnnxRuntime:
    """Opens ONNX folders. Each is loaded once, however many budgets it is timed under."""

    def __init__(self, device: str, new_tokens: int, threads: int | None) -> None:
        self.device, self.new_tokens, self.threads = device, new_tokens, threads
        self._loaded: dict[str, OnnxSubject] = {}

    def open(self, path: str, request: GenerateKwargs | None) -> OnnxSubject:
        from transformers import AutoConfig

        if path not in self._loaded:
            if problems := verify(path).problems:
                raise InputError(f"{path} does not verify: {'; '.join(problems)}. Export it again.")
            if layout := read_manifest(Path(path)).layout:
                raise InputError(
                    f"{path} is in the layout {layout}, whose speed is that of its client and not measured here: time "
                    "an export of the same checkpoint without --layout."
                )
            model = load(path, self.device.partition(":")[0], self.threads)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self._loaded[path] = OnnxSubject(
                path=path,
                budget=None,
                model=model,
                processor=load_processor(path),
                config=config,
                new_tokens=self.new_tokens,
            )
        whole = self._loaded[path]
        return replace(whole, budget=budget_of(whole.model, request, path))


def budget_of(model: OnnxModel, request: GenerateKwargs | None, path: str) -> GenerateKwargs | None:
    """Return the budget that a folder is timed under. Raises InputError for one that it can't run under."""
    if not isinstance(model, RoutedOnnxModel):
        return None
    return budget_to_run(path, request, model.router_facts["default"], model.budget_for)
