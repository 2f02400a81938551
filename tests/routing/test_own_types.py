"""Routers on types that run by a modeling file of this package: Qwen-VL and mPLUG-Owl2.

What runs under a route is compared with passes in plain torch that know nothing of caches, padding or masks: layers are
run one by one on what is left of one sequence.

Legend: B rows, S tokens, L layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.checkpoints import not_verified, recipe
from fixtures.mplug_owl2 import QUERIES, owl_embeddings, owl_head, owl_layer, write_mplug_owl2
from fixtures.originals import write_qwen_vl
from fixtures.qwen_vl import qwen_embeddings, qwen_head, qwen_layer
from fixtures.routed import Case, add_random_router, copied, generated
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from exporter import RouterRecipe, compress, convert, route, verify
from exporter.checkpoints.own_types import OWN_TYPES
from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.clean_room import extend, load_processor
from exporter.data.batches import make_batch
from exporter.data.calibration import read_samples
from exporter.errors import InputError
from exporter.modeling.routed_api import cache_of
from exporter.modeling.routed_route import Route
from exporter.models.loading import load_model
from exporter.onnx.pipeline import ExportOptions, prepare
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData
from exporter.routing.folder import load_routed, update_modeling_files
from exporter.routing.settings import default_settings

IMAGES = {0: 1, 1: 2, 2: 0}  # of each row of a batch: one of them is text alone
BUDGET, LATER = {"keep_visual_tokens": 4, "keep_layers": 3}, {"keep_visual_tokens": 0.6, "keep_layers": 3}


@dataclass(frozen=True)
class Plain:
    """A type's pass in plain torch."""

    write: Callable[[Path], Path]
    embeddings: Callable[..., Tensor]  # of weights, ids [S], the id of pictures, and pictures
    layer: Callable[..., Tensor]  # of weights, layer, states [K, D], visual [K], positions [K]
    head: Callable[..., Tensor]
    tokens: int  # of a picture


