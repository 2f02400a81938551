"""Validation of an exported folder against torch, component by component, in a process that can't import this package.

Run as a script by validation.py: `python -P comparison.py JOB.json`. It imports the standard library, torch,
transformers, onnx, onnxruntime and PIL, the runner (`runtime/`) and the steps of `clean_room.py` by their paths, and
blocks any import of `exporter`.

Shapes: B rows, S tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEW_TOKENS = 8
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


@dataclass
class Difference:
    """How far an output of a graph is from torch's, over all that was compared."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    scale: float = 1.0  # largest magnitude met, at least 1

    def add(self, found: Any, expected: Any) -> None:
        import numpy as np

        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        if found.shape != expected.shape:
            raise ValueError(f"shape {found.shape} instead of {expected.shape}")
        if not found.size:
            return
        off = np.abs(found - expected)
        self.largest = max(self.largest, float("inf") if np.isnan(off).any() else float(off.max()))
        self.total, self.count = self.total + float(off.sum()), self.count + off.size
        self.scale = max(self.scale, float(np.abs(expected).max()))

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def to_data(self) -> dict[str, float]:
        return {"max": self.largest, "mean": self.mean, "scale": self.scale}


# --- graphs -----------------------------------------------------------------------------------------------------------


def check_graph(path: Path, opset: int) -> list[str]:
    """Problems that the file itself has: opset, and what onnx's checker finds."""
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


def questions(clean_room: Any, processor: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Batches that an export did not see: one question, several of different lengths and image sizes, two images."""
    yield "one question", clean_room.reference_inputs(processor)
    rows = [(SIZES[i : i + 1], QUESTIONS[i]) for i in range(3)]
    yield "a batch of 3", encoded(clean_room, processor, rows)
    if getattr(processor, "chat_template", None):
        yield (
            "a batch of 2 with 3 images",
            encoded(clean_room, processor, [(SIZES[:2], QUESTIONS[1]), (SIZES[3:], QUESTIONS[3])]),
        )


def encoded(clean_room: Any, processor: Any, rows: list[tuple[Any, str]]) -> dict[str, Any]:
    chats, images = [], []
    for sizes, question in rows:
        parts = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": question}]
        chats.append([{"role": "user", "content": parts}])
        images.append([drawn(size) for size in sizes])
    return clean_room.encode(processor, chats, images)


def drawn(size: tuple[int, int]) -> Any:
    from PIL import Image, ImageDraw

    width, height = size
    image = Image.new("RGB", size, (40 + width % 50, 60, 30 + height % 70))
    pen = ImageDraw.Draw(image)
    pen.ellipse((width * 0.1, height * 0.2, width * 0.4, height * 0.7), fill=(220, 60, 50))
    pen.rectangle((width * 0.55, height * 0.3, width * 0.9, height * 0.9), fill=(70, 200, 90))
    return image


# --- components -------------------------------------------------------------------------------------------------------


def torch_features(model: Any, inputs: dict[str, Any]) -> Any:
    """Features of all images in the prompt's order: [F, D]"""
    import torch

    accepted = inspect.signature(model.model.get_image_features).parameters
    wanted = ("pixel_values", "image_sizes", "pixel_attention_mask", "image_grid_thw", "batch_num_images")
    given = {name: inputs[name] for name in wanted if name in inputs and name in accepted}
    features = model.model.get_image_features(**given).pooler_output
    if isinstance(features, torch.Tensor):
        features = [features]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def compare_parts(model: Any, runner: Any, inputs: dict[str, Any], prompt: Any, found: dict[str, Difference]) -> None:
    """Vision and embeddings."""
    features = torch_features(model, inputs)
    runner_features = runner.image_features(prompt)
    found["vision: image_features"].add(runner_features.numpy(), features)
    ids = inputs["input_ids"]
    visual = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(visual, 0))
    embeds = embeds.masked_scatter(visual[..., None], features)
    runner_embeds = runner.embedded(prompt, runner_features).numpy()
    found["embeddings: inputs_embeds"].add(runner_embeds[prompt.real], embeds[inputs["attention_mask"].bool()])


def compare_decoder(
    runner: Any, inputs: dict[str, Any], prompt: Any, made: Any, rows: Any, found: dict[str, Difference]
) -> int:
    """Logits of the prompt and of each step along torch's own answer, and the cache at its end; equal best tokens.

    Args:
        rows: [B] True: those that are compared.
    """
    length = inputs["input_ids"].shape[1]
    answer = made.sequences[:, length:].numpy()  # [B, N]
    logits, state = runner.prefill(prompt, NEW_TOKENS)
    equal = 0
    for step in range(NEW_TOKENS):
        expected = made.logits[step].float().numpy()[rows]  # [b, V]
        chosen = logits[rows]
        name = "decoder (prompt): logits" if step == 0 else "decoder (step): logits"
        found[name].add(chosen, expected)
        equal += int((chosen.argmax(-1) == expected.argmax(-1)).sum())
        if step + 1 < NEW_TOKENS:
            logits = runner.step(state, answer[:, step])
    if "router" not in runner.manifest:  # behind a router each side lays out what stays in its own way
        compare_cache(runner, state, inputs, made, found)
    return equal


