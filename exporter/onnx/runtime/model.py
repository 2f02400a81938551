"""The graphs of a folder, run by ONNX Runtime: vision, embeddings, decoder; keys and values stay on the device.

Shapes: B sequences, S tokens, P entries of the cache, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .prepare import Array, InputError, Prompt, prepare
from .sampling import Sampling

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(path: Path, device: str, threads: int | None = None) -> Any:
    """Return a session on that device, or InputError: ONNX Runtime itself falls back to the CPU with a log line."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A graph's threads wait for more work in a busy loop, also after its last run: the next graph's would have to share
    # the cores with them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads:
        options.intra_op_num_threads = threads
    providers = [PROVIDERS[device]]
    if device == "cuda":
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip has installed
        providers.append(PROVIDERS["cpu"])  # for the arithmetic of shapes
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    if PROVIDERS[device] not in session.get_providers():
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} could not start its {PROVIDERS[device]}: the CUDA and cuDNN "
            "libraries of its version are needed (pip install onnxruntime-gpu[cuda,cudnn])."
        )
    return session


@dataclass
class DecodingState:
    """The state of a batch of answers between two tokens."""

    prompt: Prompt
    cache: dict[str, Any]  # key and value of each layer on the device
    logits: Any  # [B, V] on the host, where every pass writes
    lengths: Array  # [B] tokens in the cache, padding not counted
    real: Array  # [B, columns of a growing cache] False: padding
    binding: Any = None  # of a shared cache, whose buffers stay where they are


