"""Compare an exported ONNX folder with torch, component by component.

The job says which folder, from which source, in which precision (`exporter/onnx/pipeline.py` writes it). The runner
(`exporter/onnx/runtime/`) and the modeling files are loaded by their paths, since `exporter` cannot be imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .onnx_components import (
    NEW_TOKENS,
    Difference,
    compare_answers,
    compare_decoder,
    compare_parts,
    compare_routes,
)
from .onnx_served import ServedReference
from .process import load_package
from .processing import encode, load_processor
from .reference import generate, reference_inputs

PACKAGE = Path(__file__).parent.parent
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}  # of a difference, relative to the largest magnitude, or to 1
# A quantised weight is off by up to half a step of its block; what that does to logits, on average.
MEAN_TOLERANCE = {"int8": 0.05, "int4": 0.25}
# ONNX Runtime keeps one operator of its own in ONNX's domain, where the checker does not know it.
RUNTIME_OPERATORS = {"SimplifiedLayerNormalization"}
SIZES = ((96, 96), (160, 80), (70, 150), (120, 64))
QUESTIONS = (
    "Describe this image.",
    "What is the color of the small shape on the left, and how many of them are there in the picture?",
    "How many?",
    "Where is the square?",
)


# --- graphs -----------------------------------------------------------------------------------------------------------


def check_graph(path: Path, opset: int) -> list[str]:
    """Return problems that the file itself has: opset, and what onnx's checker finds."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    versions = {entry.domain: entry.version for entry in graph.opset_import}
    problems = [] if versions.get("") == opset else [f"opset {versions.get('')} instead of {opset}"]
    for node in _nodes(graph.graph):
        if node.op_type in RUNTIME_OPERATORS:
            node.domain = "com.microsoft"
    if "com.microsoft" not in versions:
        graph.opset_import.add(domain="com.microsoft", version=1)
    try:
        with contextlib.chdir(path.parent):  # where the checker looks for FILE.data
            onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        problems.append(f"onnx's checker says: {str(error).splitlines()[0]}")
    return problems


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


# --- questions --------------------------------------------------------------------------------------------------------


