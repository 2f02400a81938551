"""A folder in the layout of transformers.js, run as that client runs it: what it is compared with torch by.

Shapes: B sequences, S tokens, F visual features, D hidden size (one more where features are marked), V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .model import DecodingState, OnnxModel, open_session
from .prepare import Array, Feed, Prompt

LAYOUT = "transformers.js"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
FILES = {"vision": "vision_encoder", "embeddings": "embed_tokens", "decoder": "decoder_model_merged"}


def graph_files(folder: Path, precision: str) -> list[Path]:
    """Return the three graphs of one precision."""
    return [folder / "onnx" / f"{name}{SUFFIXES[precision]}.onnx" for name in FILES.values()]


class ClientModel(OnnxModel):
    """Embeds the prompt, writes features over its placeholders, and grows the decoder's cache."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], device: str, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        self.paths = self.graphs(folder, precision)
        super().__init__(folder, manifest, device, threads)
        half = any(value.type == "tensor(float16)" for value in self.decoder.get_inputs())
        self.dtype = np.float16 if half else np.float32  # of the cache; everything else is float32
        width = next(value.shape[-1] for value in self.decoder.get_inputs() if value.name == "inputs_embeds")
        self.no_features = self._value(np.zeros((0, width), np.float32))

    def graphs(self, folder: Path, precision: str) -> dict[str, Path]:
        """Return the files of a precision, by the part of the model that each is."""
        return dict(zip(FILES, graph_files(folder, precision), strict=True))

    def _open(self, name: str) -> Any:
        return open_session(self.paths[name], self.device, self.threads)

    def image_features(self, prompt: Prompt) -> Any:
        """Return features of all images, [F, D]."""
        if not prompt.images:
            return self.no_features
        runs = [self.vision.run(["image_features"], self._fed(feed))[0] for feed in prompt.images]
        return self._value(np.concatenate([run.reshape(-1, run.shape[-1]) for run in runs]))

    def _fed(self, feed: Feed) -> Feed:
        """Return one run's inputs as the client's processor has them."""
        pixels = feed["pixel_values"].astype(np.float32)
        if "patch_positions" in feed:
            rows, columns = feed["patch_positions"].max(0) + 1
            grid = next(value.name for value in self.vision.get_inputs() if value.name.endswith("grid_thw"))
            return {"pixel_values": pixels, grid: np.array([[1, rows, columns]], np.int64)}
        if self.manifest["vision"]["kind"] == "grids":
            grid = np.array([[1, *pixels.shape[:2]]], np.int64)
            return {"pixel_values": pixels.reshape(-1, *pixels.shape[2:]), "image_grid_thw": grid}
        return {"pixel_values": pixels[None] if self.manifest["vision"]["kind"] == "real_tiles" else pixels}

    def embed(self, ids: Array, features: Any) -> Any:
        """Turn token ids [B, S] into what enters the decoder, [B, S, D]."""
        embeds = self.embeddings.run(["inputs_embeds"], {"input_ids": ids.astype(np.int64)})[0]
        if features.shape()[0]:
            embeds[ids == self.manifest["image_token_id"]] = features.numpy()
        return self._value(embeds)

    def _decode(self, state: DecodingState, embeds: Any, positions: Array, block_ids: Array) -> Array:
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": self._value(state.real.astype(np.int64)),
            "position_ids": self._value(positions.astype(np.int64)),
            **{f"past_key_values.{name}": value for name, value in state.cache.items()},
        }
        names = ["logits", *(f"present.{name}" for name in self.cache_names)]
        logits, *present = self.decoder.run_with_ort_values(names, feed)
        state.cache = dict(zip(self.cache_names, present, strict=True))
        last: Array = logits.numpy()[:, -1]
        return last

    def _logits(self, num_sequences: int) -> Any:
        return None  # each pass returns its own
