"""The graphs of a plain checkpoint: vision, embeddings, decoder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from .graphs.decoder import Embeddings, GrowingDecoder, SharedDecoder, group_query_attention
from .graphs.encoded import own_vision
from .graphs.graph import trace
from .graphs.vision import vision_module
from .rows import SHARED, Support


def write_vision(model: Any, support: Support, folder: Path, *, device: str, opset: int) -> None:
    """Write the vision graph, over the parts of a known family or the encoder of any other type."""
    has_row = support.pictures is None
    module = vision_module(model, support.kind) if has_row else own_vision(model, support)
    trace(module, folder / "vision.onnx", device, opset)


def write_plain_graphs(model: Any, support: Support, folder: Path, *, cache: str, device: str, opset: int) -> None:
    """Write all graphs of a model without a router."""
    write_vision(model, support, folder, device=device, opset=opset)
    trace(Embeddings(model, len(support.adds_after)).eval(), folder / "embeddings.onnx", device, opset)
    decoder = (SharedDecoder if cache == SHARED else GrowingDecoder)(model, support).eval()
    with group_query_attention(decoder) if cache == SHARED else contextlib.nullcontext():
        trace(decoder, folder / "decoder.onnx", device, opset)
