"""Check a folder in a process that cannot import this package, and hold the steps that both processes share.

`python -P exporter/clean_room verify FOLDER DEVICE` and `… compare-onnx JOB.json` print their findings as JSON. They
show that a checkpoint needs nothing of ours. The files here therefore import the standard library, torch, transformers
and PIL only (onnx and onnxruntime to compare an ONNX folder), and `__main__.py` blocks any import of `exporter`.

Files: `processing` turns images and questions into model inputs, `video` the frames of videos; `reference` asks the
reference question; `verify_checkpoint` and `compare_onnx` (with `onnx_components`) are the two checks; `process` keeps
`exporter` out.
"""

from .processing import PromptError, encode, extend, load_processor, render
from .reference import (
    GENERATION_TOKENS,
    REFERENCE_QUESTION,
    REFERENCE_TOKENS,
    generate,
    greedy,
    greedy_answers,
    reference_answer,
    reference_inputs,
    reference_margins,
)
from .video import Clip, VideoError

__all__ = [
    "GENERATION_TOKENS",
    "REFERENCE_QUESTION",
    "REFERENCE_TOKENS",
    "Clip",
    "PromptError",
    "VideoError",
    "encode",
    "extend",
    "generate",
    "greedy",
    "greedy_answers",
    "load_processor",
    "reference_answer",
    "reference_inputs",
    "reference_margins",
    "render",
]
