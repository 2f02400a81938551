"""Everything that this package does on a GPU, at LLaVA-1.5-7B's shapes with random weights, in one table.

    sh examples/benchmarks/gpu.sh                      makes an environment first; WHEELS=DIR: from wheels in a folder
    python examples/benchmarks/gpu.py --out work/gpu   in an environment that is there
    python examples/benchmarks/gpu.py --dry            the same steps, tiny, on the CPU: to see that they run

Every step is a command of the package, as a user runs it, in a process of its own. What can't run is named with the
reason; a figure that was not measured is nowhere. Times hold for this card, these versions and this day.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import logging

from exporter.benchmark.bench import hardware
from exporter.benchmark.roofline import Roofline, measure_roofline
from exporter.version import versions

DIGITS = Path(__file__).parents[1] / "digits" / "model"  # its tokenizer and chat template serve any LLaVA
LAST_LINES = 300  # characters of what a failed command printed


@dataclass(frozen=True)
class Size:
    """How large the model is, and how long is measured."""

    hidden: int = 4096
    layers: int = 32
    onnx_layers: int = 4  # graphs of 7B take minutes to write
    image: int = 336
    patch: int = 14
    vision: tuple[int, int] = (1024, 24)  # width and layers of the tower
    questions: int = 64
    steps: int = 8  # of training a router
    batches: str = "1,16"
    new_tokens: int = 16
    rounds: int = 4


TINY = Size(128, 4, 4, 48, 8, (64, 2), 20, 1, "1", 2, 2)


@dataclass
class Report:
    """The rows of the table as they come."""

    out: Path
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, step: str, what: str, value: str) -> None:
        self.rows.append((step, what, value))
        print(f"{step:26} {what:44} {value}", flush=True)

    def markdown(self) -> str:
        lines = [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(["| step | what | measured |", "|---|---|---:|", *lines]) + "\n"


# --- the model --------------------------------------------------------------------------------------------------------


def write_model(folder: Path, size: Size, layers: int, device: str, dtype: torch.dtype) -> None:
    """Write a LLaVA of these shapes, random, with tokenizer, processor and chat template."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(DIGITS)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=int(size.hidden * 11008 / 4096),
            num_hidden_layers=layers,
            num_attention_heads=max(1, size.hidden // 128),
            vocab_size=32000,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision[0],
            intermediate_size=4 * size.vision[0],
            num_hidden_layers=size.vision[1],
            num_attention_heads=size.vision[0] // 64,
            image_size=size.image,
            patch_size=size.patch,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size.image // size.patch) ** 2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": size.image}, crop_size={"height": size.image, "width": size.image}
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(DIGITS / "chat_template.jinja").read_text(),
    )
    processor.save_pretrained(folder)


