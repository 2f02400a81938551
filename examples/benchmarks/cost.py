"""What compressing costs, in units of what can't be avoided: a forward pass over the data, and copying the bytes.

    python examples/benchmarks/cost.py            score and fold against a plain forward pass, hidden size 1024
    python examples/benchmarks/cost.py --default  all that compressing by default computes, of the reference model
    python examples/benchmarks/cost.py --write    writing a 3.3 GB checkpoint without a sixth of it, against cp
    python examples/benchmarks/cost.py --route    a step of training a router, of the reference model with its questions

Elsewhere weights are random: cost does not depend on them. Every figure is a median of alternating runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from exporter.checkpoints.safetensors_ranges import write_shards
from exporter.checkpoints.source import open_source
from exporter.checkpoints.writer import kept_pieces
from exporter.clean_room import load_processor
from exporter.compression.estimate import estimate
from exporter.compression.job import prepare
from exporter.compression.steps import fold_gaps, localize
from exporter.data.batches import Batch, by_size, make_batches, spread
from exporter.data.calibration import load_calibration
from exporter.families import DECODERS
from exporter.fold.job import FoldJob
from exporter.localize.tis import tis
from exporter.methods import FOLDS, LOSSES, resolve
from exporter.modeling.routed_route import RouterSettings
from exporter.modeling.routed_router import Router
from exporter.models.capture import layer_statistics
from exporter.models.loading import load_model, text_decoder
from exporter.plan import LayerBudget, make_plan
from exporter.recipe import DEFAULT_SAMPLES, CalibrationData, Recipe, RunOptions
from exporter.routing.settings import default_settings
from exporter.routing.training.learner import Learner, Teacher
from exporter.routing.training.relaxation import gated_attention

IMAGE_TOKEN = 0
COPIES = """
import sys
from pathlib import Path
from exporter.checkpoints.weight_files import open_weights
from exporter.checkpoints.safetensors_ranges import TensorRange, write_shard
weights, out = open_weights(Path(sys.argv[1])), Path(sys.argv[2])
out.mkdir()
for number, shard in enumerate(weights.shards):
    pieces = [TensorRange(name, entry) for name, entry in shard.entries.items()]
    write_shard(out / f"{number}.safetensors", pieces, {}, lambda done: None)
# not getrusage: its maximum is inherited from the process that started this one
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def medians(repeats: int, **jobs: Callable[[], object]) -> dict[str, float]:
    """Seconds of each job, run in turn so that a change of the machine's speed meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()  # warm up
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def llava(hidden: int, layers: int, intermediate: int, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    heads = hidden // 64 if hidden < 4096 else hidden // 128
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=32000,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)


def questions(model: LlavaForConditionalGeneration, batches: int, rows: int, text: int = 64) -> list[Batch]:
    """576 visual and 64 text tokens a row, as LLaVA-1.5 has them."""
    visual = (336 // 14) ** 2
    made = []
    for _ in range(batches):
        ids = torch.randint(1, 32000, (rows, visual + text))
        ids[:, 4 : 4 + visual] = IMAGE_TOKEN
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(rows, 3, 336, 336, dtype=model.dtype),
        }
        is_visual = ids == IMAGE_TOKEN
        made.append(Batch(inputs, is_visual, ~is_visual, ()))
    return made


def scoring(options: argparse.Namespace) -> None:
    """TIS and one fold over the same questions, in forward passes over them."""
    model = llava(options.hidden, options.layers, options.hidden * 8 // 3, torch.float32)
    model.to(options.device)
    batches = [batch.to(options.device) for batch in questions(model, options.batches, options.rows)]
    plan = make_plan(options.layers, range(options.layers - 2, options.layers))
    weights = dict(text_decoder(model).layers.named_parameters())

    def some(share: float = 1.0) -> list[Batch]:
        return list(spread(batches, share))

    def wait() -> None:
        if options.device != "cpu":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(**batch.inputs, use_cache=False)
        wait()

    def score() -> None:
        tis(layer_statistics(model, batches), 2)
        wait()

    def fold(name: str) -> None:
        job = FoldJob(model, some, plan, lambda layer, name: weights.get(f"{layer}.{name}"), DECODERS["llama"])
        resolve(FOLDS[name].run)(job)
        wait()

    folds = {name: functools.partial(fold, name) for name in ("scp", "least_squares", "reconstruction")}
    seconds = medians(options.repeats, forward=forward, score=score, **folds)
    size = f"{options.batches} x {options.rows} x 640 tokens"
    print(f"hidden {options.hidden}, {options.layers} layers, {size}, {options.device}")
    ratios = (f"{name} {value / seconds['forward']:.2f} x" for name, value in seconds.items() if name != "forward")
    print(f"forward {seconds['forward']:.2f} s; {'; '.join(ratios)}")


def default(options: argparse.Namespace) -> None:
    """All that compressing by default computes, answering included, in forward passes over all calibration questions.

    Counted are tokens through decoder layers, padding too; and timed.
    """
    data = CalibrationData(options.calibration, samples=options.samples)
    recipe = Recipe(options.model, data, LayerBudget(drop_ratio=options.drop_ratio))
    job = prepare(recipe, RunOptions(options.device, batch_size=8))
    model, _ = job.load_model()
    samples = by_size(job.calibration.samples)
    with counted(model) as plain:
        begin = time.perf_counter()
        with torch.inference_mode():
            for batch in make_batches(samples, job.processor, job.source.config, 8):
                model.base_model(**batch.to(model.device).inputs, use_cache=False)
        seconds = time.perf_counter() - begin
    asked = job.questions(model)
    with counted(model) as localizing:
        begin = time.perf_counter()
        scores = localize(job, model, asked)
        localized = time.perf_counter() - begin
    with counted(model) as folding:
        begin = time.perf_counter()
        _, fold = fold_gaps(job, model, asked, make_plan(job.source.num_layers, scores.drop))
        folded = time.perf_counter() - begin
    counts = [sum(each) / sum(plain) for each in (localizing, folding)]
    print(f"{len(samples)} questions; forward {seconds:.1f} s; layers {sorted(scores.drop)}, fold {fold['name']}")
    print(
        f"localize {counts[0]:.2f} passes ({localized / seconds:.2f} x the time), fold {counts[1]:.2f} "
        f"({folded / seconds:.2f}), together {sum(counts):.2f} ({(localized + folded) / seconds:.2f}); estimated "
        f"{estimate(job).forward_passes:.2f}"
    )


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens, padding included, of every call of a decoder layer."""
    tokens: list[int] = []

    def count(layer: Any, arguments: tuple[Any, ...]) -> None:
        if getattr(layer.forward, "__name__", "") != "identity":  # switched off, to see what layers are called with
            tokens.append(arguments[0].shape[:2].numel())

    handles = [layer.register_forward_pre_hook(count) for layer in text_decoder(model).layers]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def routing(options: argparse.Namespace) -> None:
    """A step with each loss, in forward passes over its questions and answers; and what answering them takes once."""
    source = open_source("examples/digits/model")
    source.config.router = default_settings(source.config)
    settings = RouterSettings.of(source.config)
    model, _ = load_model(source, options.device, torch.float32)
    samples = load_calibration("examples/digits/data/calibration.jsonl", samples=16 * options.batches).samples
    teacher = Teacher(model, load_processor(source.folder), samples)
    starts = range(0, len(samples), 16)
    router = Router(model.config.get_text_config().hidden_size, settings).to(options.device)

    def answer() -> None:
        teacher.answer_all(lambda items, what, total: items, 16)

    answer()
    asked = [teacher.question(range(start, start + 16))[1].batch.inputs for start in starts]

    def forward() -> None:
        with torch.inference_mode():
            for inputs in asked:
                model.base_model(**inputs, use_cache=False)

    with gated_attention(model) as attention:
        learner = Learner(teacher, router, settings, attention)

        def step(loss: Callable[..., torch.Tensor]) -> None:
            for start in starts:
                look = learner.training_batch(range(start, start + 16))
                loss(look, torch.Generator().manual_seed(start)).backward()

        steps = {name: functools.partial(step, resolve(loss.run)) for name, loss in LOSSES.items()}
        seconds = medians(options.repeats, forward=forward, answer=answer, **steps)
    ratios = (f"{name} {value / seconds['forward']:.2f} x" for name, value in seconds.items() if name != "forward")
    print(f"forward {1000 * seconds['forward'] / len(starts):.0f} ms for 16 questions; {'; '.join(ratios)}")