def questions(processor: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield batches that an export did not see: one question, several of different sizes, two images."""
    yield "one question", reference_inputs(processor)
    rows = [(SIZES[i : i + 1], QUESTIONS[i]) for i in range(3)]
    yield "a batch of 3", encoded(processor, rows)
    if getattr(processor, "chat_template", None):
        yield (
            "a batch of 2 with 3 images",
            encoded(processor, [(SIZES[:2], QUESTIONS[1]), (SIZES[3:], QUESTIONS[3])]),
        )


def encoded(processor: Any, rows: list[tuple[Any, str]]) -> dict[str, Any]:
    chats, images = [], []
    for sizes, question in rows:
        parts = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": question}]
        chats.append([{"role": "user", "content": parts}])
        images.append([drawn(size) for size in sizes])
    return encode(processor, chats, images)


def drawn(size: tuple[int, int]) -> Any:
    from PIL import Image, ImageDraw

    width, height = size
    image = Image.new("RGB", size, (40 + width % 50, 60, 30 + height % 70))
    pen = ImageDraw.Draw(image)
    pen.ellipse((width * 0.1, height * 0.2, width * 0.4, height * 0.7), fill=(220, 60, 50))
    pen.rectangle((width * 0.55, height * 0.3, width * 0.9, height * 0.9), fill=(70, 200, 90))
    return image


# --- components -------------------------------------------------------------------------------------------------------


# --- the whole --------------------------------------------------------------------------------------------------------


def load_torch(job: dict[str, Any]) -> tuple[Any, Any]:
    """Return the source in the precision of the export, computing in float32; and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    auto: Any = AutoModelForImageTextToText
    manifest = json.loads((Path(job["folder"]) / "onnx.json").read_text())
    served = "keep_visual_tokens" in job
    if "router" in manifest or served:
        load_package("modeling", PACKAGE / "modeling")  # this package's files, not the source's copy
        modeling: Any = importlib.import_module(f"modeling.modeling_{'served' if served else 'routed'}")
        model_type = json.loads((Path(job["source"]) / "config.json").read_text())["model_type"]
        auto = getattr(modeling, (modeling.served_name if served else modeling.class_name)(model_type))
    model = auto.from_pretrained(job["source"], dtype=getattr(torch, job["dtype"]), trust_remote_code=False)
    model = model.float().eval().requires_grad_(False)
    if served:
        model.set_budget(keep_visual_tokens=job["keep_visual_tokens"])
        model = ServedReference(model, manifest["serving"]["rows"], manifest["serving"]["stays"])
    return model, load_processor(job["folder"])


@dataclass
class Findings:
    """The results of a comparison."""

    outputs: dict[str, Difference] = field(default_factory=lambda: defaultdict(Difference))
    problems: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by budget
    equal_tokens: int = 0  # of them all, the runner's best is torch's best
    left_out: int = 0  # answers that were not compared, since the router was undecided between two routes


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Return {"problems": [...], "outputs": {name: {max, mean, scale}}, and the counts of `Findings`}."""
    runtime = load_package("runtime", PACKAGE / "onnx" / "runtime")
    folder = Path(job["folder"])
    chosen = {"precision": job["precision"]} if "precision" in job else {}  # in the layout of transformers.js
    graphs = runtime.graph_files(folder, **chosen) if chosen else sorted(folder.glob("*.onnx"))
    if problems := [f"{path.stem}: {problem}" for path in graphs for problem in check_graph(path, job["opset"])]:
        return {"problems": problems}
    model, processor = load_torch(job)
    try:
        runner = runtime.load(folder, job["device"], **chosen)
    except Exception as error:
        return {"problems": [f"ONNX Runtime can't open it: {_first_line(error)}"]}
    findings = Findings()
    own_batches = given_questions(job["inputs"])
    if isinstance(model, ServedReference):  # they come from the checkpoint's own processor
        own_batches = [(what, model.shorter(inputs)) for what, inputs in own_batches]
    for what, inputs in [*questions(processor), *own_batches]:
        batch = (what, with_tiles(inputs, runner.manifest["vision"]))
        compare_batch(model, runner, batch=batch, job=job, findings=findings)
    problems = out_of_tolerance(findings.outputs, job["dtype"], job["quantize"]) + findings.problems
    for part, tokens in findings.tokens.items():
        if not tokens:
            problems.append(f"{part}: the router is undecided in every question, so that nothing was compared")
    outputs = {name: difference.to_data() for name, difference in findings.outputs.items()}
    counts = {
        "tokens": sum(findings.tokens.values()),
        "equal_tokens": findings.equal_tokens,
        "left_out": findings.left_out,
    }
    return {"problems": problems, "outputs": outputs, **counts}


def given_questions(path: str | None) -> list[tuple[str, dict[str, Any]]]:
    import torch

    batches = torch.load(path) if path else []
    return [(f"calibration batch {number}", inputs) for number, inputs in enumerate(batches, 1)]


def with_tiles(inputs: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """Return what the checkpoint's own processor makes of square pictures, where the folder's makes no tiles."""
    import torch

    if vision["kind"] != "square" or inputs["pixel_values"].ndim == 5:
        return inputs
    pixels, side = inputs["pixel_values"], vision["tile"]
    return {
        **inputs,
        "pixel_values": torch.stack([pixels, pixels], 1),
        "image_sizes": torch.full((len(pixels), 2), side),
    }


def compare_batch(
    model: Any,
    runner: Any,
    batch: tuple[str, dict[str, Any]],
    job: dict[str, Any],
    findings: Findings,
) -> None:
    """Compare one batch through all components. What breaks is a finding too, and says where."""
    import numpy as np

    what, inputs = batch
    part, tolerance = "inputs", TOLERANCE[job["dtype"]]
    try:
        prompt = runner.prompt({name: tensor.numpy() for name, tensor in inputs.items()})
        part = "vision and embeddings"
        compare_parts(model, runner, inputs=inputs, prompt=prompt, differences=findings.outputs)
        for preset in presets(runner):
            part = "decoder" if preset is None else f"decoder ({preset})"
            if preset is not None:
                model.set_budget(preset)
                runner.set_budget(preset)
            compared = np.ones(len(inputs["input_ids"]), bool)
            if preset is not None and not job["quantize"]:
                wrong, compared = compare_routes(model, runner, inputs=inputs, prompt=prompt, tolerance=tolerance)
                findings.problems += [f"router, {what}: {problem}" for problem in wrong]
            generated = generate(model, inputs, NEW_TOKENS)
            findings.equal_tokens += compare_decoder(
                runner, inputs, prompt=prompt, generated=generated, compared=compared, differences=findings.outputs
            )
            findings.tokens[part] += NEW_TOKENS * int(compared.sum())
            findings.left_out += int((~compared).sum())
            if not job["quantize"]:
                answers = compare_answers(model, runner, inputs=inputs, compared=compared, tolerance=tolerance)
                findings.problems += [f"generate, {what}: {problem}" for problem in answers]
    except Exception as error:
        findings.problems.append(f"{part}: fails for {what}: {type(error).__name__}: {_first_line(error)}")


def presets(runner: Any) -> list[str | None]:
    """Return the budgets to compare under: all that a router has names for; None where there is no router."""
    return ["off", *runner.manifest["router"]["presets"]] if "router" in runner.manifest else [None]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def out_of_tolerance(differences: dict[str, Difference], dtype: str, quantized: str | None) -> list[str]:
    problems = []
    for name, difference in differences.items():
        if quantized:
            if "logits" in name and not difference.mean <= MEAN_TOLERANCE[quantized] * difference.scale:
                limit = MEAN_TOLERANCE[quantized] * difference.scale
                problems.append(f"{name} differ from torch by {difference.mean:.1e} on average (at most {limit:.1e})")
        elif not difference.largest <= TOLERANCE[dtype] * difference.scale:
            limit = TOLERANCE[dtype] * difference.scale
            problems.append(
                f"{name} differs from torch by {difference.largest:.1e}, on average {difference.mean:.1e} "
                f"(at most {limit:.1e})"
            )
            if dtype == "float16" and difference.largest == float("inf"):
                problems[-1] += ": its values don't fit into float16, export with --dtype float32, or without fp16"
    return problems