def compare_cache(runner: Any, state: Any, inputs: dict[str, Any], made: Any, found: dict[str, Difference]) -> None:
    """Keys and values of each layer at the end of an answer, padding left out."""
    import numpy as np

    mask = inputs["attention_mask"].bool().numpy()
    mask = np.concatenate([mask, np.ones((len(mask), NEW_TOKENS - 1), bool)], 1)  # [B, S + N - 1]
    shared = runner.manifest["cache"] == "shared"
    cache = made.cache if hasattr(made, "cache") else made.past_key_values  # since transformers 5.24, before
    for layer_idx, layer in enumerate(cache.layers):
        for part, tensor in (("key", layer.keys), ("value", layer.values)):
            if tensor.shape[2] != mask.shape[1]:
                continue  # a sliding window: torch has forgotten the beginning
            mine = state.cache[f"{layer_idx}.{part}"].numpy()
            real = np.arange(mine.shape[2])[None] < state.lengths[:, None] if shared else mask
            theirs = tensor.float().numpy().swapaxes(1, 2)[mask]
            found[f"decoder: present.{layer_idx}.{part}"].add(mine.swapaxes(1, 2)[real], theirs)


def compare_answers(
    clean_room: Any, model: Any, runner: Any, inputs: dict[str, Any], rows: Any, tolerance: float
) -> list[str]:
    """Whole answers by each side's own `generate`, with the folder's generation settings, greedily.

    Args:
        rows: [B] True: those that are compared.
    """
    import numpy as np
    import torch

    made = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    length = inputs["input_ids"].shape[1]
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    said = runner.generate(**arrays, max_new_tokens=NEW_TOKENS, do_sample=False)[:, length:]
    expected = made.sequences[:, length:].numpy()
    scores = torch.stack(made.scores, 1).float()  # [B, N, V]
    best = scores.topk(2).values
    largest = torch.where(scores.isfinite(), scores.abs(), 0).amax(-1)
    margins = (best[..., 0] - best[..., 1]) / largest
    if said.shape != expected.shape and rows.all():
        return [f"{said.shape[1]} tokens instead of {expected.shape[1]}"]
    width = min(said.shape[1], expected.shape[1])  # rows that are not compared may go on for longer
    said, expected = said[:, :width], expected[:, :width]
    problems = []
    for row in np.flatnonzero(rows).tolist():
        rest = margins[row].nan_to_num(0).tolist()
        at = clean_room.first_difference(said[row].tolist(), expected[row].tolist(), rest, tolerance)
        if at is not None:
            problems.append(f"token {at + 1} of row {row + 1} is {said[row][at]}, not {expected[row][at]}")
    return problems if not np.array_equal(said[rows], expected[rows]) else []


# --- the whole --------------------------------------------------------------------------------------------------------


