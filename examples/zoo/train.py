"""Train the models of the zoo (models.ROWS), one after the other, each into a complete Hugging Face folder.

Two phases, as for the reference model (examples/digits): the vision tower and the projector alone, with throw-away
heads that name what each visual token shows, then the whole model on the answer tokens of several questions a picture.
Training resumes where it was interrupted; models that are finished are left alone.

    python examples/zoo/train.py --out zoo                      all of them
    python examples/zoo/train.py --out zoo --models qwen-shapes
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import batches
import models
import numpy as np
import pictures
import torch
from joint_training import Heads, Report, load_state, muon_and_adamw, save_state, schedules
from pictures import KINDS
from torch import nn
from torch.nn import functional as F

QUESTIONS = 7  # a picture and step
NAMED_WEIGHT = 0.4  # of the throw-away heads' losses
POSITIONS = 8  # most columns and rows of visual tokens
CHECKPOINT_SECONDS = 180


@dataclass(frozen=True)
class Options:
    scenes: int
    batch: int
    bf16: bool
    compiled: bool
    vision_steps: int | None = None  # both in place of the row's
    steps: int | None = None


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the visual tokens of all pictures of a batch, one after the other. [V, D]"""
    parts = [pixels]
    if "image_sizes" in pixels:  # Pixtral makes one sequence of all pictures, whose attention costs its square
        parts = [{name: each[i : i + 1] for name, each in pixels.items()} for i in range(len(pixels["image_sizes"]))]
    outputs = [model.model.get_image_features(**part, return_dict=True).pooler_output for part in parts]
    features = [each for output in outputs for each in (output if isinstance(output, (tuple, list)) else [output])]
    return torch.cat([each.flatten(0, -2) for each in features])


