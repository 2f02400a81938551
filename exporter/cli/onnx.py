"""The subcommand `onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import DATA, MODEL, json_argument, positive_count, token_count, trust_argument
from .from_flags import progress_bar, write_json

SUMMARY = "write a checkpoint as ONNX graphs, validated against torch"
EXAMPLE = f"onnx {MODEL} --out digits-onnx --calibration {DATA}/calibration.jsonl"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("folder", metavar="DIR", help="checkpoint: folder or hub id")
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR2", help="folder to make")
    subcommand.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="device that the graphs are optimized for (cpu)"
    )
    subcommand.add_argument(
        "--dtype", default="auto", help="float32, float16 (auto: float32 for the CPU, float16 for CUDA)"
    )
    subcommand.add_argument(
        "--layout",
        metavar="NAME",
        help="write the folder that a client opens: transformers.js, for browsers and Node, or genai, for "
        "onnxruntime-genai (that of our own runner)",
    )
    subcommand.add_argument(
        "--quantize",
        metavar="int8",
        help="store the decoder's weights as integers: int8 or int4; for transformers.js, precisions to write beside "
        "fp32: fp16, q8, q4, q4f16, with commas between them, or all; for genai, one of them in its place",
    )
    subcommand.add_argument(
        "--preset", metavar="NAME", help="budget of the checkpoint's serving router that the graphs have, with --layout"
    )
    subcommand.add_argument(
        "--keep-visual-tokens", type=token_count, metavar="T", help="the same as a count or a share: 144 or 0.25"
    )
    subcommand.add_argument("--opset", type=positive_count, metavar="N", help="version of ONNX's operator set (20)")
    subcommand.add_argument(
        "--calibration", metavar="FILE", help="more questions on which the graphs are compared with torch"
    )
    subcommand.add_argument(
        "--samples", type=positive_count, default=8, metavar="N", help="how many of these questions (8)"
    )
    trust_argument(subcommand)
    json_argument(subcommand)


def run(options: argparse.Namespace) -> None:
    from ..onnx import ExportOptions, export
    from ..onnx.manifest import read_manifest
    from ..onnx.report import differences_table, serving_sentence

    progress_bar(options)
    names = (
        *("device", "dtype", "layout", "quantize", "opset", "preset", "keep_visual_tokens"),
        *("calibration", "samples", "trust_remote_code"),
    )
    folder = export(options.folder, options.out, ExportOptions(**{name: getattr(options, name) for name in names}))
    manifest = read_manifest(folder)
    write_json(options, {"path": str(folder), **manifest.data})
    print(differences_table(manifest))
    if manifest.serving is not None:
        print(serving_sentence(manifest.serving))
    print(f"validated in a clean process. ONNX folder: {folder}")
