"""Tiny random checkpoints as vLLM can run them, compressed, or with a serving router, and requests about pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # tiny_models

from tiny_models import FAMILIES_HERE, QUESTIONS, build, random_image  # noqa: E402

LAYERS = 4
SIDE, PATCH = 224, 14  # of the large model's pictures
WIDE: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32, vLLM's least on a CPU
SECTIONS = {"qwen2_vl": [4, 6, 6], "qwen2_5_vl": [4, 6, 6], "qwen3_vl": [8, 4, 4], "glm4v": [2, 3, 3]}
# Sizes that need no resizing, where there are any: releases of transformers resize by different means.
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "llava": ((40, 40),),
    "llava_next": ((48, 24), (24, 48)),
    "llava_onevision": ((24, 24), (48, 24)),
    "internvl": ((32, 32), (64, 32)),
    "idefics3": ((48, 24), (48, 48)),
    "smolvlm": ((48, 48), (24, 48)),
    "paligemma": ((40, 40),),
    "gemma3": ((64, 64),),
    "mistral3": ((60, 40), (40, 60)),
    "qwen2_vl": ((50, 60), (60, 50), (40, 40)),
    "qwen2_5_vl": ((50, 60), (60, 50), (40, 40)),
    "qwen3_vl": ((50, 60), (60, 50), (40, 40)),
    "glm4v": ((50, 60), (60, 50), (40, 40)),
}


def wide_text(family: str) -> dict[str, Any]:
    """Return a family's text settings with heads that vLLM runs."""
    text = dict(FAMILIES_HERE[family].text)
    text |= {name: min(value, text.get(name, value)) for name, value in WIDE.items()}
    if "head_dim" in text or family == "internvl":
        text["head_dim"] = 32
    if "query_pre_attn_scalar" in text:
        text["query_pre_attn_scalar"] = 32
    if family in SECTIONS:
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": SECTIONS[family]}
    return text


def build_wide(family: str, folder: Path, layers: int = LAYERS, **changes: Any) -> Path:
    """Write a tiny checkpoint that vLLM runs; `changes` take the place of entries of the family's row."""
    before = FAMILIES_HERE[family]
    if family == "gemma3":  # vLLM looks these tokens of Gemma's up
        changes["extra"] = (*before.extra, "\n\n", "\n\n\n", "\n\n\n\n")
    FAMILIES_HERE[family] = replace(before, **{"text": wide_text(family), **changes})
    try:
        return build(family, folder, layers=layers)
    finally:
        FAMILIES_HERE[family] = before


def build_large(folder: Path, layers: int) -> Path:
    """Write a LLaVA with hidden states of 1,024 whose pictures are 256 tokens, with a serving router, all random."""
    if not (folder / "serving_router").exists():
        row, side = FAMILIES_HERE["llava"], {"height": SIDE, "width": SIDE}
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
        build_wide(
            "llava",
            folder,
            layers,
            text={**wide_text("llava"), **sizes, "head_dim": 64},
            vision={**row.vision, "image_size": SIDE, "patch_size": PATCH},
            config={**row.config, "image_seq_length": (SIDE // PATCH) ** 2},
            image_processor=("CLIPImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_size": side}),
            processor=("LlavaProcessor", {**row.processor[1], "patch_size": PATCH}),
        )
        add_router(folder, bottleneck=256)
    return folder


def large_pictures(folder: Path, number: int) -> list[str]:
    """Write pictures for it, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    random, files = np.random.default_rng(0), []
    for i in range(number):
        files.append(str(folder / f"{i:03}.png"))
        random_image(random, (SIDE, SIDE)).save(files[-1])
    return files


def add_router(folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Give a folder a serving router of random weights: every one of them counts in what it chooses and adds.

    Args:
        settings: in place of those that `route --serve` writes: `pooled=False` is the form of older folders.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from exporter.modeling.served_router import (
        ENTRY,
        SERVING_ROUTER_FILE,
        ServingRouter,
        ServingSettings,
    )
    from exporter.routing.serving.settings import serving_settings

    config = AutoConfig.from_pretrained(folder)
    written = serving_settings(config, question_aware=True)
    entry = ServingSettings(**{**written, "bottleneck": 32, "num_heads": 4, **settings})
    router = ServingRouter(config.get_text_config().hidden_size, entry)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in router.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                1.5 * parameter.shape[-1] ** -0.5 * noise if parameter.ndim > 1 else parameter + 0.2 * noise
            )
    (folder / SERVING_ROUTER_FILE).parent.mkdir(exist_ok=True)
    save_file(router.state_dict(), folder / SERVING_ROUTER_FILE)
    change_config(folder, {ENTRY: asdict(entry)})
    return folder


def change_config(folder: Path, entries: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}, indent=2))


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question about pictures, what it asks of the serving router, and the files of its pictures for vLLM."""

    chat: list[dict[str, Any]]
    images: list[Any]
    files: list[str]
    budget: dict[str, Any] = field(default_factory=dict)  # mm_processor_kwargs


def asked(
    family: str, number: int, folder: Path, budgets: tuple[dict[str, Any], ...] = ({},), counts: tuple[int, ...] = (1,)
) -> Iterator[Asked]:
    """Yield questions with `counts` pictures each, in turn, under `budgets`, in turn; always the same ones."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SIZES[family]
    for i in range(number):
        count = counts[i // 3 % len(counts)]
        images = [random_image(random, sizes[(i + j) % len(sizes)]) for j in range(count)]
        files = [str(folder / f"{family}-{i}-{j}.png") for j in range(count)]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]}]
        yield Asked([{"role": "user", "content": content}], images, files, dict(budgets[i % len(budgets)]))