def load_torch(clean_room: Any, job: dict[str, Any]) -> tuple[Any, Any]:
    """The source in the precision of the export, computing in float32; and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    auto: Any = AutoModelForImageTextToText
    if "router" in json.loads((Path(job["folder"]) / "onnx.json").read_text()):
        module("modeling", HERE.parent / "modeling" / "__init__.py")  # this package's files, not the source's copy
        modeling: Any = importlib.import_module("modeling.modeling_routed")
        model_type = json.loads((Path(job["source"]) / "config.json").read_text())["model_type"]
        auto = getattr(modeling, modeling.class_name(model_type))
    model = auto.from_pretrained(job["source"], dtype=getattr(torch, job["dtype"]), trust_remote_code=False)
    return model.float().eval().requires_grad_(False), clean_room.load_processor(job["folder"])


@dataclass
class Findings:
    """What a comparison has come to."""

    outputs: dict[str, Difference] = field(default_factory=lambda: defaultdict(Difference))
    problems: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by budget
    equal_tokens: int = 0  # of them all, the runner's best is torch's best
    left_out: int = 0  # answers that were not compared, since the router was undecided between two routes


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """{"problems": [...], "outputs": {name: {max, mean, scale}}, and the counts of `Findings`}"""
    clean_room = module("clean_room", HERE.parent / "clean_room.py")
    runtime = module("runtime", HERE / "runtime" / "__init__.py")
    folder = Path(job["folder"])
    graphs = sorted(folder.glob("*.onnx"))
    if problems := [f"{path.stem}: {problem}" for path in graphs for problem in check_graph(path, job["opset"])]:
        return {"problems": problems}
    model, processor = load_torch(clean_room, job)
    try:
        runner = runtime.load(folder, job["device"])
    except Exception as error:
        return {"problems": [f"ONNX Runtime can't open it: {_first_line(error)}"]}
    findings = Findings()
    for what, inputs in [*questions(clean_room, processor), *given_questions(job["inputs"])]:
        compare_batch(clean_room, model, runner, (what, inputs), job, findings)
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


def compare_batch(
    clean_room: Any,
    model: Any,
    runner: Any,
    batch: tuple[str, dict[str, Any]],
    job: dict[str, Any],
    findings: Findings,
) -> None:
    """One batch through all components. What breaks is a finding too, and says where."""
    import numpy as np

    what, inputs = batch
    part, tolerance = "inputs", TOLERANCE[job["dtype"]]
    try:
        prompt = runner.prompt({name: tensor.numpy() for name, tensor in inputs.items()})
        part = "vision and embeddings"
        compare_parts(model, runner, inputs, prompt, findings.outputs)
        for preset in presets(runner):
            part = "decoder" if preset is None else f"decoder ({preset})"
            if preset is not None:
                model.set_budget(preset)
                runner.set_budget(preset)
            rows = np.ones(len(inputs["input_ids"]), bool)
            if preset is not None and not job["quantize"]:
                wrong, rows = compare_routes(model, runner, inputs, prompt, tolerance)
                findings.problems += [f"router, {what}: {problem}" for problem in wrong]
            made = clean_room.generate(model, inputs, NEW_TOKENS)
            findings.equal_tokens += compare_decoder(runner, inputs, prompt, made, rows, findings.outputs)
            findings.tokens[part] += NEW_TOKENS * int(rows.sum())
            findings.left_out += int((~rows).sum())
            if not job["quantize"]:
                answers = compare_answers(clean_room, model, runner, inputs, rows, tolerance)
                findings.problems += [f"generate, {what}: {problem}" for problem in answers]
    except Exception as error:
        findings.problems.append(f"{part}: fails for {what}: {type(error).__name__}: {_first_line(error)}")


def presets(runner: Any) -> list[str | None]:
    """Budgets to compare under: all that a router has names for; None where there is no router."""
    return ["off", *runner.manifest["router"]["presets"]] if "router" in runner.manifest else [None]


def compare_routes(
    model: Any, runner: Any, inputs: dict[str, Any], prompt: Any, tolerance: float
) -> tuple[list[str], Any]:
    """Which visual tokens stay and which layers run, under the budget that both sides have now.

    Returns: problems, and in which rows both sides go the same way, [B]. Where they don't, and the router's logits say
        that it is all the same within the tolerance, there is no problem, and nothing behind it can be compared.
    """
    import numpy as np

    _, state = runner.prefill(prompt, 1)
    theirs = model.route(**inputs)
    mask, problems, same = inputs["attention_mask"].bool(), [], []
    for row, real in enumerate(mask):
        tokens, layers = (None if x is None else x[row] for x in (theirs.token_logits, theirs.layer_logits))
        visual = theirs.visual[row][real].numpy()  # all others stay
        kept = theirs.keep[row][real].numpy()
        count = int(state.kept[row])
        mine = np.zeros_like(kept)
        mine[np.arange(count) if state.index is None else state.index[row, :count]] = True
        among = None if tokens is None else tokens[real][visual]
        if not mine[~visual].all() or not undecided(mine[visual], kept[visual], among, tolerance):
            problems.append(f"{int((mine != kept).sum())} tokens of row {row + 1} are chosen by one side only")
        runs = theirs.layers[row][runner.manifest["router"]["candidates"]].numpy()
        if not undecided(state.runs[row], runs, layers, tolerance):
            problems.append(f"row {row + 1} runs other layers")
        same.append(np.array_equal(mine, kept) and np.array_equal(runs, state.runs[row]))
    return problems, np.array(same)


def undecided(mine: Any, theirs: Any, logits: Any, tolerance: float) -> bool:
    """Whether two choices are one, or differ only in what has the same logits.

    Args:
        mine, theirs: [N] True: chosen.
        logits: [N] that the choice was made by.
        tolerance: a share of how far the logits lie apart.
    """
    import numpy as np

    differs = mine != theirs
    if not differs.any():
        return True
    if logits is None or mine.sum() != theirs.sum():
        return False
    values = logits.float().numpy()
    return float(np.ptp(values[differs])) <= tolerance * float(np.ptp(values))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def out_of_tolerance(found: dict[str, Difference], dtype: str, quantized: str | None) -> list[str]:
    problems = []
    for name, difference in found.items():
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
                problems[-1] += ": its values don't fit into float16, export with --dtype float32"
    return problems


def module(name: str, path: Path) -> Any:
    """A module or package by its path."""
    locations = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


class _Blocked:
    """An import hook that makes `exporter` unimportable, installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "exporter":
            raise ImportError("the clean process must not import exporter")


def main() -> None:
    sys.meta_path.insert(0, _Blocked())
    print(json.dumps(compare(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
