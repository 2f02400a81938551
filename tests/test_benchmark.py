"""Benchmarks: what is counted is right, what is compared is compared fairly, and cards tell it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FAMILIES
from test_routed import make_case

from exporter import bench, checkpoint
from exporter.benchmark import BenchOptions, Run, in_turn, ready
from exporter.cli import main
from exporter.errors import InputError
from exporter.subject import Setup, TorchRuntime, cache_bytes
from exporter.timing import Spread, paired, peak_bytes, skipped_ranks, turns
from exporter.workload import Workload

QUICK = BenchOptions(device="cpu", new_tokens=2, rounds=2)


@pytest.fixture(scope="module")
def routed_folder(tiny, tmp_path_factory):
    made = {}

    def folder(family, drop_at=0):
        if (family, drop_at) not in made:
            target = tmp_path_factory.mktemp("routed") / "model"
            made[family, drop_at] = make_case(family, tiny(family), target, drop_at).folder
        return made[family, drop_at]

    return folder


# --- what is timed is what generate does ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [None, {"keep_visual_tokens": 5, "keep_layers": 5}], ids=["plain", "routed"])
def test_a_subject_says_what_generate_says(family, budget, tiny, routed_folder, questions):
    """With padding too; its cache is as large as the formula says."""
    folder = tiny(family) if budget is None else routed_folder(family)
    subject = TorchRuntime(Setup("cpu")).open(str(folder), budget)
    prompt = Workload(task=str(questions)).batch(subject.processor, subject.config, 3)
    expected = subject.model.generate(
        **prompt.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **(budget or {})
    )[:, prompt.inputs["input_ids"].shape[1] :]
    prompt = ready(prompt, "cpu")
    assert "attention_mask" in prompt.inputs
    state = subject.prefill(prompt, subject.see(prompt))
    said = [state.token]
    for _ in range(3):
        state = subject.decode(state)
        said.append(state.token)
    assert torch.equal(torch.cat(said, 1), expected)
    cost = subject.cost(prompt, 2)
    assert cost.kv_bytes == cost.kv_bytes_formula
