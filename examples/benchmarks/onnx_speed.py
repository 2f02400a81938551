"""ONNX Runtime against torch on one machine: how fast, and how right.

    python examples/benchmarks/onnx_speed.py speed --size reference   12 layers of 128, LLaVA, random weights
    python examples/benchmarks/onnx_speed.py speed --size mid         8 layers of 1024
    python examples/benchmarks/onnx_speed.py routed --size mid        what routes save, beside the plain decoder
    python examples/benchmarks/onnx_speed.py accuracy FOLDER... --task FILE.jsonl

`speed` runs every way in turn, so that a change of the machine's speed meets all of them alike, and prints medians and
their ratios to sdpa. `routed` times the graphs of a routed LLaVA beside the one of the plain model, and that one twice,
which shows how far the measurement is off. Weights are random: speed does not depend on them. `accuracy` takes
checkpoints, which torch answers, and ONNX folders. (Not called onnx.py, which `import onnx` would find: its folder
comes first on the path.)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from exporter.benchmark.bench import SETTLE_S, hardware, measure
from exporter.benchmark.figures import Benchmark, BenchOptions
from exporter.benchmark.onnx_subject import OnnxSubject
from exporter.benchmark.table import benchmark_table
from exporter.benchmark.workload import Workload
from exporter.clean_room import load_processor
from exporter.data.batches import Batch, make_batches
from exporter.data.calibration import load_calibration
from exporter.evaluation.scoring import Rate, is_right
from exporter.modeling.routed_route import RouterSettings
from exporter.modeling.routed_router import Router
from exporter.onnx import ExportOptions, load
from exporter.onnx.graphs.decoder import cache_shape
from exporter.onnx.graphs.quantize import quantize
from exporter.onnx.graphs.router import describe_router, write_routed
from exporter.onnx.manifest import onnxruntime_version, read_manifest
from exporter.onnx.pipeline import ExportJob, write_graphs
from exporter.onnx.runtime.model import OnnxModel
from exporter.onnx.runtime.prepare import prepare
from exporter.onnx.runtime.routed import RoutedOnnxModel
from exporter.onnx.support import support_of
from exporter.routing.settings import default_settings
from exporter.version import versions

SIZES = {
    "reference": LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=69,
    ),
    "mid": LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000,
    ),
}  # fmt: skip


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text = SIZES[options.size]
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(1, 60, (options.batch, options.prompt))
    ways: dict[str, Any] = {f"torch {name}": Torch(model, ids, name) for name in ("sdpa", "eager", "compile")}
    with tempfile.TemporaryDirectory() as place:
        for weights in (None, "int8"):
            folder = Path(place) / str(weights)
            folder.mkdir()
            job = ExportJob(None, ExportOptions(), support_of(config), "float32", "shared", None)  # of no checkpoint
            write_graphs(model, job, folder)
            if weights:
                quantize(folder, weights, "cpu")
            ways["ONNX Runtime" + (f" {weights}" if weights else "")] = Ort(model, folder, ids, options.threads)
        prefill = alternating(options.repeats, {name: way.prefill for name, way in ways.items()})
        decode = alternating(options.repeats, {name: way.decode for name, way in ways.items()})
    print(f"{options.size}, batch {options.batch}, prompt {options.prompt}, {options.threads} threads, ms (x sdpa)")
    for name in ways:
        told = (f"{1e3 * s[name]:9.2f} ({s['torch sdpa'] / s[name]:4.2f})" for s in (prefill, decode))
        print(f"{name:20} prefill {next(told)}   a token {next(told)}")
    if options.json:
        options.json.write_text(json.dumps({"prefill_s": prefill, "decode_s": decode}, indent=2) + "\n")


def alternating(repeats: int, jobs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median of the seconds that each job says it took, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()  # warm up, compile
    for _ in range(repeats):
        for name, job in jobs.items():
            time.sleep(SETTLE_S)
            seconds[name].append(job())
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(job: Callable[[], object]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


class Torch:
    """Embeddings, language model and head by torch: a prompt, then tokens on the cache."""

    STEPS = 8

    def __init__(self, model: Any, ids: torch.Tensor, way: str) -> None:
        self.model, self.ids = copy.deepcopy(model), ids
        self.model.set_attn_implementation("eager" if way == "eager" else "sdpa")
        self.forward = torch.compile(self.model.forward, dynamic=True) if way == "compile" else self.model.forward
        self.next = torch.ones(len(ids), 1, dtype=torch.long)

    @torch.inference_mode()
    def _run(self, **inputs: Any) -> Any:
        return self.forward(**inputs, use_cache=True, logits_to_keep=1)

    def prefill(self) -> float:
        return seconds_of(lambda: self._run(input_ids=self.ids))

    def decode(self) -> float:
        """Of one token."""
        cache = self._run(input_ids=self.ids).past_key_values

        def steps() -> None:
            for _ in range(self.STEPS):
                self._run(input_ids=self.next, past_key_values=cache)

        return seconds_of(steps) / self.STEPS


class Ort:
    """The same by the runner."""

    STEPS = Torch.STEPS

    def __init__(self, model: Any, folder: Path, ids: torch.Tensor, threads: int) -> None:
        manifest = manifest_of(model)
        self.model = OnnxModel(folder, manifest, "cpu", threads)
        self.prompt = prepare(manifest, {"input_ids": ids.numpy()})

    def prefill(self) -> float:
        return seconds_of(lambda: self.model.prefill(self.prompt, self.STEPS))

    def decode(self) -> float:
        """Of one token."""
        _, state = self.model.prefill(self.prompt, self.STEPS)
        tokens = np.ones(len(self.prompt.input_ids), np.int64)
        return seconds_of(lambda: [self.model.step(state, tokens) for _ in range(self.STEPS)]) / self.STEPS


def manifest_of(model: Any) -> dict[str, Any]:
    """What the runner must know."""
    layers, heads, head_size = cache_shape(model)
    return {
        "cache": "shared", "layers": layers, "heads": heads, "head_size": head_size, "dtype": "float32",
        "device": "cpu", "quantize": None, "hidden_size": model.config.text_config.hidden_size,
        "image_token_id": model.config.image_token_id, "mrope": False, "first_position": 0, "blocks": None,
        "vision": {"kind": "tiles"}, "pad_token_id": 0,
    }  # fmt: skip


# --- routes -----------------------------------------------------------------------------------------------------------

VISUAL, TEXT, KEPT = 576, 64, 144  # LLaVA-1.5's tokens, and a quarter of the visual ones


def routed(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text = SIZES[options.size]
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1, vision_feature_layer=-1
    )
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    config.router = default_settings(config)
    settings, fewer = RouterSettings.of(config), text.num_hidden_layers - text.num_hidden_layers // 4
    plain = manifest_of(model)
    facts = plain | {"router": describe_router(config, settings)}
    how = BenchOptions("cpu", batches=options.batch, new_tokens=16, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        for name in ("plain", "routed"):
            Path(name).mkdir()
        job = ExportJob(None, ExportOptions(), support_of(config), "float32", "shared", None)  # of no checkpoint
        write_graphs(model, job, Path("plain"))
        for path in Path("plain").glob("vision.onnx*"):
            shutil.copyfile(path, Path("routed") / path.name)
        router = Router(text.hidden_size, settings).eval().requires_grad_(False)
        write_routed(model, router, settings, job.support, Path("routed"), "cpu", job.opset)
        whole = OnnxModel(Path("plain"), plain, "cpu", options.threads)
        chosen = RoutedOnnxModel(Path("routed"), facts, "cpu", options.threads)
        asked = [
            {"preset": "off"},
            {"keep_visual_tokens": KEPT},
            {"keep_layers": fewer},
            {"keep_visual_tokens": KEPT, "keep_layers": fewer},
        ]
        subjects = [OnnxSubject("plain", None, whole, None, config, how.new_tokens)] * 2
        subjects += [OnnxSubject("routed", budget, chosen, None, config, how.new_tokens) for budget in asked]
        prompts = [[prompt(config, rows)] * len(subjects) for rows in how.batches]
        measured = measure(subjects, prompts, how, "cpu")
    known = versions() | {"onnxruntime": onnxruntime_version()}
    done = Benchmark(Workload(None, VISUAL, TEXT), how, hardware("cpu"), known, "", measured)
    print(f"{text.num_hidden_layers} layers of {text.hidden_size}, {len(settings.candidates)} of which may be skipped")
    print(benchmark_table(done))
    if options.json:
        options.json.write_text(json.dumps(done.to_data(), indent=2) + "\n")


def prompt(config: Any, rows: int) -> Batch:
    random = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, config.image_token_id, (rows, VISUAL + TEXT), generator=random)
    ids[:, 4 : 4 + VISUAL] = config.image_token_id
    pixels = torch.randn(rows, 3, 336, 336, generator=random)
    is_visual = ids == config.image_token_id
    return Batch({"input_ids": ids, "pixel_values": pixels}, is_visual, ~is_visual, ())


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy(options: argparse.Namespace) -> None:
    results = {}
    for folder in options.folders:
        rate, seconds, size = answered(Path(folder), options)
        results[folder] = {"accuracy": rate.accuracy, "n": rate.n, "seconds": seconds, "bytes": size}
        low, high = rate.interval
        print(
            f"{folder}: {100 * rate.accuracy:.1f} % of {rate.n} ({100 * low:.1f} to {100 * high:.1f}), "
            f"{size / 1e6:.1f} MB, {seconds:.1f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def answered(folder: Path, options: argparse.Namespace) -> tuple[Rate, float, int]:
    """Exact match on the task's questions, seconds of generating, bytes of weights."""
    processor = load_processor(folder)
    config = AutoConfig.from_pretrained(folder)
    samples = load_calibration(options.task, samples=options.samples).samples
    if (folder / "onnx.json").exists():
        model: Any = load(folder, threads=options.threads)
        size = sum(read_manifest(folder)["files"].values())
    else:
        torch.set_num_threads(options.threads)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    right, seconds = [], 0.0
    for batch in make_batches(samples, processor, config, options.batch):
        begin = time.perf_counter()
        made = model.generate(**batch.inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
        seconds += time.perf_counter() - begin
        told = processor.batch_decode(made[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [is_right(s, q.answers, q.choices) for s, q in zip(told, batch.samples, strict=True)]
    return Rate.of(right), seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(required=True)
    fast = ways.add_parser("speed")
    fast.add_argument("--size", choices=SIZES, default="reference")
    fast.add_argument("--prompt", type=int, default=256, help="tokens")
    fast.add_argument("--batch", type=int, default=1)
    fast.add_argument("--repeats", type=int, default=15)
    routes = ways.add_parser("routed")
    routes.add_argument("--size", choices=SIZES, default="mid")
    routes.add_argument("--batch", type=lambda text: tuple(map(int, text.split(","))), default=(1,), help="rows: 1,8")
    routes.add_argument("--rounds", type=int, default=10)
    right = ways.add_parser("accuracy")
    right.add_argument("folders", nargs="+")
    right.add_argument("--task", required=True)
    right.add_argument("--samples", type=int)
    right.add_argument("--batch", type=int, default=16)
    right.add_argument("--max-new-tokens", type=int, default=32)
    for way, function in ((fast, speed), (routes, routed), (right, accuracy)):
        way.add_argument("--threads", type=int, default=2)
        way.add_argument("--json", type=Path)
        way.set_defaults(function=function)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
