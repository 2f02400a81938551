"""Layers that stay in memory: the right ones, no more than there is room for, with the weights that they came with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.checkpoints import recipe

import exporter
from exporter.checkpoints.source import open_source
from exporter.checkpoints.weight_files import open_weights
from exporter.clean_room import REFERENCE_TOKENS
from exporter.compression import estimate
from exporter.compression.job import CompressionJob, prepare
from exporter.models import loading, residency
from exporter.models.loading import PartSizes, load_model, text_decoder
from exporter.models.replay import replaced
from exporter.recipe import Method, RunOptions


def memory_for(folder: Path, layers: int) -> str:
    """Return --memory with room for so many layers beside what is none."""
    sizes = PartSizes.of(open_source(str(folder)), 4)
    return f"{(sizes.beside + layers * max(sizes.layers)) / 1000 + 1:.0f}KB"


@pytest.fixture
def model(tiny, monkeypatch):
    """A model with room for a layer that runs, one that is read meanwhile and two that stay."""
    monkeypatch.setattr(loading, "AT_ONCE", 2)
    folder = tiny("llava")
    return load_model(open_source(str(folder)), "cpu", torch.float32, memory_for(folder, 4), by_layer=True)[0]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the layers' parts that are read from disk."""
    names: list[str] = []
    reading = vars(residency)["read_tensor"]
    monkeypatch.setattr(residency, "read_tensor", lambda entry: (names.append(str(entry)), reading(entry))[1])
    return names


def in_memory(layers) -> list[int]:
    return [number for number, layer in enumerate(layers) if not any(p.is_meta for p in layer.parameters())]


def test_the_last_layers_stay_pass_after_pass_and_give_way_to_states(model, read):
    layers = text_decoder(model).layers
    count, room = len(layers), residency.ranges_of(model).room
    assert room.num_bytes < sum(p.numel() * 4 for layer in layers for p in layer.parameters())
    numbers = []
    for _ in range(3):
        read.clear()
        for layer in layers:
            with residency.held(layer):
                assert room.used <= room.num_bytes
        numbers.append(len(read))
        assert in_memory(layers) == list(range(count - 3, count))
    assert numbers[1] == numbers[2] == numbers[0] * (count - 2) // count  # one of the three gives way to what runs
    room.for_states = room.num_bytes
    assert room.take(room.num_bytes // 2) and len(in_memory(layers)) == 1
    with residency.held(layers[0]):
        assert in_memory(layers) == [0]
    room.give_back(room.num_bytes // 2)
    room.forget(*room.layers.values())
    assert not in_memory(layers) and not room.used


def test_what_is_put_in_a_layers_place_leaves_nothing_behind(model):
    """A layer that stays is the original's again, and so is one that was read while something stood in its place."""
    layers = text_decoder(model).layers
    name = "mlp.down_proj.weight"
    with residency.held(layers[-1]):
        own = layers[-1].get_parameter(name).detach().clone()
    assert len(layers) - 1 in in_memory(layers)
    with replaced(model, {(len(layers) - 1, name): own + 1}):
        for layer in layers:
            with residency.held(layer):
                pass
        x = torch.randn(2, own.shape[1])
        assert torch.allclose(layers[-1].mlp.down_proj(x), x @ (own + 1).T, atol=1e-4)
    with residency.held(layers[-1]):
        assert torch.equal(layers[-1].get_parameter(name), own)
    with residency.held(layers[-1]), replaced(model, {(len(layers) - 1, name): own + 1}):
        assert torch.equal(layers[-1].get_parameter(name), own + 1)
    with residency.held(layers[-1]):
        assert torch.equal(layers[-1].get_parameter(name), own)


@pytest.mark.slow
@pytest.mark.usefixtures("unverified")
def test_more_memory_reads_less_and_is_never_exceeded(tiny, questions, tmp_path, monkeypatch):
    """Weights in memory, with the layer that is read ahead and the states of all stores, as they are at every layer."""
    monkeypatch.setattr(loading, "AT_ONCE", 2)
    monkeypatch.setattr(estimate, "AT_ONCE", 2)
    for name in ("KNOWN_REFERENCE", "UNKNOWN_REFERENCE"):  # nothing is guessed of what a random model says
        monkeypatch.setattr(estimate, name, REFERENCE_TOKENS)
    folder, most = tiny("llava"), [0]
    loaded: list[Any] = []
    asked = recipe(folder, questions, localizer=Method("tis"), fold=Method("scp"))
    asked = dataclasses.replace(asked, calibration=dataclasses.replace(asked.calibration, samples=4, answer_tokens=3))
    load, take = CompressionJob.load_model, residency._in_memory

    def taking(part):
        kept = take(part)
        weights = sum(p.numel() * p.element_size() for p in loaded[-1].parameters() if not p.is_meta)
        most[0] = max(most[0], weights + residency.ranges_of(loaded[-1]).room.states)
        return kept

    def loading_model(job):
        model, ignored = load(job)
        loaded.append(model)
        return model, ignored

    monkeypatch.setattr(CompressionJob, "load_model", loading_model)
    monkeypatch.setattr(residency, "_in_memory", taking)
    sizes, found, made = PartSizes.of(open_source(str(folder)), 4), [], []
    for layers in (2, 4):
        most[0] = 0
        options = RunOptions(memory=memory_for(folder, layers))
        made.append(exporter.compress(asked, tmp_path / f"of_{layers}", options))
        read = json.loads((made[-1] / "compression.json").read_text())["measured"]["bytes_read"]
        found.append(read)
        assert most[0] + max(sizes.layers) <= sizes.beside + layers * max(sizes.layers) + 2000
        told = estimate.estimate(prepare(asked, options)).bytes_to_read or 0
        assert 0.75 * told <= read <= 1.25 * told
    assert found[1] < found[0]
    weights = [open_weights(one) for one in made]
    assert all(torch.equal(weights[0].read(name), weights[1].read(name)) for name in weights[0].entries)