def read_layers(layers: int) -> tuple[int, int]:
    """Return the layers whose visual tokens, and whose words, the throw-away heads read."""
    return max(0, layers // 4 - 1), max(0, (layers + 1) // 2 - 1)


@dataclass(frozen=True)
class Losses:
    answer: torch.Tensor
    named: torch.Tensor
    mentioned: torch.Tensor
    right: torch.Tensor  # [answer tokens] bool

    @property
    def total(self) -> torch.Tensor:
        return self.answer + NAMED_WEIGHT * (self.named + self.mentioned)


def hidden_states(model: Any, packed: dict[str, Any], read: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the decoder's last hidden states [B, S, D], and those behind the layers to be read."""
    embeds = model.get_input_embeddings()(packed["input_ids"])
    features = image_features(model, packed["pixels"])
    hidden = embeds.masked_scatter(packed["visual"][..., None], features.to(embeds.dtype))
    decoder = model.get_decoder()
    behind: dict[int, torch.Tensor] = {}
    hooks = [
        decoder.layers[index].register_forward_hook(lambda _, __, out, index=index: behind.update({index: out}))
        for index in read
    ]
    try:
        out = decoder(
            inputs_embeds=hidden,
            attention_mask=packed["masks"],
            position_ids=packed["position"],
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return out.last_hidden_state, [behind[index] for index in read]


def answer_losses(model: Any, heads: Heads, packed: dict[str, Any]) -> Losses:
    """Return the loss on the answers, those of the throw-away heads, and which answer tokens are right."""
    last, (early, middle) = hidden_states(model, packed, read_layers(model.config.text_config.num_hidden_layers))
    meant = packed["places"][..., 0] >= 0
    answered = packed["target"] >= 0
    logits = model.lm_head(last[answered]).float()
    target = packed["target"][answered]
    return Losses(
        F.cross_entropy(logits, target),
        heads.named_loss(early[packed["visual"]], packed["named"]),
        heads.mentioned_loss(middle[meant], packed["places"][meant]),
        logits.argmax(-1) == target,
    )


# --- the two phases --------------------------------------------------------------------------------------------------


def make_heads(model: Any, kind: pictures.Kind) -> Heads:
    sizes = {"color": 1 + len(kind.colors), "name": 1 + len(kind.names), "column": POSITIONS, "row": POSITIONS}
    return Heads(model.config.text_config.hidden_size, sizes, pictures.BINS)


def optimizers_for(model: Any, heads: Heads, phase: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers that learn most in a phase, AdamW for the others; vision: no decoder."""
    decoder = {id(p) for p in model.get_decoder().parameters()} | {id(model.get_output_embeddings().weight)}
    in_layers = {id(p) for p in model.get_decoder().layers.parameters() if p.ndim == 2}
    vision = [(n, p) for n, p in model.named_parameters() if id(p) not in decoder]
    if phase == "vision":
        matrices = [p for n, p in vision if p.ndim == 2 and ("layer" in n or "blocks" in n)]
        rest = [p for _, p in vision if not any(p is m for m in matrices)]
        return muon_and_adamw(matrices, [{"params": [*rest, *heads.parameters()], "lr": 2e-3}])
    matrices = [p for p in model.parameters() if id(p) in in_layers]
    others = [p for p in model.parameters() if id(p) in decoder and id(p) not in in_layers]
    groups = [
        {"params": [p for _, p in vision], "lr": 1e-3},
        {"params": [*others, *heads.parameters()], "lr": 2e-3},
    ]
    return muon_and_adamw(matrices, groups)


def choose(sample: batches.Sample, rng: np.random.Generator, weights: dict[str, float]) -> list[Any]:
    """Draw QUESTIONS of a picture's questions, those of some types more often."""
    odds = np.array([weights.get(kind, 1.0) for kind, _ in sample.asked])
    number = min(QUESTIONS, len(odds))
    return [sample.asked[i][1] for i in rng.choice(len(odds), number, replace=False, p=odds / odds.sum())]


def draw_batch(samples: Sequence[batches.Sample], rng: np.random.Generator, size: int) -> list[batches.Sample]:
    """Draw pictures with about the same number of visual tokens, so that little is padded."""
    pool = rng.choice(len(samples), size * 4, replace=False)
    lengths = np.array([len(samples[i].prefix) for i in pool])
    pool = pool[np.argsort(lengths + rng.normal(0, 4, len(pool)))]
    start = rng.integers(4) * size
    return [samples[i] for i in pool[start : start + size]]


Step = Callable[[np.random.Generator], tuple[torch.Tensor, str]]


def run_phase(phase: str, step_loss: Step, steps: int, model: Any, heads: Heads, work: Path, report: Report) -> None:
    """Minimise what step_loss returns, with checkpoints; a phase that is over is only loaded."""
    optimizers = optimizers_for(model, heads, phase)
    stateful = [*optimizers, *schedules(optimizers, steps)]
    saved, modules = work / f"{phase}.pt", {"model": model, "heads": heads}
    first = load_state(saved, modules, stateful)
    if first:
        report(f"{phase}: resumed at step {first}")
    begin = last_saved = time.monotonic()
    for step in range(first, steps):
        loss, line = step_loss(np.random.default_rng([7, step]))
        model.zero_grad()
        heads.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in stateful:
            each.step()
        if step % 50 == 0 or step == steps - 1:
            report(f"{phase} {step}: {line}, {time.monotonic() - begin:.0f} s")
        if time.monotonic() - last_saved > CHECKPOINT_SECONDS or step == steps - 1:
            save_state(saved, step + 1, modules, stateful)
            last_saved = time.monotonic()


def train_vision(
    model: Any, heads: Heads, samples: list, steps: int, options: Options, work: Path, report: Report
) -> None:
    """Train tower and projector: heads name the colour, the name and the place of what each visual token shows."""

    def step_loss(rng: np.random.Generator) -> tuple[torch.Tensor, str]:
        batch = draw_batch(samples, rng, 2 * options.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            features = image_features(model, batches.stack_pixels(batch))
            labels = torch.cat([s.named for s in batch])
            loss = heads.named_loss(features, labels)
        shown = labels[:, 0] > 0
        with torch.no_grad():
            right = (heads.named["name"](features[shown].float()).argmax(-1) == labels[shown, 1]).float().mean()
        return loss, f"loss {loss:.3f}, tokens named {right:.3f}"

    run_phase("vision", step_loss, steps, model, heads, work, report)


def train_jointly(
    model: Any, heads: Heads, samples: list, held_out: list, weights: dict[str, float], steps: int, options: Options,
    work: Path, report: Report,
) -> None:  # fmt: skip
    """Train the whole model on answers; now and then, say how many held-out questions it gets right."""
    seen = 0

    def step_loss(rng: np.random.Generator) -> tuple[torch.Tensor, str]:
        nonlocal seen
        batch = draw_batch(samples, rng, options.batch)
        packed = batches.pack(model, batch, [choose(s, rng, weights) for s in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            losses = answer_losses(model, heads, packed)
        if seen % 400 == 399:
            report(f"held out: {exact_match(model, heads, held_out, options)}")
        seen += 1
        line = f"loss {losses.answer:.3f}, answer tokens right {losses.right.float().mean():.3f}"
        return losses.total, f"{line}, named {losses.named:.3f}, placed {losses.mentioned:.3f}"

    run_phase("joint", step_loss, steps, model, heads, work, report)


@torch.no_grad()
def exact_match(model: Any, heads: Heads, samples: list[batches.Sample], options: Options) -> str:
    """Say how many questions have every answer token right, given those before it: all, and by type."""
    counts: dict[str, list[bool]] = {}
    for start in range(0, len(samples), options.batch):
        batch = samples[start : start + options.batch]
        packed = batches.pack(model, batch, [[q for _, q in s.asked] for s in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            right = answer_losses(model, heads, packed).right.tolist()
        for kind, question in ((kind, q) for s in batch for kind, q in s.asked):
            length = len(question.ids) - question.answer_start
            counts.setdefault(kind, []).append(all(right[:length]))
            right = right[length:]
    share = {kind: 100 * sum(each) / len(each) for kind, each in counts.items()}
    total = [r for each in counts.values() for r in each]
    return f"{100 * sum(total) / len(total):.1f} %: " + ", ".join(f"{k} {v:.0f}" for k, v in sorted(share.items()))


# --- one model, all models -------------------------------------------------------------------------------------------


def load_samples(row: models.Row, model: Any, processor: Any, scenes: int, path: Path) -> list[batches.Sample]:
    """Return the training pictures as samples, from a file where they have been made before."""
    if not path.exists():
        preparation = batches.Preparation(model, processor)
        drawn = pictures.draw_split(row.pictures, "train", row.sizes, row.seed, scenes)
        torch.save([preparation.sample(picture) for picture in drawn], path)
    return torch.load(path, weights_only=False)


def compile_layers(model: Any) -> None:
    """Compile the decoder layers' own forward functions, so that hooks still see what they return."""
    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def train_model(name: str, out: Path, options: Options, report: Report) -> None:
    """Train one model and write its folder and, beside it, NAME-data with its questions."""
    row, work = models.ROWS[name], out / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(row.seed)
    processor = models.write_processor(row, work / "model")
    model = models.make_model(row, processor.tokenizer)
    model.set_attn_implementation("eager")  # compiled, and with gradients, the faster one on a CPU
    kind = KINDS[row.pictures]
    heads, vision_heads = make_heads(model, kind), make_heads(model, kind)
    report(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {row.layers} layers")
    begin = time.monotonic()
    samples = load_samples(row, model, processor, options.scenes, work / f"samples-{options.scenes}.pt")
    preparation = batches.Preparation(model, processor)
    held_out = list(map(preparation.sample, pictures.draw_split(row.pictures, "validation", row.sizes, row.seed, 100)))
    report(f"{len(samples)} pictures, {time.monotonic() - begin:.0f} s")
    if options.compiled:
        compile_layers(model)
    train_vision(model, vision_heads, samples, options.vision_steps or row.vision_steps, options, work, report)
    steps = options.steps or row.steps
    train_jointly(model, heads, samples, held_out, kind.weights, steps, options, work, report)
    report(f"held out, at the end: {exact_match(model.eval(), heads, held_out, options)}")
    models.write_model(model, work / "model")
    pictures.write_questions(row.pictures, row.sizes, row.seed, work / "data")
    (work / "data").replace(out / f"{name}-data")
    (work / "model").replace(out / name)  # last: a folder of this name says that all is there
    shutil.rmtree(work)
    report(f"{name}: written to {out / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--models", nargs="+", choices=models.ROWS, default=list(models.ROWS), metavar="NAME")
    parser.add_argument("--scenes", type=int, default=12_000, help="training pictures of each model")
    parser.add_argument("--vision-steps", type=int, help="of training tower and projector (the table's number)")
    parser.add_argument("--steps", type=int, help="of training the whole model (the table's number)")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cpu.get_capabilities().get("avx512_bf16", False),
        help="bfloat16 matrix products (default: where the CPU has them)",
    )
    given = parser.parse_args()
    options = Options(given.scenes, given.batch, given.bf16, given.compile, given.vision_steps, given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    log = (given.out / "train.log").open("a")

    def report(line: str) -> None:
        print(line, flush=True)
        print(time.strftime("%H:%M:%S"), line, file=log, flush=True)

    for name in given.models:
        if (given.out / name / "model.safetensors").exists():
            report(f"{name}: finished already")
        else:
            train_model(name, given.out, options, report)


if __name__ == "__main__":
    main()
