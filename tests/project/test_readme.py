"""README's shell and Python blocks run, on the reference model in place of the hub's and on few questions."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.checkpoints import not_verified

from exporter.cli.entry import main
from exporter.modeling.routed_route import FEWEST_JUDGED

README = (Path(__file__).parents[2] / "README.md").read_text()
SKIPPED = {  # and why
    "make demo": "takes minutes; tests/project/test_reference.py does the same on part of the questions",
    "make test": "is what runs this test",
    "pip install lvlm-exporter": "changes the environment",
}
HUB = "llava-hf/llava-1.5-7b-hf"
FEW = {  # what makes a command quick
    "score": "--samples 4 --localizer block_influence",
    "compress": "--samples 4 --localizer block_influence --fold none",
    "evaluate": "--samples 4",
    "heal": "--samples 16 --steps 1 --exchanges 0",
    "route": f"--samples {FEWEST_JUDGED} --steps 1 --batch-size 2",
    "bench": "--rounds 2 --new-tokens 1 --batch 1",
    "search": "--dry-run",
    "push": "--dry-run",  # nothing is published
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[str]:
    for block in blocks("sh"):
        yield from (" ".join(line.split()) for line in block.splitlines() if line.strip())


def test_every_command_is_run_or_skipped_for_a_reason():
    assert set(SKIPPED) <= set(commands())
    assert {shlex.split(command)[1] for command in commands() if command not in SKIPPED} == set(FEW)


@pytest.fixture
def place(digits, tmp_path, monkeypatch) -> Path:
    """A folder with the files that README names; verification, which takes a process of its own, is left out."""
    for module in ("pipeline", "routing.with_router", "healing.healed"):
        monkeypatch.setattr(f"exporter.{module}.require", not_verified)
    monkeypatch.setattr("exporter.checkpoints.verification.require", lambda *_: None)
    lines = [json.loads(line) for line in (digits / "data" / "test.jsonl").read_text().splitlines()[::4]]
    lines = [line | {"image": str(digits / "data" / line["image"])} for line in lines]
    few = (("questions.jsonl", FEWEST_JUDGED, ("image", "question")), ("labelled.jsonl", 16, lines[0]))
    for name, number, keys in few:
        (tmp_path / name).write_text("".join(json.dumps({k: x[k] for k in keys}) + "\n" for x in lines[:number]))
    recipe = yaml_block(digits)
    (tmp_path / "my.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def yaml_block(digits: Path) -> str:
    """README's recipe for the reference model, on few questions and without its router."""
    (text,) = blocks("yaml")
    for old, new in (
        ("Qwen/Qwen2.5-VL-7B-Instruct", str(digits / "model")),
        ("samples: 512", "samples: 4"),
        ("localizer: best_of ", "localizer: block_influence "),
        ("heal: {", "# heal: {"),
        ("router: {", "# router: {"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


def test_the_shell_and_python_blocks_run(place, digits, capsys):
    model = str(digits / "model")
    for command in commands():
        if command in SKIPPED:
            continue
        words = [model if word == HUB else word for word in shlex.split(command)[1:]]
        words = ["llava-1.5-5b-routed" if word == "routed" else word for word in words]
        if words[0] == "bench" and "--keep-visual-tokens" in words:
            continue  # its folder is made further down
        assert main([*words, *FEW[words[0]].split(), "--quiet"]) == 0 or words[0] == "push", capsys.readouterr().err
    assert (place / "scores.png").exists() and (place / "llava-1.5-5b-routed" / "README.md").exists()
    bench = next(command for command in commands() if "bench routed" in command)
    bench = bench.replace("bench routed", "bench llava-1.5-5b-routed").replace("288,144", "32,16")
    bench = bench.replace("--visual-tokens 576 --text-tokens 64", "--task labelled.jsonl")
    assert main([*shlex.split(bench)[1:], *FEW["bench"].split(), "--quiet"]) == 0
    assert json.loads((place / "speed.json").read_text())["models"]

    load, api, router, turns = blocks("python")
    names: dict[str, Any] = {}
    exec(load, names)
    messages = [{"role": "user", "content": [{"type": "image", "image": str(digits / "data" / first_image(digits))},
                                             {"type": "text", "text": "how many?"}]}]  # fmt: skip
    names["inputs"] = names["processor"].apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    api = replaced(
        api, ('device="cuda"', 'device="cpu"'), ("visual_tokens=576, text_tokens=64", 'task="labelled.jsonl"')
    )
    exec(api.replace(", workload=", f", options={QUICK}, workload="), {})
    router = replaced(router, ("keep_layers=20", "keep_layers=8"), ("quality=0.98", "quality=0.9"))
    names["inputs"]["max_new_tokens"] = 4
    exec(router, names)
    ask, ask_again = turns.strip().splitlines()
    exec(ask, names)
    sequences = names["first"].sequences
    text = torch.cat([sequences, sequences[:, -2:]], 1)  # the question, its answer, and two tokens more
    names["further"] = {"input_ids": text, "attention_mask": torch.ones_like(text), "max_new_tokens": 4}
    exec(ask_again, names)


QUICK = 'exporter.BenchOptions(device="cpu", rounds=2, new_tokens=1)'


def first_image(digits: Path) -> str:
    image: str = json.loads((digits / "data" / "test.jsonl").read_text().splitlines()[0])["image"]
    return image


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text