PLAIN = {
    "qwen": Plain(write_qwen_vl, qwen_embeddings, lambda weights, layer, x, _, positions: qwen_layer(
        weights, layer, x, positions), qwen_head, 16),
    "mplug_owl2": Plain(write_mplug_owl2, owl_embeddings, owl_layer, owl_head, QUERIES + 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """made('qwen'): a tiny converted checkpoint, made once."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            place = tmp_path_factory.mktemp(family)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("exporter.conversion.convert.require", not_verified)
                folders[family] = convert(PLAIN[family].write(place / "original"), place / "made")
        return folders[family]

    return folder


@pytest.fixture(scope="module")
def case(made, tmp_path_factory) -> Callable[..., Case]:
    """case('qwen', drop_at=2): it with a random router, loaded plain and routed; made once."""
    cases: dict[Any, Case] = {}

    def of(family: str, drop_at: int = 2) -> Case:
        if (family, drop_at) not in cases:
            folder = tmp_path_factory.mktemp("routed") / "model"
            folder.mkdir()
            for path in made(family).iterdir():
                if path.is_file():
                    (folder / path.name).write_bytes(path.read_bytes())
            source = open_source(str(made(family)))
            add_random_router(folder, {**default_settings(source.config, drop_at, 2), "default": "off"})
            plain = load_model(source, "cpu", torch.float32)[0]
            routed = load_routed(open_source(str(folder)), "cpu", torch.float32)
            cases[family, drop_at] = Case(family, folder, plain, routed, load_processor(folder))
        return cases[family, drop_at]

    return of


def left(case: Case, inputs: dict[str, Tensor], route: Route, drop_at: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each row, where it has tokens that stay [S], and their logits: layers in plain torch on what is left."""
    plain, weights = PLAIN[case.family], load_file(case.folder / "model.safetensors")
    image_id, pictures = case.model.config.image_token_id, list(inputs.get("pixel_values", ()))
    for row, (ids, real) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        count = int((ids == image_id).sum()) // plain.tokens
        x = plain.embeddings(weights, ids[real], image_id, pictures[:count])
        pictures = pictures[count:]
        visual, stays, positions = (ids == image_id)[real], route.keep[row][real], torch.arange(len(x))
        for layer in range(case.num_layers):
            if layer == drop_at:
                x, visual, positions = x[stays], visual[stays], positions[stays]
            if route.layers[row, layer]:
                x = plain.layer(weights, layer, x, visual, positions)
        yield route.keep[row] & real, plain.head(weights, x if drop_at < case.num_layers else x[stays])


def with_answer(inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    new = torch.ones(len(sequences), sequences.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    return {**inputs, "input_ids": sequences, "attention_mask": torch.cat([inputs["attention_mask"], new], 1)}


def close(ours: Tensor, wanted: Tensor) -> bool:
    return bool((ours - wanted).abs().max() < 1e-4 * wanted.abs().max())


@pytest.mark.parametrize("family", PLAIN)
def test_without_a_budget_it_is_the_plain_model_bit_for_bit(family, case):
    case = case(family)
    inputs = case.prompts(images=IMAGES)
    with torch.no_grad():
        assert torch.equal(case.model(**inputs).logits, case.plain(**inputs).logits)
    answers = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (case.model, case.plain)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", PLAIN)
def test_pictures_are_encoded_beforehand_where_time_is_taken(family, case):
    """As `bench` does, with and without a budget."""
    case = case(family)
    inputs = case.prompts(images=IMAGES)
    pixels = inputs.pop("pixel_values")
    for options in ({"preset": "off"}, BUDGET):
        with torch.no_grad():
            seen = case.model.base_model.get_image_features(pixels)
            ours = case.model(**inputs, mm_encoder_outputs={"image": seen}, **options).logits
            assert torch.equal(ours, case.model(**inputs, pixel_values=pixels, **options).logits)


@pytest.mark.parametrize("drop_at", [0, 2, 4])
@pytest.mark.parametrize("family", PLAIN)
def test_under_a_route_it_is_its_layers_on_what_is_left(family, drop_at, case):
    """The prompt at once, and what is said from the cache, in a batch with padding and a row of text alone."""
    case = case(family)
    inputs = case.prompts(images=IMAGES)
    route = case.random_route(inputs)
    route = Route(keep=route.keep, layers=route.layers, drop_at=drop_at)
    with torch.no_grad():
        ours = case.model(**inputs, route=route, use_cache=False).logits
    for row, (places, wanted) in enumerate(left(case, inputs, route, drop_at)):
        assert close(ours[row][places], wanted)
    answer = generated(case, inputs, route=route)
    steps = len(answer.logits)
    grown = Route(keep=torch.nn.functional.pad(route.keep, (0, steps), value=True), layers=route.layers)
    for row, (_, wanted) in enumerate(left(case, with_answer(inputs, answer.sequences), grown, drop_at)):
        assert close(torch.stack([step[row] for step in answer.logits]), wanted[-steps - 1 : -1])


def test_log_n_attention_under_a_route(case):
    """Queries behind the trained length of 256 have their own factor, whatever left."""
    case = case("qwen")
    inputs = case.prompts([0])
    route = case.random_route(inputs)
    route = Route(keep=route.keep, layers=route.layers, drop_at=2)
    new = 260 - inputs["input_ids"].shape[1]
    answer = generated(case, inputs, route=route, max_new_tokens=new, min_new_tokens=new)
    grown = Route(keep=torch.nn.functional.pad(route.keep, (0, new), value=True), layers=route.layers)
    ((_, wanted),) = left(case, with_answer(inputs, answer.sequences), grown, 2)
    assert answer.sequences.shape[1] == 260 and close(torch.cat(answer.logits), wanted[-new - 1 : -1])


@pytest.mark.parametrize("family", PLAIN)
def test_the_router_keeps_its_budget(family, case):
    case = case(family)
    inputs = case.prompts(images=IMAGES)
    with torch.no_grad():
        output = case.model(**inputs, keep_visual_tokens=0.5, keep_layers=3, use_cache=False)
    kept = (output.route.keep & case.visual(inputs)).sum(1)
    assert kept.tolist() == [round(0.5 * PLAIN[family].tokens * IMAGES[row]) for row in range(3)]
    assert output.route.layers.sum(1).tolist() == [3, 3, 4]
    for row, (places, wanted) in enumerate(left(case, inputs, output.route, 2)):
        assert close(output.logits[row][places], wanted)


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("family", PLAIN)
def test_a_later_turn_is_the_whole_conversation_routed_afresh(family, pictures, case):
    """A further question, with another picture or without one, brings back what left for the first."""
    case = case(family)
    first = case.prompts(images={0: 1, 1: 1, 2: 1})
    turn = case.prompts(images=dict.fromkeys(range(3), pictures))
    answer = generated(case, first, **BUDGET, reversible=True)
    said = answer.sequences[:, first["input_ids"].shape[1] :]
    new = torch.cat([said, turn["input_ids"]], 1)
    seen = torch.cat([torch.ones_like(said), turn["attention_mask"]], 1).bool()
    whole = extend(first, new, seen, family)
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    if pictures:
        pairs = zip(first["pixel_values"], turn["pixel_values"], strict=True)
        whole["pixel_values"] = torch.stack([pixels for pair in pairs for pixels in pair])
        text["pixel_values"] = turn["pixel_values"]
    again = generated(case, text, **LATER, past_key_values=cache_of(answer), reversible=True)
    fresh = generated(case, whole, **LATER)
    assert close(torch.stack(again.logits), torch.stack(fresh.logits))
    assert torch.equal(again.route.keep, fresh.route.keep) and not bool(again.route.keep.all())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.clean_process
@pytest.mark.parametrize("family", ["qwen", pytest.param("mplug_owl2", marks=pytest.mark.long_tail)])
def test_route_writes_a_folder_that_runs_by_its_own_files(family, made, questions, tmp_path):
    """Run in a process without this package: plain, which is its routed class without a budget, and routed."""
    out = tmp_path / "routed"
    settings = RouterRecipe(steps=2, batch_size=4)
    data = CalibrationData(str(questions), samples=8, answer_tokens=4)
    routed = route(made(family), dataclasses.replace(settings, calibration=data), out)
    checked = verify(out)
    assert checked.holds and checked.details["class"] == checked.details["routed"]["class"]
    assert checked.details["class"].startswith("Routed") and read_record(routed).router is not None
    assert OWN_TYPES[family].routed_module in (out / "README.md").read_text()


@pytest.mark.parametrize("family", PLAIN)
def test_the_folder_names_its_own_classes(family, case, tmp_path, questions, monkeypatch):
    monkeypatch.setattr("exporter.pipeline.require", not_verified)
    case, ours = case(family), OWN_TYPES[family]
    config = json.loads((case.folder / "config.json").read_text())
    assert config["auto_map"] == ours.routed_auto_map and config["model_type"] == family
    names = {f"{module}.py" for module in (ours.routed_module, ours.module, *ours.siblings, "modeling_routed")}
    assert names <= {path.name for path in case.folder.iterdir()}
    case.model.save_pretrained(tmp_path / "saved")
    assert names <= {path.name for path in (tmp_path / "saved").iterdir()}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == ours.routed_auto_map
    old = copied(case.folder, tmp_path / "old", without=("compression.json", f"{ours.module}.py"))
    assert update_modeling_files(old) == [f"{ours.module}.py"] and update_modeling_files(old) == []
    small = compress(recipe(case.folder, questions, budget=LayerBudget(layers=(3,))), tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    assert config["auto_map"] == ours.auto_map and "router" not in config
    assert not (small / f"{ours.routed_module}.py").exists() and (small / f"{ours.module}.py").exists()
    assert AutoConfig.from_pretrained(small).num_hidden_layers == 3


@pytest.mark.clean_process
@pytest.mark.parametrize("family", PLAIN)
def test_what_they_are_not_made_for_is_refused(family, made, clips):
    """The reason is the type's, whatever a trial of its code would come to in this process."""
    folder = made(family)
    source = open_source(str(folder))
    with pytest.raises(InputError, match="it runs by a modeling file of this package, for which no graphs are written"):
        prepare(str(folder), ExportOptions())
    with pytest.raises(InputError, match="takes no video: give its frames as several images"):
        make_batch(read_samples(str(clips))[:1], load_processor(folder), source.config)
