"""What a route saves at real width: LLaVA-7B's layer shapes, 576 visual and 64 text tokens, random weights.

    python examples/benchmarks/routed_speed.py                  as many layers as fit, on the first GPU or the CPU
    python examples/benchmarks/routed_speed.py --layers 32 --batch 1,8 --device cuda

Random weights cost what trained ones do. Every figure is a median of rounds in which all budgets take turns with the
whole model, and with the whole model a second time, which shows how far the measurement itself is off. Ends with a list
of what is to hold, and exit code 1 if something does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from exporter.benchmark.bench import hardware, measure, ready
from exporter.benchmark.figures import Benchmark, BenchOptions, Figures, ModelBenchmark
from exporter.benchmark.table import benchmark_table
from exporter.benchmark.timing import Spread
from exporter.benchmark.torch_subject import TorchSubject
from exporter.benchmark.workload import Workload
from exporter.data.batches import Batch
from exporter.modeling.modeling_routed import routed
from exporter.modeling.routed_request import RouterInputs
from exporter.modeling.routed_route import Budget
from exporter.modeling.routed_router import best_layers, best_tokens
from exporter.models.loading import compute_dtype, pick_device
from exporter.routing.cost import counted
from exporter.routing.settings import default_settings
from exporter.version import versions

VISUAL, TEXT, KEPT = 576, 64, 144
FULL_DEPTH = 32
IMAGE_TOKEN = 0
WIDTH, HEAD, MLP = 4096, 128, 11008 / 4096
SHARE_OF_MEMORY = 0.6


# --- the model and its prompts ----------------------------------------------------------------------------------------


def llava(hidden: int, layers: int, dtype: torch.dtype, device: str, drop_at: int) -> Any:
    """A routed LLaVA with a router as `lvlm-exporter route` makes it, and a small vision tower."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=hidden,
            intermediate_size=int(hidden * MLP),
            num_hidden_layers=layers,
            num_attention_heads=hidden // HEAD,
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
        image_seq_length=VISUAL,
    )
    config.router = default_settings(config, drop_at) | {"default": "off"}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = routed(LlavaForConditionalGeneration)(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def prompt(model: Any, rows: int) -> Batch:
    """No two rows alike, so that the router sends each its own way."""
    random = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, model.config.text_config.vocab_size, (rows, VISUAL + TEXT), generator=random)
    ids[:, 4 : 4 + VISUAL] = IMAGE_TOKEN
    pixels = torch.randn(rows, 3, 336, 336, generator=random).to(model.dtype)
    is_visual = ids == IMAGE_TOKEN
    return Batch({"input_ids": ids, "pixel_values": pixels}, is_visual, ~is_visual, ())


