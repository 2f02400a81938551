"""A routed folder: the router chooses for each question which visual tokens and layers run, within a budget.

    model.generate(**inputs, keep_visual_tokens=144, keep_layers=28)
    model.generate(**inputs, flops=0.5)  # a share of the cost
    model.generate(**inputs, preset="fast")  # or once for all: model.set_budget("fast")

Shapes: B sequences, S tokens, K that stay, N layers that may be skipped, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .cost import PromptCost
from .model import DecodingState, OnnxModel
from .places import patch_coordinates
from .prepare import Array, InputError, Prompt, padded, prepare

FRONT = "decoder_front"  # the graph of the embeddings and of the layers before the router, where there are any


@dataclass(frozen=True)
class OnnxRouteBudget:
    """A limit to what runs. None: no limit."""

    keep_visual_tokens: int | float | None = None  # a count for each sequence, or a share of what the sequence has
    keep_layers: int | None = None
    flops: float | None = None  # a share of the decoder's operations for this prompt

    def __post_init__(self) -> None:
        for limit in fields(self):
            object.__setattr__(self, limit.name, plain_number(getattr(self, limit.name)))

    @property
    def is_off(self) -> bool:
        return self == OnnxRouteBudget()

    def tokens_of(self, available: Array) -> Array:
        """Return how many visual tokens each sequence keeps, of those it has: [B] -> [B]"""
        if self.keep_visual_tokens is None:
            return available
        if isinstance(self.keep_visual_tokens, int):
            return np.minimum(available, self.keep_visual_tokens)
        share = np.round(available.astype(np.float32) * np.float32(self.keep_visual_tokens)).astype(np.int64)
        return np.minimum(np.maximum(share, 1), available)

    def check(self, num_layers: int, free: int) -> None:
        tokens, layers, flops = self.keep_visual_tokens, self.keep_layers, self.flops
        if flops is not None and (tokens is not None or layers is not None):
            raise InputError("give keep_visual_tokens and keep_layers, or flops: each of them is a budget.")
        if flops is not None and not (is_share(flops) or (is_count(flops) and flops == 1)):
            raise InputError(
                f"flops={flops!r} is no share of the decoder's operations: give a number above 0 and up to 1, 0.5 for "
                "half of them."
            )
        if tokens is not None and not ((is_count(tokens) and tokens >= 1) or is_share(tokens)):
            raise InputError(f"keep_visual_tokens={tokens!r} is neither a count from 1 (144) nor a share (0.25).")
        if layers is not None and not (is_count(layers) and num_layers - free <= layers <= num_layers):
            raise InputError(
                f"keep_layers={layers!r} is out of range: of the {num_layers} layers {free} may be skipped, so give a "
                f"number from {num_layers - free} to {num_layers}."
            )


def plain_number(value: Any) -> Any:
    """Return a number of numpy or torch as one of Python, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


@dataclass
class RoutedState(DecodingState):
    """The state of a batch of answers between two tokens, and its route."""

    kept: Array = None  # [B] tokens in the caches behind the router
    runs: Array = None  # [B, N] False: the sequence skips that layer
    new_tokens: int = 0  # entries in the caches for tokens to come
    bindings: dict[str, Any] = field(default_factory=dict)  # by graph
    states: Any = None  # [B, S, D] of the last pass, between the two graphs
    index: Array = None  # [B, K] which tokens of the prompt are there, in front those that stay; None: all


