"""What a second question to the same picture costs a routed checkpoint, and how it is answered, in four ways.

    python examples/benchmarks/conversation.py ROUTED --questions examples/digits/data/validation.jsonl --preset fast

The first question of each picture is asked. The second one is asked of its cache with the route as it is, of its cache
with `reversible=True`, in a new conversation with the picture and both questions, and of the whole model's cache. The
second and the third way give the same answer. Times are medians to the first token of the second answer, the ways in
turn; FLOPs are what torch counts until then.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.answers import normalise
from exporter.modeling.routed_api import cache_of
from exporter.models.loading import pick_device
from exporter.routing.cost import counted
from exporter.routing.folder import load_routed

COUNTED = 5  # conversations whose FLOPs are counted


@dataclass
class Way:
    """One way to ask the second question, and what came of it."""

    name: str
    options: dict[str, Any]
    goes_on: bool = True  # with the cache of the first turn
    whole: bool = False  # of the model without a budget
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)


def main() -> int:
    options = arguments()
    device = pick_device(options.device)
    source = open_source(options.model)
    model = load_routed(source, device, torch.float32 if device == "cpu" else torch.bfloat16)
    processor = load_processor(source.folder)
    budget = {"preset": options.preset}
    ways = [
        Way("the route as it is", budget),
        Way("`reversible=True`", {**budget, "reversible": True}),
        Way("a new conversation", budget, goes_on=False),
        Way("the whole model's cache", {"preset": "off"}, whole=True),
    ]
    kept = []
    pairs = conversations(options.questions)[: options.pictures]
    for number, (image, first, second) in enumerate(pairs):
        kept.append(ask(model, processor, image, (first, second), ways=ways, count=number < COUNTED, turn=number))
    states, tokens, cached = (statistics.mean(column) for column in zip(*kept, strict=True))
    print(table(ways))
    print(f"\n{len(pairs)} pictures, preset {options.preset}, {device}, {torch.get_num_threads()} threads. Kept aside: "
          f"{states:,.0f} bytes for {tokens:.0f} tokens, beside {cached:,.0f} bytes of keys and values.")  # fmt: skip
    return int(ways[1].answers != ways[2].answers)


def conversations(path: Path) -> list[tuple[Image.Image, dict[str, Any], dict[str, Any]]]:
    """Return each picture with its first two questions; those of a picture follow each other in the file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    pictures = [(name, list(group)) for name, group in groupby(records, key=lambda record: record["image"])]
    return [(Image.open(path.parent / name).convert("RGB"), *asked[:2]) for name, asked in pictures if len(asked) > 1]


def ask(
    model: Any, processor: Any, image: Any, questions: Any, *, ways: list[Way], count: bool, turn: int
) -> tuple[int, int, int]:
    """Ask a picture's two questions in all ways; return the bytes aside, the tokens, and the bytes of the cache."""
    picture = {"type": "image", "image": image}
    opening = {"role": "user", "content": [picture, {"type": "text", "text": questions[0]["question"]}]}
    inputs = encoded(processor, [opening], model.device)
    firsts = {}
    for whole, options in ((True, ways[3].options), (False, ways[1].options)):
        made = model.generate(**inputs, **options, max_new_tokens=24, return_dict_in_generate=True)
        reply = processor.decode(made.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        further = {"role": "user", "content": [{"type": "text", "text": questions[1]["question"]}]}
        answered = {"role": "assistant", "content": [{"type": "text", "text": reply.strip()}]}
        both = encoded(processor, [opening, answered, further], model.device)
        said = made.sequences[0, : cache_of(made).get_seq_length()]
        assert torch.equal(both["input_ids"][0, : len(said)], said), "the template writes a turn in another way"
        firsts[whole] = both, cache_of(made)
    cache = firsts[False][1]
    for number in range(len(ways)):
        way = ways[(number + turn) % len(ways)]
        both, held = firsts[way.whole]
        text = {name: both[name] for name in ("input_ids", "attention_mask")}

        def asked_with(way: Any = way, both: Any = both, held: Any = held, text: Any = text) -> dict[str, Any]:
            return {**text, "past_key_values": copy.deepcopy(held)} if way.goes_on else dict(both)

        measure(model, processor, way, asked_with, answer=questions[1]["answer"], count=count)
    stored = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers if layer.is_initialized)
    return cache.aside_bytes, cache.get_seq_length(), stored


def encoded(processor: Any, chat: list[Any], device: Any) -> dict[str, torch.Tensor]:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(chat, **options).to(device))


def measure(model: Any, processor: Any, way: Way, new: Callable[[], Any], *, answer: str, count: bool) -> None:
    """Time the first token of the answer, count its FLOPs, and let the answer be finished."""
    given = new()
    synchronise(model)
    begin = time.perf_counter()
    model.generate(**given, **way.options, max_new_tokens=1)
    synchronise(model)
    way.milliseconds.append(1e3 * (time.perf_counter() - begin))
    if count:
        with counted() as counter:
            model.generate(**new(), **way.options, max_new_tokens=1)
        way.flops.append(counter.get_total_flops())
    given = new()
    tokens = model.generate(**given, **way.options, max_new_tokens=24)
    said = processor.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    way.answers.append(said)
    way.right.append(normalise(said) == normalise(answer))


def synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def table(ways: list[Way]) -> str:
    lines = ["| second question asked of | right % | as in a new conversation % | ms to the first token | MFLOPs |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for way in ways:
        same = statistics.mean(mine == afresh for mine, afresh in zip(way.answers, ways[2].answers, strict=True))
        lines.append(
            f"| {way.name} | {100 * statistics.mean(way.right):.1f} | {100 * same:.1f} | "
            f"{statistics.median(way.milliseconds):.1f} | {statistics.mean(way.flops) / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a routed checkpoint")
    parser.add_argument("--questions", type=Path, required=True, help="JSONL with image, question and answer")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--device")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
