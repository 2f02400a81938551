"""ONNX: a checkpoint as graphs that ONNX Runtime runs without torch.

    exporter.onnx.export("small", "small-onnx")
    model = exporter.onnx.load("small-onnx")
    tokens = model.generate(**processor(images=image, text=text, return_tensors="np"), max_new_tokens=64)

Files, in the order of an export: `support` (which types, and how: by `rows`, or as `found` in a small model, which
`trial` exports and runs), `tracing` and `graphs/` (modules that trace, module to file, quantized weights), `layouts/`
(folders that other runtimes open), `validation` (against torch, in a clean process), `pipeline` (the whole story),
`runtime/` (the runner, which needs onnxruntime and numpy only).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["ExportOptions", "export", "load"]

if TYPE_CHECKING:
    from .pipeline import ExportOptions, export
    from .runtime import load

_HOMES = {"ExportOptions": "pipeline", "export": "pipeline", "load": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'exporter.onnx' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