class RoutedOnnxModel(OnnxModel):
    """The runner of a routed folder."""

    def _open_decoder(self) -> None:
        self.router_facts = self.manifest["router"]
        if self.router_facts["drop_at"]:
            self.front = self._open(FRONT)
        else:
            self.front, self.embeddings = None, self._open("embeddings")
        self.router, self.decoder = self._open("router"), self._open("decoder")
        taken = {entry.name: entry.shape for entry in self.router.get_inputs()}
        self.skips_by_sequence = bool(taken["skip_count"])  # folders of before have one number for all sequences
        self.set_budget(self.router_facts["default"])

    # --- budgets ---

    def set_budget(
        self,
        preset: str | None = None,
        *,
        keep_visual_tokens: float | None = None,
        keep_layers: int | None = None,
        flops: float | None = None,
        quality: float | None = None,
    ) -> None:
        """Set the budget of all calls that name none."""
        self.budget = self.budget_for(preset, keep_visual_tokens, keep_layers=keep_layers, flops=flops, quality=quality)

    def budget_for(
        self,
        preset: str | None = None,
        keep_visual_tokens: float | None = None,
        keep_layers: int | None = None,
        flops: float | None = None,
        quality: float | None = None,
    ) -> OnnxRouteBudget:
        """Return what is asked for, checked; where nothing is, the budget that is set. Raises InputError."""
        if quality is not None:
            raise InputError(
                f"quality={quality} can't be asked of graphs, which take numbers of tokens before they score them: "
                "give flops, a preset, or keep_visual_tokens, or run the checkpoint with torch."
            )
        named = any(value is not None for value in (keep_visual_tokens, keep_layers, flops))
        if preset is not None and named:
            raise InputError(
                f"give either preset={preset!r} or keep_visual_tokens and keep_layers, or flops, not both."
            )
        if preset is None and not named:
            return self.budget
        presets = {"off": {}, **self.router_facts["presets"]}
        if preset is not None and preset not in presets:
            raise InputError(f"preset {preset!r} is not known: this model has {', '.join(presets)}.")
        budget = (
            OnnxRouteBudget(**presets[preset])
            if preset is not None
            else OnnxRouteBudget(keep_visual_tokens, keep_layers, flops)
        )
        budget.check(self.manifest["layers"], len(self.router_facts["candidates"]))
        if budget.flops is not None and "budgets" not in self.router_facts:
            raise InputError(
                f"flops={budget.flops} is computed from what was measured after the router's training, and this folder "
                "has no such measurement: route the checkpoint again and export it, or give keep_visual_tokens."
            )
        return OnnxRouteBudget() if budget.flops == 1 else budget

    def amounts(self, lengths: Array, available: Array) -> tuple[Array, Array]:
        """Return how many visual tokens each sequence keeps and how many layers it skips: [B] each."""
        layers, budget = self.manifest["layers"], self.budget
        if budget.flops is None:
            skipped = layers - (budget.keep_layers or layers)
            return budget.tokens_of(available), np.full(len(available), skipped)
        cost, front = PromptCost.of(self.router_facts), self.router_facts["budgets"]["front"]
        sequences = zip(lengths.tolist(), available.tolist(), strict=True)
        mixes = np.array([cost.mix(budget.flops, front, *sequence) for sequence in sequences])
        return mixes[:, 0], layers - mixes[:, 1]

    def generate(
        self,
        seed: int | None = None,
        preset: str | None = None,
        keep_visual_tokens: float | None = None,
        keep_layers: int | None = None,
        flops: float | None = None,
        quality: float | None = None,
        **options: Any,
    ) -> Array:
        before = self.budget
        self.budget = self.budget_for(preset, keep_visual_tokens, keep_layers=keep_layers, flops=flops, quality=quality)
        try:
            return super().generate(seed, **options)
        finally:
            self.budget = before

    # --- the halves of generate ---

    def prompt(self, inputs: dict[str, Any]) -> Prompt:
        prompt = prepare(self.manifest, inputs)
        visual = prompt.input_ids == self.manifest["image_token_id"]
        sequences = [sequence[:length] for sequence, length in zip(visual, prompt.lengths.tolist(), strict=True)]
        return replace(prompt, coordinates=padded(patch_coordinates(self.manifest, sequences, inputs), False, 0))

    def prefill(self, prompt: Prompt, new_tokens: int, features: Any = None) -> tuple[Array, RoutedState]:
        features = self._matching(prompt, features)
        visual = (prompt.input_ids == self.manifest["image_token_id"]) & prompt.real
        available = visual.sum(1)
        counts, skipped = self.amounts(prompt.lengths, available)
        state = self._begin(prompt, prompt.lengths - available + counts, new_tokens)
        router = None
        if visual.any() and (skipped.any() or (counts < available).any()):
            router = {
                "is_visual": visual,
                "places": prompt.coordinates.astype(self.dtype),
                "keep_counts": counts,
                "skip_count": skipped if self.skips_by_sequence else skipped[0],
                "slots": np.arange(int(state.kept.max())),
            }
        return self._through(
            state, prompt.input_ids, features=features, positions=prompt.positions, router=router
        ), state

    def _begin(self, prompt: Prompt, kept: Array, new_tokens: int) -> RoutedState:
        runs = np.ones((len(kept), len(self.router_facts["candidates"])), bool)
        logits = self._logits(len(kept))
        return RoutedState(
            prompt,
            {},
            logits=logits,
            lengths=prompt.lengths,
            real=prompt.real,
            kept=kept,
            runs=runs,
            new_tokens=new_tokens,
        )

    def step(self, state: DecodingState, tokens: Array) -> Array:
        assert isinstance(state, RoutedState)
        added = state.lengths - state.prompt.lengths
        state.lengths, state.kept = state.lengths + 1, state.kept + 1
        positions = (state.prompt.next_position + added)[:, None]  # [B, 1]
        if self.manifest["mrope"]:
            positions = np.tile(positions, (3, 1, 1))
        return self._through(state, tokens[:, None], features=self.no_features, positions=positions, router=None)

    def embedded(self, prompt: Prompt, features: Any) -> Any:
        if self.front is None:
            return super().embedded(prompt, features)
        state = self._begin(prompt, prompt.lengths, 0)
        return self._enter(
            state, prompt.input_ids, features=features, positions=self._value(prompt.positions), output="inputs_embeds"
        )

    def _through(
        self, state: RoutedState, ids: Array, features: Any, positions: Array, router: dict[str, Array] | None
    ) -> Array:
        """Return the layers before the router, the router, the layers behind it: ids [B, S] -> logits [B, V]"""
        position_ids = self._value(positions)
        states = self._enter(state, ids, features, position_ids)
        if router is not None:
            states, position_ids = self._route(state, states, position_ids, router)
        self._run(
            state,
            "decoder",
            feed={"states": states, **self._given(position_ids, state.kept)},
            output="logits",
            buffer=state.logits,
        )
        return state.logits.numpy().copy()  # the next pass writes there

    def _enter(self, state: RoutedState, ids: Array, features: Any, positions: Any, output: str = "next_states") -> Any:
        """Return what the router reads, and the layers behind it: [B, S, D]"""
        import onnxruntime

        if self.front is None:
            return self.embed(ids, features)
        shape = [*ids.shape, self.manifest["hidden_size"]]
        if state.states is None or state.states.shape() != shape:
            state.states = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype, self.device)
        feed = {"input_ids": self._value(ids), "image_features": features, **self._given(positions, state.lengths)}
        self._run(state, FRONT, feed=feed, output=output, buffer=state.states)
        return state.states

    def running(self, state: RoutedState) -> list[int]:
        """Return the layers behind the router that any sequence runs."""
        active = dict(zip(self.router_facts["candidates"], state.runs.any(0).tolist(), strict=True))
        return [layer for layer in self._behind if active.get(layer, True)]

    @property
    def _behind(self) -> range:
        return range(self.router_facts["drop_at"], self.manifest["layers"])

    def _given(self, positions: Any, lengths: Array) -> dict[str, Any]:
        """Return what the layers before the router, or those behind it, are given beside the states."""
        total = self._value(np.array(int(lengths.max()), np.int32), "cpu")
        return {"position_ids": positions, "row_lengths": self._value(lengths), "total_length": total}

    def _route(self, state: RoutedState, states: Any, positions: Any, router: dict[str, Array]) -> tuple[Any, Any]:
        feed = {"states": states, "position_ids": positions, "row_lengths": self._value(state.lengths)}
        devices = {"kept_states": self.device, "kept_position_ids": self.device, "kept_index": "cpu", "runs": "cpu"}
        outputs = self._bound(self.router, feed | {name: self._value(array) for name, array in router.items()}, devices)
        state.index, state.runs = outputs[2].numpy(), outputs[3].numpy()
        return outputs[0], outputs[1]

    def _allocate(self, layers: Iterable[int], state: RoutedState, lengths: Array) -> None:
        """Allocate caches of layers that run: none for those that all sequences skip."""
        longest = int(lengths.max()) + state.new_tokens
        shape = (len(lengths), self.manifest["heads"], longest, self.manifest["head_size"])
        for layer in layers:
            state.cache |= {f"{layer}.{kind}": self._empty(shape, self.dtype) for kind in ("key", "value")}

    def _run(self, state: RoutedState, name: str, feed: dict[str, Any], output: str, buffer: Any) -> None:
        """Run one of the decoder's two graphs, an output of it into a buffer."""
        graph = self.front if name == FRONT else self.decoder
        if name not in state.bindings:  # caches and routes stay what they are for the whole answer
            state.bindings[name] = graph.io_binding()
            self._bind_layers(state.bindings[name], state, graph is self.decoder)
        binding = state.bindings[name]
        binding.bind_ortvalue_output(output, buffer)
        for entry, value in feed.items():
            binding.bind_ortvalue_input(entry, value)
        graph.run_with_iobinding(binding)

    def _bind_layers(self, binding: Any, state: RoutedState, behind: bool) -> None:
        """Bind keys and values, written where they are read, and which sequences run what."""
        if behind:
            self._allocate(self.running(state), state, state.kept)
        else:
            self._allocate(range(self.router_facts["drop_at"]), state, state.lengths)
        nothing = self._empty((len(state.runs), self.manifest["heads"], 0, self.manifest["head_size"]), self.dtype)
        for layer in self._behind if behind else range(self.router_facts["drop_at"]):
            for kind in ("key", "value"):
                buffer = state.cache.get(f"{layer}.{kind}", nothing)
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", buffer)
                binding.bind_ortvalue_output(f"present.{layer}.{kind}", buffer)
        for layer, runs in zip(self.router_facts["candidates"], state.runs.T, strict=True) if behind else ():
            binding.bind_ortvalue_input(f"runs.{layer}", self._value(runs))
            binding.bind_ortvalue_input(f"active.{layer}", self._value(np.array(runs.any()), "cpu"))
