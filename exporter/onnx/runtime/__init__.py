"""Runs a folder that `lvlm-exporter onnx` wrote. Needs onnxruntime and numpy: no torch, no other part of this package.

    model = load(DIR)
    processor = AutoProcessor.from_pretrained(DIR, padding_side="left")
    tokens = model.generate(**processor(images=image, text=text, return_tensors="np"), max_new_tokens=64)

Files: `prepare` turns what a processor gives into what the graphs take; `model` runs them; `client` runs the layout of
transformers.js and `genai` that of onnxruntime-genai; `sampling` picks tokens.
"""

from .client import graph_files
from .load import load
from .model import OnnxModel
from .prepare import InputError, prepare

__all__ = ["InputError", "OnnxModel", "graph_files", "load", "prepare"]