def layers_that_fit(hidden: int, dtype: torch.dtype, device: str) -> int:
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil  # comes with accelerate

        free = psutil.virtual_memory().available
    parameters = (4 + 3 * MLP) * hidden**2
    return max(4, min(FULL_DEPTH, int(SHARE_OF_MEMORY * free / (parameters * dtype.itemsize)) // 4 * 4))


# --- the router by itself ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RouterCost:
    milliseconds: float
    flops: int
    parameters: int


def router_cost(model: Any, batch: Batch, budget: dict[str, Any], repeats: int) -> RouterCost:
    """Scores, ranking and the look at the result, which waits for the device: all that routing adds to a prefill."""
    inputs = model.router_inputs(**batch.inputs)
    asked, settings = Budget(**budget), model.router_settings

    @torch.inference_mode()
    def decide(given: RouterInputs) -> None:
        tokens, layers = model.router(*given)
        best_tokens(tokens, given.visual, asked)
        best_layers(layers, settings, asked.keep_layers, model.num_layers).tolist()

    with counted() as counter:
        decide(inputs)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        decide(inputs)
        seconds.append(time.perf_counter() - begin)
    parameters = sum(parameter.numel() for parameter in model.router.parameters())
    return RouterCost(1e3 * Spread.of(seconds).median, counter.get_total_flops(), parameters)


def at_full_depth(whole: float, router: float, layers: int) -> float:
    """The router's share of a routed prefill of LLaVA-7B, all of which but the router grows with the layers."""
    return router / (router + (whole - router) * FULL_DEPTH / layers)


# --- what is to hold --------------------------------------------------------------------------------------------------


def checks(models: dict[str, ModelBenchmark], router: dict[int, RouterCost], model: Any) -> list[tuple]:
    """(what, measured, bound, holds)"""
    found: list[tuple[str, float, str, bool]] = []
    layers = model.num_layers

    def at_least(what: str, value: float, bound: float) -> None:
        found.append((what, value, f">= {bound}", value >= bound))

    def at_most(what: str, value: float, bound: float) -> None:
        found.append((what, value, f"<= {bound}", value <= bound))

    for number, whole in enumerate(models["whole"].batches):
        where = f", batch {whole.batch}"
        again = models["whole again"].batches[number].ratio_to_reference or {}
        for name in ("prefill_ms", "decode_ms"):
            at_most(f"|1 - ratio| of the whole model to itself, {name}{where}", abs(1 - again[name]), 0.03)
        for name in ("tokens", "layers"):
            ratio = models[name].batches[number].ratio_to_reference or {}
            at_least(f"speed-up / FLOPs ratio of prefill, {name}{where}", ratio["achieved"]["prefill"], 0.9)
            at_least(f"speed-up / bytes ratio of decoding, {name}{where}", ratio["achieved"]["decode"], 0.9)
        own, cost = models["tokens"].batches[number], router[whole.batch]
        at_most(f"router's share of prefill time, {FULL_DEPTH} layers{where}",
                at_full_depth(own.prefill_ms, cost.milliseconds, layers), 0.02)  # fmt: skip
        at_most(f"router's share of prefill FLOPs, {FULL_DEPTH} layers{where}",
                at_full_depth(own.flops or 0, cost.flops, layers), 0.01)  # fmt: skip
        for name, one in models.items():
            expected = cache_size(one.batches[number], one.budget, model)
            found.append((f"KV cache in bytes, {name}{where}", one.batches[number].kv_bytes, f"= {expected}",
                          one.batches[number].kv_bytes == expected))  # fmt: skip
    at_most("router's parameters", next(iter(router.values())).parameters, 40e6)
    return found


def cache_size(own: Figures, budget: dict[str, Any] | None, model: Any) -> int:
    """By the budget alone: rows x layers that run x tokens that stay x keys and values of all heads."""
    budget = budget or {}
    drop_at = model.router_settings.drop_at
    run = budget.get("keep_layers") or model.num_layers
    kept = TEXT + (budget.get("keep_visual_tokens") or VISUAL)
    tokens = drop_at * (TEXT + VISUAL) + (run - drop_at) * kept
    return own.batch * tokens * 2 * model.config.text_config.hidden_size * model.dtype.itemsize


# --- running ----------------------------------------------------------------------------------------------------------


def main() -> int:
    options = arguments()
    device = pick_device(options.device)
    by_device = "float32" if device == "cpu" else "bfloat16"
    dtype = compute_dtype(by_device if options.dtype == "auto" else options.dtype, None, device)
    layers = options.layers or layers_that_fit(options.hidden, dtype, device)
    how = BenchOptions(device, options.dtype, options.batch, options.new_tokens, options.rounds)
    model = llava(options.hidden, layers, dtype, device, options.drop_at)
    fewer = layers - layers // 4
    asked = {
        "whole": None,
        "whole again": None,
        "tokens": {"keep_visual_tokens": KEPT, "keep_layers": None},
        "layers": {"keep_visual_tokens": None, "keep_layers": fewer},
        "both": {"keep_visual_tokens": KEPT, "keep_layers": fewer},
    }
    kind = f"torch, {model.config.text_config._attn_implementation}, {str(dtype).removeprefix('torch.')}"
    subjects = [TorchSubject(name, budget, model, None, kind) for name, budget in asked.items()]
    prompts = [prompt(model, rows) for rows in how.batches]
    measured = measure(subjects, [[one] * len(subjects) for one in prompts], how, device)
    routers = {
        len(one.is_visual): router_cost(model, ready(one, device), asked["both"] or {}, options.rounds)
        for one in prompts
    }
    done = Benchmark(Workload(None, VISUAL, TEXT), how, hardware(device), versions(), "", measured)
    print(f"LLaVA's shapes, width {options.hidden}, {layers} of {FULL_DEPTH} layers, tokens leave at {options.drop_at}")
    print(benchmark_table(done))
    for rows, cost in routers.items():
        print(f"router, batch {rows}: {cost.milliseconds:.2f} ms, {cost.flops / 1e9:.2f} GFLOPs, "
              f"{cost.parameters / 1e6:.1f} M parameters")  # fmt: skip
    found = checks({m.path: m for m in measured}, routers, model)
    for what, value, bound, holds in found:
        print(f"{'holds' if holds else 'FAILS'}  {what}: {value:,.4g} ({bound})")
    return int(not all(holds for *_, holds in found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=WIDTH, help="narrower to try it out: a multiple of 128 (4096)")
    parser.add_argument("--layers", type=int, help="how many; as many as fit in memory, up to 32")
    parser.add_argument("--drop-at", type=int, default=0, help="layer before which visual tokens leave")
    parser.add_argument("--batch", type=lambda text: tuple(map(int, text.split(","))), default=(1,), help="rows: 1,8")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto", help="bfloat16 on a GPU, float32 on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
