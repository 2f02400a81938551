"""A folder in the layout of onnxruntime-genai, run as that library runs it: what it is compared with torch by.

The library runs the vision graph picture by picture, has the embeddings graph write features over placeholders, and
hands embeddings, attention mask and positions to a decoder whose cache grows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .client import ClientModel
from .model import OnnxModel
from .prepare import Array

LAYOUT = "genai"


class GenaiModel(ClientModel):
    """The graphs of a folder for onnxruntime-genai, which holds them in one precision."""

    def graphs(self, folder: Path, precision: str) -> dict[str, Path]:
        return {name: folder / f"{name}.onnx" for name in ("vision", "embeddings", "decoder")}

    def embed(self, ids: Array, features: Any) -> Any:
        """Turn token ids [B, S] and features into what enters the decoder, [B, S, D]."""
        return OnnxModel.embed(self, ids, features)