def writing(options: argparse.Namespace) -> None:
    """Drop a sixth of the layers of a 3.3 GB bfloat16 checkpoint in 1 GB shards."""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="cost-") as name:
        folder = Path(name)
        model = llava(2048, 24, 8192, torch.bfloat16)
        model.save_pretrained(folder / "source", max_shard_size="1GB")
        del model
        source = open_source(str(folder / "source"))
        plan = make_plan(24, (18, 19, 20, 21))
        target, copy = folder / "target", folder / "copy"
        kept = folder / "kept"  # a checkpoint of the retained bytes, to be copied by cp
        kept.mkdir()
        write_shards(kept, kept_pieces(source, plan, {}))

        def write() -> None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            write_shards(target, kept_pieces(source, plan, {}))

        def cp() -> None:
            shutil.rmtree(copy, ignore_errors=True)
            subprocess.run(["cp", "-r", kept, copy], check=True)

        seconds = medians(options.repeats, cp=cp, write=write)
        size = sum(file.stat().st_size for file in kept.iterdir())
        print(
            f"{size / 1e9:.2f} GB kept of {source.weights.num_bytes / 1e9:.2f} GB; cp {seconds['cp']:.2f} s; "
            f"write {seconds['write']:.2f} s, {seconds['write'] / seconds['cp']:.2f} x cp"
        )
        for gigabytes, layers in ((1, 6), (3, 24)):
            print(f"peak memory of a process that writes about {gigabytes} GB: {peak_megabytes(folder, layers):.0f} MB")


def peak_megabytes(folder: Path, layers: int) -> float:
    """Of a fresh process that only writes; torch is not even imported."""
    place = folder / f"source-{layers}"
    if layers == 24:
        place = folder / "source"
    else:
        llava(2048, layers, 8192, torch.bfloat16).save_pretrained(place, max_shard_size="1GB")
    out = folder / f"peak-{layers}"
    ran = subprocess.run([sys.executable, "-c", COPIES, place, out], capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    return float(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--route", action="store_true")
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--model", default="examples/digits/model", help="for --default")
    parser.add_argument("--calibration", default="examples/digits/data/calibration.jsonl", help="for --default")
    parser.add_argument("--samples", type=int, default=DEFAULT_SAMPLES, help="for --default")
    parser.add_argument("--drop-ratio", type=float, default=0.25, help="for --default")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    (writing if options.write else routing if options.route else default if options.default else scoring)(options)


if __name__ == "__main__":
    main()