def write_questions(folder: Path, number: int, side: int) -> Path:
    """Write random pictures with a question each."""
    folder.mkdir()
    lines = []
    for index in range(number):
        torch.manual_seed(index)
        Image.fromarray(torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": "what is the background?"}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


# --- the steps --------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """The commands, one after the other."""

    report: Report
    size: Size
    device: str
    until: float  # of time.monotonic()

    def run(self, step: str, *command: str) -> dict[str, Any] | None:
        """Run a subcommand; tell its seconds, or why there are none. Returns: what it wrote with --json."""
        left = self.until - time.monotonic()
        if left < 1:
            self.report.add(step, "not measured", "the time was up")
            return None
        result = self.report.out / f"{len(self.report.rows)}.json"
        said = ["--json", str(result), "--quiet"]
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "exporter", *command, *said],
                capture_output=True, text=True, timeout=left, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self.report.add(step, "not measured", f"not done in the {left:.0f} s that were left")
            return None
        if done.returncode or not result.is_file():
            why = " ".join((done.stderr or done.stdout).split())[-LAST_LINES:]
            self.report.add(step, "not measured", f"exit code {done.returncode}: {why}")
            return None
        self.report.add(step, "seconds, loading and verifying counted in", f"{time.monotonic() - begin:.1f}")
        read: dict[str, Any] = json.loads(result.read_text())
        return read

    def bench(self, step: str, folders: list[Path], reference: Path, *more: str) -> None:
        """Time folders beside a reference; tell times and shares of the ideal."""
        size = self.size
        visual = (size.image // size.patch) ** 2
        found = self.run(
            step, "bench", *map(str, folders), "--reference", str(reference), "--device", self.device, "--roofline",
            "--visual-tokens", str(visual), "--text-tokens", "64", "--batch", size.batches, "--no-card",
            "--new-tokens", str(size.new_tokens), "--rounds", str(size.rounds), *more,
        )  # fmt: skip
        for model in found["models"] if found else ():
            name = f"{Path(model['path']).name}, {model['runtime']}"
            for figures in model["batches"]:
                roofline = Roofline(**found["roofline"]) if found and found["roofline"] else None
                shares = roofline.shares(argparse.Namespace(**figures)) if roofline else (None, None)
                for what, share in zip(("prefill", "decode"), shares, strict=True):
                    of_ideal = "" if share is None else f", {share:.2f} of the ideal"
                    where = f"{name}: {what}, batch {figures['batch']}"
                    self.report.add(step, where, f"{figures[f'{what}_ms']:.2f} ms{of_ideal}")


def measure_all(steps: Steps, work: Path, dtype: torch.dtype) -> None:
    """Write the models, then run every step that can run here."""
    size, report, device = steps.size, steps.report, steps.device
    whole, small, routed = work / "whole", work / "pruned", work / "routed"
    begin = time.monotonic()
    write_model(whole, size, size.layers, device, dtype)
    questions = write_questions(work / "questions", size.questions, size.image)
    report.add("random weights", "seconds to write", f"{time.monotonic() - begin:.1f}")
    asked = ["--calibration", str(questions), "--device", device]
    drop = str(size.layers // 4)
    steps.run("compress (tis, scp)", "compress", str(whole), "--out", str(small), "--drop-layers", drop, *asked,
              "--localizer", "tis", "--fold", "scp")  # fmt: skip
    steps.run(f"route ({size.steps} steps)", "route", str(whole), "--out", str(routed), *asked,
              "--steps", str(size.steps))  # fmt: skip
    there = [folder for folder in (small, routed) if folder.is_dir()]
    visual = (size.image // size.patch) ** 2
    budget = ["--keep-visual-tokens", str(visual // 4)] if routed in there else []
    steps.bench("bench", there or [whole], whole, *budget)
    if not device.startswith("cuda"):
        report.add("flash attention", "not measured", "no GPU")
    elif importlib.util.find_spec("flash_attn") is None:
        report.add("flash attention", "not measured", "flash_attn is not installed")
    else:
        steps.bench("flash attention", there or [whole], whole, "--attention", "flash_attention_2", *budget)
    steps.bench("torch.compile", there or [whole], whole, "--compile", *budget)
    onnx_steps(steps, work, dtype)


def onnx_steps(steps: Steps, work: Path, dtype: torch.dtype) -> None:
    """Export a model of a few layers, validated, and time it beside torch."""
    cuda = steps.device.startswith("cuda")
    try:
        import onnxruntime
    except ImportError:
        steps.report.add("ONNX Runtime", "not measured", "onnxruntime is not installed")
        return
    if cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        steps.report.add("ONNX Runtime", "not measured", "this onnxruntime has no CUDA (onnxruntime-gpu has)")
        return
    shallow, graphs = work / "shallow", work / "onnx"
    write_model(shallow, steps.size, steps.size.onnx_layers, steps.device, dtype)
    name = f"ONNX, {steps.size.onnx_layers} layers"
    kind = "cuda" if cuda else "cpu"
    if steps.run(f"{name}: export", "onnx", str(shallow), "--out", str(graphs), "--device", kind) is not None:
        steps.bench(name, [graphs], shallow)


def main() -> int:
    options = arguments()
    device = "cpu" if options.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no GPU that torch sees: nothing is measured (--dry runs the steps on the CPU).", file=sys.stderr
        )
        return 2
    if options.out.exists():
        print(f"{options.out} is there: name another folder, or remove it.", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    options.out.mkdir(parents=True)
    report = Report(options.out)
    dtype = torch.float32 if options.dry else torch.bfloat16
    known = {**hardware(device), **versions()}
    report.add("where", ", ".join(f"{k} {v}" for k, v in known.items()), datetime.date.today().isoformat())
    roofline = measure_roofline(device, dtype)
    report.add("best matrix product", roofline.dtype, f"{roofline.flops_per_s / 1e12:.3g} TFLOP/s")
    report.add("best copy", roofline.dtype, f"{roofline.bytes_per_s / 1e9:.4g} GB/s")
    size = TINY if options.dry else Size(layers=options.layers)
    work = options.out / "work"
    work.mkdir()
    try:
        measure_all(Steps(report, size, device, time.monotonic() + options.minutes * 60), work, dtype)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        (options.out / "table.md").write_text(report.markdown())
    print(f"written: {options.out / 'table.md'}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/gpu"), help="folder for table.md and the JSON files")
    parser.add_argument("--layers", type=int, default=32, help="fewer where memory or disk is short (32)")
    parser.add_argument(
        "--minutes", type=float, default=8, help="what is not done by then is named as not measured (8)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, to see that every step runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