class OnnxModel:
    """`generate` answers; `prefill` and `step` are its two halves, for those who pick tokens themselves."""

    def __init__(self, folder: Path, manifest: dict[str, Any], device: str, threads: int | None = None) -> None:
        self.folder, self.manifest, self.device, self.threads = folder, manifest, device, threads
        self.vision = self._open("vision")
        self._open_decoder()
        path = folder / "generation_config.json"
        self.defaults: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        layers = range(manifest["layers"])
        self.cache_names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        self.dtype = np.float16 if manifest["dtype"] == "float16" else np.float32
        self.no_features = self._value(np.zeros((0, manifest.get("feature_size", manifest["hidden_size"])), self.dtype))

    def _open(self, name: str) -> Any:
        return open_session(self.folder / f"{name}.onnx", self.device, self.threads)

    def _open_decoder(self) -> None:
        self.embeddings, self.decoder = self._open("embeddings"), self._open("decoder")

    # --- answers ---

    def generate(self, seed: int | None = None, **options: Any) -> Array:
        """Answer what a processor has prepared: tokens [B, S + new], the prompt's included, as transformers does.

        Args:
            seed: of sampling.
            options: the processor's output, and settings of `Sampling` (max_new_tokens, do_sample, temperature,
                top_k, top_p, repetition_penalty); those of generation_config.json are the defaults.
        """
        settings, inputs = self._split(options)
        random = np.random.default_rng(seed)
        prompt = self.prompt(inputs)
        logits, state = self.prefill(prompt, settings.max_new_tokens)
        tokens = np.asarray(inputs["input_ids"]).astype(np.int64)  # [B, S], as it was given
        running = np.ones(len(tokens), bool)
        for count in range(1, settings.max_new_tokens + 1):
            picked = np.where(running, settings.pick(logits, tokens, random), settings.pad_token_id)
            tokens = np.concatenate([tokens, picked[:, None]], 1)
            running &= ~np.isin(picked, settings.eos_token_id)
            if count == settings.max_new_tokens or not running.any():
                break
            logits = self.step(state, picked)
        return tokens

    def _split(self, options: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        graph_inputs = {k: v for k, v in options.items() if hasattr(v, "shape")}
        chosen = {k: v for k, v in options.items() if k not in graph_inputs}
        if "input_ids" not in graph_inputs:
            raise InputError("generate needs input_ids: give it a processor's output, generate(**inputs).")
        return Sampling.of(self.defaults, chosen, self.manifest["pad_token_id"]), graph_inputs

    def prompt(self, inputs: dict[str, Any]) -> Prompt:
        """Return a processor's output, laid out for the graphs."""
        return prepare(self.manifest, inputs)

    # --- its halves ---

    def prefill(self, prompt: Prompt, new_tokens: int, features: Any = None) -> tuple[Array, DecodingState]:
        """Run the prompt: logits of each sequence's next token [B, V], and the state that `step` goes on from.

        Args:
            new_tokens: steps that there is to be room for in the cache.
            features: what `image_features` made of the prompt, where that is there already.
        """
        embeds = self.embed(prompt.input_ids, self._matching(prompt, features))
        num_sequences, length = prompt.input_ids.shape
        state = DecodingState(
            prompt=prompt, cache={}, logits=self._logits(num_sequences), lengths=prompt.lengths, real=prompt.real
        )
        shape = (num_sequences, self.manifest["heads"], length + new_tokens, self.manifest["head_size"])
        if self.manifest["cache"] == "growing":
            shape = (*shape[:2], 0, shape[3])
        state.cache = {name: self._empty(shape, self.dtype) for name in self.cache_names}
        return self._decode(state, embeds, prompt.positions, prompt.block_ids), state

    def embedded(self, prompt: Prompt, features: Any) -> Any:
        """Return the prompt as it enters the decoder, features in their places: [B, S, D], on the device."""
        return self.embed(prompt.input_ids, features)

    def _matching(self, prompt: Prompt, features: Any) -> Any:
        """Return the features of the prompt's images, made if they are not there: one for each of its image tokens."""
        features = self.image_features(prompt) if features is None else features
        expected = int((prompt.input_ids == self.manifest["image_token_id"]).sum())
        if features.shape()[0] != expected:
            raise InputError(
                f"the prompt has {expected} image tokens, its images make {features.shape()[0]} features: was it "
                "truncated, or are images missing?"
            )
        return features

    def step(self, state: DecodingState, tokens: Array) -> Array:
        """Go on by one token a sequence: tokens [B] -> logits [B, V]"""
        added = state.lengths - state.prompt.lengths
        state.lengths = state.lengths + 1
        positions = (state.prompt.next_position + added)[:, None]  # [B, 1]
        if self.manifest["mrope"]:
            positions = np.tile(positions, (3, 1, 1))
        state.real = np.concatenate([state.real, np.ones((len(tokens), 1), bool)], 1)
        embeds = self.embed(tokens[:, None], self.no_features)
        return self._decode(state, embeds, positions, np.full((len(tokens), 1), -1))

    def image_features(self, prompt: Prompt) -> Any:
        """Return features of all images [F, D], on the device."""
        devices = {"image_features": self.device}
        features = [self._bound(self.vision, self._values(feed), devices)[0] for feed in prompt.images]
        if not features:
            return self.no_features
        return features[0] if len(features) == 1 else self._value(np.concatenate([part.numpy() for part in features]))

    def embed(self, ids: Array, features: Any) -> Any:
        """Turn token ids [B, S] into what enters the decoder [B, S, D], on the device."""
        feed = {"input_ids": self._value(ids), "image_features": features}
        return self._bound(self.embeddings, feed, {"inputs_embeds": self.device})[0]

    def _decode(self, state: DecodingState, embeds: Any, positions: Array, block_ids: Array) -> Array:
        feed = {"inputs_embeds": embeds, "position_ids": self._value(positions)}
        shared = self.manifest["cache"] == "shared"
        if shared:
            feed["row_lengths"] = self._value(state.lengths)
            feed["total_length"] = self._value(np.array(int(state.lengths.max()), np.int32), "cpu")
        else:
            feed["attention_mask"] = self._value(state.real.astype(np.int64))
            feed["block_ids"] = self._value(block_ids)
        binding = state.binding or self._binding(state, shared)
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        self.decoder.run_with_iobinding(binding)
        if shared:
            state.binding = binding
        else:
            state.cache = dict(zip(self.cache_names, binding.get_outputs()[1:], strict=True))
        return state.logits.numpy().copy()  # the next pass writes there

    def _binding(self, state: DecodingState, shared: bool) -> Any:
        binding = self.decoder.io_binding()
        binding.bind_ortvalue_output("logits", state.logits)
        for name, value in state.cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if shared:  # one buffer for both: the operator writes where it reads
                binding.bind_ortvalue_output(f"present.{name}", value)
            else:
                binding.bind_output(f"present.{name}", self.device)
        return binding

    # --- tensors on the device ---

    def _bound(self, session: Any, feed: dict[str, Any], devices: dict[str, str]) -> list[Any]:
        """Run a graph: its outputs, each on its device. (Without a binding all come to the host.)"""
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name, device in devices.items():
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        return outputs

    def _value(self, array: Array, device: str | None = None) -> Any:
        import onnxruntime

        device = device or self.device
        if not array.size:  # nothing that could be copied
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device)
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)

    def _values(self, feed: dict[str, Array]) -> dict[str, Any]:
        floats = {name: array.astype(self.dtype) if array.dtype.kind == "f" else array for name, array in feed.items()}
        return {name: self._value(array) for name, array in floats.items()}

    def _logits(self, num_sequences: int) -> Any:
        vocabulary = next(output.shape[1] for output in self.decoder.get_outputs() if output.name == "logits")
        return self._value(np.zeros((num_sequences, vocabulary), np.float32), "cpu")

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        import onnxruntime

        if self.manifest["cache"] == "shared":  # what lies behind a sequence's tokens must be finite
            return self._value(np.zeros(shape, dtype))
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device)
