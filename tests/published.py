"""Ask a published folder the questions of its release: shared by the test, the script that makes such folders, and the
compatibility matrix.

A folder lies in `tests/fixtures/published/VERSION/`, beside `questions/` and `expected.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "fixtures" / "published"
ASKED = 3  # the first of the questions, as one batch
Tokens = list[list[int]]  # [ASKED, new tokens]


def folders() -> list[Path]:
    """Return every published folder of every release."""
    return sorted(path.parent for name in ("compression.json", "onnx.json") for path in PUBLISHED.glob(f"*/*/{name}"))


def expected(folder: Path) -> list[dict[str, Any]]:
    """Return what a folder answered when it was made: a list of {"budget", "arguments", "tokens"}."""
    answers: dict[str, Any] = json.loads((folder.parent / "expected.json").read_text())
    found: list[dict[str, Any]] = answers["folders"][folder.name]
    return found


def new_tokens(folder: Path) -> int:
    return int(json.loads((folder.parent / "expected.json").read_text())["new_tokens"])


def answers(
    folder: Path, budgets: Sequence[Mapping[str, Any]], count: int, *, trust_remote_code: bool = False
) -> list[Tokens]:
    """Answer the questions beside a folder greedily, once under each budget, padded on the left.

    Args:
        budgets: keyword arguments of `generate`.
        count: new tokens of an answer; no model here ends one before.
        trust_remote_code: load a routed checkpoint with transformers alone, by the modeling file in the folder; else
            this package's own class runs it.
    """
    from exporter.clean_room import load_processor

    inputs = ask(load_processor(folder), folder.parent / "questions")
    length = inputs["input_ids"].shape[1]
    if (folder / "onnx.json").exists():
        import exporter.onnx

        runner = exporter.onnx.load(folder)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        made = [runner.generate(**arrays, **budget, max_new_tokens=count) for budget in budgets]
    else:
        model = load(folder, trust_remote_code)
        options = {"max_new_tokens": count, "do_sample": False}
        made = [model.generate(**inputs, **budget, **options) for budget in budgets]
    return [tokens[:, length:].tolist() for tokens in made]


def load(folder: Path, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    if "router" in json.loads((folder / "config.json").read_text()) and not trust_remote_code:
        from exporter.checkpoints.source import open_source
        from exporter.routing.folder import load_routed

        return load_routed(open_source(str(folder)), "cpu", torch.float32)
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()


def ask(processor: Any, questions: Path) -> dict[str, Any]:
    """Return the questions as one batch of model inputs."""
    from PIL import Image

    from exporter.clean_room import encode

    lines = [json.loads(line) for line in (questions / "calibration.jsonl").read_text().splitlines()][:ASKED]
    images = [[Image.open(questions / line["image"]).convert("RGB")] for line in lines]
    texts = [[{"type": "image"}, {"type": "text", "text": line["question"]}] for line in lines]
    return encode(processor, [[{"role": "user", "content": text}] for text in texts], images)
