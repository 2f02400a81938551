"""The shipped routed model: what runs is what the route says, in every family, and nothing else changes.

Legend: B rows, S tokens, L layers, K tokens that stay.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.checkpoints import ROUTED
from fixtures.routed import CLOSE, NEW, Case, copied, generated, hf_home, routed_class, routed_logits, seen_by_router
from safetensors import safe_open
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from exporter import families
from exporter.clean_room import extend
from exporter.errors import InputError
from exporter.modeling import modeling_routed
from exporter.modeling.modeling_routed import ROUTER_FILE
from exporter.modeling.routed_api import logger
from exporter.modeling.routed_places import any_resolution_shape, guessed_shape
from exporter.modeling.routed_route import Budget, Route, RouterSettings
from exporter.modeling.routed_router import Router
from exporter.modeling.routed_types import PLACEHOLDERS, class_name, text_model_of
from exporter.models.loading import text_decoder
from exporter.models.replay import logits, trace
from exporter.routing.settings import check_routable, default_settings

# --- tiny routed checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(params=ROUTED)
def case(request, routed):
    return routed(request.param)


@pytest.fixture(params=[0, 2], ids=["drop_at_0", "drop_at_2"])
def dropping(request, routed):
    """routed with the drop layer chosen."""
    return lambda family: routed(family, request.param)


@pytest.fixture
def llava(routed):
    return routed("llava")


# --- an implementation of our own: stock layers one by one, on what is left of one row --------------------------------


def reference(
    case: Case, inputs: dict[str, torch.Tensor], keep: torch.Tensor, layers: torch.Tensor, drop_at: int | None = None
) -> torch.Tensor:
    """Logits [1, K, vocabulary] of one row without padding: keep [S], layers [L]."""
    drop_at = case.drop_at if drop_at is None else drop_at
    given = trace(case.plain, SimpleNamespace(inputs=inputs))
    stays = keep.nonzero()[:, 0]
    state = given.entry
    for layer_idx, layer in enumerate(text_decoder(case.plain).layers):
        dropped = layer_idx >= drop_at
        state = state[:, stays] if layer_idx == drop_at else state
        if layers[layer_idx]:
            keywords = given.keywords[layer_idx]
            with torch.no_grad():
                state = layer(state, **(narrowed(keywords, stays) if dropped else keywords))
        if layer_idx in given.added:
            state = state + (given.added[layer_idx][:, stays] if dropped else given.added[layer_idx])
    return logits(case.plain, state)


def narrowed(keywords: dict[str, Any], stays: torch.Tensor) -> dict[str, Any]:
    mask = keywords["attention_mask"]
    return {
        **keywords,
        "attention_mask": None if mask is None else mask[:, :, stays][..., stays],
        "position_embeddings": tuple(part[..., stays, :] for part in keywords["position_embeddings"]),
        "position_ids": None,
    }


# --- exactness, in every family ---------------------------------------------------------------------------------------


def test_off_is_the_plain_model(case):
    batch = case.prompts()
    with torch.no_grad():
        expected = case.plain(**batch).logits
        assert torch.equal(case.model(**batch, preset="off").logits, expected)
    answer = case.plain.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(case.model.generate(**batch, max_new_tokens=NEW, preset="off"), answer)


@pytest.mark.parametrize("family", ROUTED)
def test_logits_are_those_of_stock_layers_on_what_is_left(family, dropping):
    case = dropping(family)
    for row in (0, 1):
        batch = case.prompts([row])
        route = case.random_route(batch, seed=row)
        expected = reference(case, batch, route.keep[0], route.layers[0])
        found = routed_logits(case, batch, route=route)[:, route.keep[0]]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", ROUTED)
def test_cached_is_uncached_under_one_route(family, dropping):
    case = dropping(family)
    batch = case.prompts()
    length = batch["input_ids"].shape[1]
    route = case.random_route(batch)
    made = generated(case, batch, route=route)
    answer = made.sequences[:, length:]
    whole = extend(batch, answer, torch.ones_like(answer, dtype=torch.bool), case.family)
    expected = routed_logits(case, whole, route=route)[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), expected, **CLOSE)
    check_cache(case, batch, route, made.past_key_values)


@pytest.mark.parametrize("family", ROUTED)
def test_a_route_may_drop_before_another_layer_than_the_router(family, routed):
    case = routed(family)
    batch = case.prompts([0])
    route = replace(case.random_route(batch), drop_at=2)
    expected = reference(case, batch, route.keep[0], route.layers[0], drop_at=2)
    torch.testing.assert_close(routed_logits(case, batch, route=route)[:, route.keep[0]], expected, **CLOSE)
    batch = case.prompts()
    route = replace(case.random_route(batch), drop_at=2)
    made = generated(case, batch, route=route)
    assert made.route.drop_at == 2
    answer = made.sequences[:, batch["input_ids"].shape[1] :]
    whole = extend(batch, answer, torch.ones_like(answer, dtype=torch.bool), case.family)
    expected = routed_logits(case, whole, route=route)[:, -NEW - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), expected, **CLOSE)
    check_cache(case, batch, route, made.past_key_values)


def test_all_turns_drop_before_the_same_layer(routed):
    case = routed("llava", drop_at=2)
    batch = case.prompts()
    cache = generated(case, batch, route=replace(case.random_route(batch), drop_at=0)).past_key_values
    second = case.prompts([3, 4, 5])
    mask = torch.ones(3, cache.get_seq_length() + second["input_ids"].shape[1])
    turn = {**second, "attention_mask": mask, "past_key_values": cache}
    with pytest.raises(ValueError, match="left before layer 0, the router reads at layer 2"):
        case.model(**turn, keep_visual_tokens=4)
    with pytest.raises(ValueError, match="the route given drops at layer 3, the one of the cache at 0"):
        case.model(**turn, route=Route(drop_at=3, keep=torch.ones_like(second["input_ids"])))


def check_cache(case: Case, batch: dict[str, torch.Tensor], route: Route, cache: Any) -> None:
    """The cache's lengths are those of the text; its entries are those of the route, in rows and tokens."""
    drop_at = case.drop_at if route.drop_at is None else route.drop_at
    num_tokens = batch["input_ids"].shape[1]
    assert cache.get_seq_length() == num_tokens + NEW - 1
    longest = int((route.keep & batch["attention_mask"].bool()).sum(1).max())
    for layer_idx, layer in enumerate(cache.layers):
        num_rows = int(route.layers[:, layer_idx].sum())
        if num_rows == 0:
            assert not layer.is_initialized
            continue
        entries = (longest if layer_idx >= drop_at else num_tokens) + NEW - 1
        assert layer.keys.shape[0] == layer.values.shape[0] == num_rows
        if window := cache.windows[layer_idx]:
            assert layer.keys.shape[2] <= min(entries, window - 1)
        else:
            assert layer.keys.shape[2] == layer.values.shape[2] == entries


def test_batch_is_its_rows(case):
    budget = {"keep_visual_tokens": 6, "keep_layers": case.num_layers - 1}
    together = generated(case, case.prompts(), **budget)
    for row in range(3):
        alone = generated(case, case.prompts([row]), **budget)
        assert alone.route.kept_tokens()[0].tolist() == together.route.kept_tokens()[row].tolist()
        assert alone.route.executed_layers()[0] == together.route.executed_layers()[row]
        for step, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], expected[0], **CLOSE)


def test_generate_shows_the_router_what_forward_does(case):
    """Of images of any shape too, whose grids `generate` takes away; beams and steps without a cache included."""
    batch = case.prompts()
    budget = {"keep_visual_tokens": 5, "keep_layers": case.num_layers - 1}
    expected = case.model.route(**batch, **budget)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        if case.family != "qwen2_5_vl" and options:
            continue
        with torch.no_grad(), seen_by_router(case.model) as seen:
            generated(case, batch, **budget, **options)
        for _, visual, _, places in seen:
            repeats, length = len(visual) // 3, batch["input_ids"].shape[1]
            torch.testing.assert_close(places[:, :length], expected.coordinates.repeat_interleave(repeats, 0))
        assert len(seen) == (NEW if "use_cache" in options else 1)


def test_left_padding_is_right_padding(case):
    left, right = (case.prompts(side=side) for side in ("left", "right"))
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    budget = {"keep_visual_tokens": 0.3, "keep_layers": case.num_layers - 2}
    found = []
    for batch in (left, right):
        route = case.model.route(**batch, **budget)
        kept = route.keep & batch["attention_mask"].bool()
        found.append(routed_logits(case, batch, route=route)[kept])
    torch.testing.assert_close(*found, **CLOSE)


def test_layers_run_for_the_rows_and_tokens_that_they_are_for(case):
    batch = case.prompts()
    route = case.random_route(batch)
    rows: Counter[int] = Counter()
    tokens: dict[int, Any] = {}
    handles = []
    for layer_idx, layer in enumerate(text_decoder(case.model).layers):

        def count(module: Any, args: Any, layer_idx: int = layer_idx) -> None:
            rows[layer_idx] += args[0].shape[0]
            tokens.setdefault(layer_idx, args[0].shape[1])

        handles.append(layer.mlp.register_forward_pre_hook(count))
    try:
        generated(case, batch, route=route)
    finally:
        for handle in handles:
            handle.remove()
    longest = int((route.keep & batch["attention_mask"].bool()).sum(1).max())
    for layer_idx in range(case.num_layers):
        assert rows[layer_idx] == NEW * int(route.layers[:, layer_idx].sum())
        assert layer_idx not in tokens or tokens[layer_idx] == longest


def test_names_on_the_hub_are_kept(case, tiny, tmp_path):
    case.model.save_pretrained(tmp_path / "saved")
    names = [
        set(safe_open(path / "model.safetensors", "pt").keys()) for path in (tiny(case.family), tmp_path / "saved")
    ]
    assert names[0] == names[1]
    again, report = routed_class(case.family).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    for (name, tensor), expected in zip(again.state_dict().items(), case.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


# --- batches and turns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3"])
def test_rows_may_have_any_number_of_images(family, routed):
    case = routed(family)
    counts = {0: 0, 1: 1, 2: 3}
    together = generated(case, case.prompts(images=counts), keep_visual_tokens=0.5, keep_layers=case.num_layers - 2)
    assert together.route.executed_layers()[0] == list(range(case.num_layers))  # no image: all of the model
    for row in range(3):
        inputs = case.prompts([row], images=counts)
        alone = generated(case, inputs, keep_visual_tokens=0.5, keep_layers=case.num_layers - 2)
        for step, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], expected[0], **CLOSE)


def test_text_alone_runs_plain(llava):
    batch = llava.prompts(images={0: 0, 1: 0, 2: 0})
    with torch.no_grad():
        expected = llava.plain(**batch).logits
    assert torch.equal(llava.model(**batch, preset="fast").logits, expected)
    made = generated(llava, batch, preset="fast")
    assert type(made.past_key_values) is DynamicCache and made.route is None
    assert llava.model.route(**batch, preset="fast").layers.all()


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_later_turns_keep_the_layers_and_choose_among_their_own_tokens(family, dropping):
    case = dropping(family)
    first, second = case.prompts(), case.prompts([3, 4, 5])
    route = case.random_route(first)
    made = generated(case, first, route=route)
    answer = made.sequences[:, first["input_ids"].shape[1] :]
    cache = made.past_key_values
    said = extend(first, answer, torch.ones_like(answer, dtype=torch.bool), family)
    whole = {name: torch.cat([said[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    start = cache.get_seq_length()  # the last token of the answer was not run yet
    budget = {"keep_visual_tokens": 0.4, "keep_layers": case.num_layers}
    images = {name: value for name, value in second.items() if name not in whole}
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` counts
    new = {name: value[:, start:] for name, value in whole.items()} | images
    new["attention_mask"] = whole["attention_mask"]
    with torch.no_grad():
        turn = case.model(**new, past_key_values=cache, **budget)
    assert cache.route.layers is made.route.layers
    assert torch.equal(turn.route.layers, route.layers)
    assert not turn.route.keep.all() and cache.get_seq_length() == whole["input_ids"].shape[1]
    # The same conversation in one pass.
    images = {name: torch.cat([first[name], value]) for name, value in images.items()}
    order = [0, 3, 1, 4, 2, 5]  # of the images: row by row
    images = {name: value.unflatten(0, (6, -1))[order].flatten(0, 1) for name, value in images.items()}
    kept = torch.cat([route.keep, torch.ones_like(answer[:, :-1], dtype=torch.bool), turn.route.keep], 1)
    expected = routed_logits(case, {**whole, **images}, route=Route(kept, route.layers))[:, start:]
    seen = turn.route.keep & new["attention_mask"][:, start:].bool()
    torch.testing.assert_close(turn.logits[seen], expected[seen], **CLOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_second_question_goes_on_with_the_route(family, dropping):
    case = dropping(family)
    first = case.prompts()
    route = case.random_route(first)
    made = generated(case, first, route=route)
    answer = made.sequences[:, first["input_ids"].shape[1] :]
    question = torch.randint(100, 160, (3, 4), generator=torch.Generator().manual_seed(0))
    new = torch.cat([answer, question], 1)
    whole = extend(first, new, torch.ones_like(new, dtype=torch.bool), family)
    text = {name: whole[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in whole}
    again = generated(case, text, past_key_values=made.past_key_values)
    assert again.route is made.route
    said = again.sequences[:, whole["input_ids"].shape[1] :]
    everything = extend(whole, said, torch.ones_like(said, dtype=torch.bool), family)
    expected = routed_logits(case, everything, route=route)[:, whole["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(again.logits, 1), expected, **CLOSE)


def test_a_cache_filled_without_a_route_can_get_one(llava):
    text = llava.prompts([0, 1], images={0: 0, 1: 0})
    made = generated(llava, text, preset="fast")
    assert type(made.past_key_values) is DynamicCache
    answer = made.sequences[:, text["input_ids"].shape[1] :]
    said = extend(text, answer, torch.ones_like(answer, dtype=torch.bool), "llava")
    second = llava.prompts([3, 4])
    whole = {name: torch.cat([said[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    start = made.past_key_values.get_seq_length()
    new = {**second, "input_ids": whole["input_ids"][:, start:], "attention_mask": whole["attention_mask"]}
    with torch.no_grad():
        turn = llava.model(**new, past_key_values=made.past_key_values, keep_visual_tokens=7, keep_layers=4)
        after = llava.model(input_ids=torch.full((2, 1), 7), past_key_values=made.past_key_values)
    assert [len(kept) for kept in turn.route.kept_tokens()] == [7, 7]
    assert after.logits.isfinite().all()


# --- ways to generate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_static_cache_is_the_dynamic_one(family, dropping):
    case = dropping(family)
    batch = case.prompts()
    route = case.random_route(batch)
    dynamic = generated(case, batch, route=route)
    static = generated(case, batch, route=route, cache_implementation="static")
    assert isinstance(static.past_key_values, StaticCache)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **CLOSE)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_without_a_cache_each_step_has_the_same_route(family, dropping):
    case = dropping(family)
    batch = case.prompts()
    budget = {"keep_visual_tokens": 5, "keep_layers": case.num_layers - 2}
    cached = generated(case, batch, **budget)
    uncached = generated(case, batch, **budget, use_cache=False)
    torch.testing.assert_close(torch.stack(uncached.logits), torch.stack(cached.logits), **CLOSE)


def test_beams_reorder_the_route(llava):
    """Every beam's scores are those of its own text, run alone without a cache."""
    batch = llava.prompts()
    length = batch["input_ids"].shape[1]
    route = llava.random_route(batch)
    made = generated(llava, batch, route=route, num_beams=3, num_return_sequences=2, output_scores=True)
    answer = made.sequences[:, length:]
    rows = torch.arange(3).repeat_interleave(2)
    repeated = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    whole = extend(repeated, answer, torch.ones_like(answer, dtype=torch.bool), "llava")
    log_p = routed_logits(llava, whole, route=route.select(rows))[:, length - 1 : -1].log_softmax(-1)
    expected = log_p.gather(-1, answer[..., None])[..., 0].sum(1) / NEW
    torch.testing.assert_close(made.sequences_scores, expected, **CLOSE)


def test_several_samples_of_a_row_share_its_route(llava):
    batch = llava.prompts()
    made = generated(llava, batch, keep_visual_tokens=4, keep_layers=4, do_sample=True, num_return_sequences=2)
    one = generated(llava, batch, keep_visual_tokens=4, keep_layers=4)
    assert torch.equal(made.route.layers, one.route.layers.repeat_interleave(2, 0))
    assert torch.equal(made.route.keep, one.route.keep.repeat_interleave(2, 0))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_assistant_model_says_the_same(family, dropping):
    case = dropping(family)
    batch = case.prompts([2])
    options = {"keep_visual_tokens": 5, "keep_layers": case.num_layers - 2}
    expected = generated(case, batch, **options)
    found = generated(case, batch, assistant_model=case.model, num_assistant_tokens=2, **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_chunked_prefill_is_refused(llava):
    with pytest.raises(ValueError, match="prefill_chunk_size would choose the route by the first chunk"):
        llava.model.generate(**llava.prompts(), keep_visual_tokens=4, prefill_chunk_size=8)


def test_other_caches_are_refused(llava):
    other = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match="EncoderDecoderCache cannot hold a route"):
        llava.model(**llava.prompts(), past_key_values=other, keep_visual_tokens=4)


def test_embeddings_in_place_of_tokens_need_the_visual_mask(llava):
    batch = llava.prompts()
    embeddings = llava.plain.get_input_embeddings()(batch["input_ids"]).detach()
    images = llava.plain.get_image_features(batch["pixel_values"]).pooler_output
    visual = llava.visual(batch)
    embeddings[visual] = torch.cat(list(images)).detach()
    given = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    with pytest.raises(ValueError, match="inputs_embeds alone do not tell which tokens are visual"):
        llava.model(**given, keep_visual_tokens=4)
    found = routed_logits(llava, given, visual_mask=visual, keep_visual_tokens=4)
    torch.testing.assert_close(found, routed_logits(llava, batch, keep_visual_tokens=4), **CLOSE)
    made = generated(llava, given, visual_mask=visual, keep_visual_tokens=4)
    assert torch.equal(made.sequences[:, -NEW:], generated(llava, batch, keep_visual_tokens=4).sequences[:, -NEW:])


# --- dtype, attention, devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_eager_is_sdpa(family, dropping):
    case = dropping(family)
    batch = case.prompts()
    route = case.random_route(batch)
    eager = routed_class(family).from_pretrained(case.folder, attn_implementation="eager")
    made = eager.generate(**batch, route=route, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    expected = generated(case, batch, route=route)
    torch.testing.assert_close(torch.stack(made.logits), torch.stack(expected.logits), **CLOSE)


def test_two_dimensional_masks_are_narrowed_too(dropping):
    """Flash attention's kind of mask, through a slow attention that reads it the same way."""
    case = dropping("llava")
    AttentionInterface.register("flash_attention_slow", slow_flash)
    AttentionMaskInterface.register("flash_attention_slow", flash_attention_mask)
    batch = case.prompts()
    route = case.random_route(batch)
    flash = routed_class("llava").from_pretrained(case.folder)
    text_decoder(flash).config._attn_implementation = "flash_attention_slow"
    made = flash.generate(**batch, route=route, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    expected = generated(case, batch, route=route)
    torch.testing.assert_close(torch.stack(made.logits), torch.stack(expected.logits), **CLOSE)


def slow_flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any) -> Any:
    """Causal by the order of entries, aligned at the end; attention_mask [B, entries] is True where there is one."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    queries, entries = query.shape[2], key.shape[2]
    seen = torch.ones(queries, entries, dtype=torch.bool).tril(entries - queries)
    if attention_mask is not None:
        assert attention_mask.shape == (len(key), entries)
        seen = seen & attention_mask[:, None, None, :].bool()
    x = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return x.transpose(1, 2), None


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_bfloat16(family, routed):
    case = routed(family)
    batch = case.prompts()
    model = routed_class(case.family).from_pretrained(case.folder, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.router.parameters())
    route = case.random_route(batch)
    with torch.no_grad():
        found = model(**batch, route=route, logits_to_keep=1).logits.float()
        model.generate(**batch, keep_visual_tokens=5, keep_layers=case.num_layers - 1, max_new_tokens=2)
        whole = model(**batch, preset="off", logits_to_keep=1).logits.float()
        exact = case.model(**batch, preset="off", logits_to_keep=1).logits
    rounding = (whole - exact).abs().max()  # what bfloat16 costs the plain model
    expected = routed_logits(case, batch, route=route)[:, -1:]
    assert (found - expected).abs().max() < 4 * rounding


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_placed_and_offloaded_layers(place, llava, tmp_path):
    layers = {f"model.language_model.layers.{i}": "disk" if i > 2 else "cpu" for i in range(llava.num_layers)}
    others: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    others += tuple(f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb"))
    device_map = "auto" if place == "auto" else {**layers, **dict.fromkeys(others, "cpu")}
    model = routed_class("llava").from_pretrained(llava.folder, device_map=device_map, offload_folder=tmp_path)
    batch = llava.prompts()
    budget = {"keep_visual_tokens": 5, "keep_layers": 4}
    found = model.generate(**batch, max_new_tokens=NEW, **budget)
    assert torch.equal(found, generated(llava, batch, **budget).sequences)
    model.save_pretrained(tmp_path / "saved")
    names = [set(safe_open(folder / "model.safetensors", "pt").keys()) for folder in (llava.folder, tmp_path / "saved")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_dense_parts_can_be_compiled(llava):
    model = routed_class("llava").from_pretrained(llava.folder)
    for layer in text_decoder(model).layers:
        layer.mlp.compile(backend="aot_eager", dynamic=True)
    batch = llava.prompts()
    budget = {"keep_visual_tokens": 5, "keep_layers": 4, "max_new_tokens": 3}
    assert torch.equal(model.generate(**batch, **budget), llava.model.generate(**batch, **budget))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(checkpointing, dropping):
    case = dropping("llava")
    batch = case.prompts()
    route = case.random_route(batch)
    labels = batch["input_ids"].masked_fill(~batch["attention_mask"].bool() | case.visual(batch), -100)
    expected = routed_logits(case, batch, route=route)
    model = routed_class("llava").from_pretrained(case.folder).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()  # newer releases call it by the first name
    output = model(**batch, labels=labels, route=route)
    predicts = route.keep[:, :-1] & (labels[:, 1:] != -100)  # a label after a dropped token cannot be predicted
    loss = torch.nn.functional.cross_entropy(expected[:, :-1][predicts], labels[:, 1:][predicts])
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    output.loss.backward()
    for layer_idx, layer in enumerate(text_decoder(model).layers):
        found = layer.mlp.down_proj.weight.grad
        assert (found is not None and found.abs().sum() > 0) == bool(route.layers[:, layer_idx].any())
    assert all(parameter.grad is None for parameter in model.router.parameters())


def test_answers_are_hidden_from_the_router(llava):
    batch = llava.prompts([0])
    answers = torch.tensor([[9, 10, 11], [12, 13, 14]])
    whole = [extend(batch, a[None], torch.ones_like(a[None], dtype=torch.bool), "llava") for a in answers]
    budget = {"keep_visual_tokens": 5, "keep_layers": 4}
    expected = llava.model.route(**batch, **budget)
    for inputs in whole:
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -3:] = inputs["input_ids"][:, -3:]
        for hidden in ({"labels": labels}, {"prompt_length": batch["input_ids"].shape[1]}):
            route = llava.model.route(**inputs, **hidden, **budget)
            torch.testing.assert_close(route.token_logits[:, :-3], expected.token_logits, **CLOSE)
            torch.testing.assert_close(route.layer_logits, expected.layer_logits, **CLOSE)


@pytest.mark.parametrize("family", ROUTED)
def test_router_can_be_trained_on_what_it_sees(family, routed):
    case = routed(family, drop_at=2)
    batch = case.prompts()
    inputs = case.model.router_inputs(**batch)
    tokens, layers = case.model.router(*inputs)
    assert tokens.shape == batch["input_ids"].shape and layers.shape == (3, case.num_layers // 2)
    assert torch.equal(inputs.visual, case.visual(batch))
    (tokens[inputs.visual].sum() + layers.sum()).backward()
    gradients = [parameter.grad for parameter in case.model.router.parameters()]
    case.model.router.zero_grad()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    # It reads what enters the drop layer.
    given = trace(case.plain, SimpleNamespace(inputs=batch))
    state = given.entry
    for layer_idx in range(case.drop_at):
        with torch.no_grad():
            output = given.step(text_decoder(case.plain).layers[layer_idx], layer_idx, state)
        state = given.after(layer_idx, output)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(inputs.states[real], state[real], **CLOSE)


def test_router_is_small():
    settings = {"drop_at": 0, "candidates": tuple(range(16, 32)), "bottleneck": 1024, "num_heads": 16}
    with torch.device("meta"):
        router = Router(4096, RouterSettings(**settings))
    parameters = sum(p.numel() for p in router.parameters())
    layer = 4 * 4096**2 + 3 * 4096 * 11008  # of LLaVA 7B
    tokens = 576 + 64
    attention = 2 * tokens * 1024  # multiply-adds a token
    assert parameters <= 40e6
    assert parameters + attention <= 0.01 * 32 * (layer + 2 * tokens * 4096)


def test_places_of_visual_tokens(routed):
    """A square image, an image of any shape, rows of patches."""
    case = routed("llava")
    places = case.model.route(**case.prompts([0])).kept_coordinates()[0]
    assert places.shape == (25, 3)
    assert torch.allclose(places[7], torch.tensor([0, 0.3, 0.5]))
    for family in ("qwen2_5_vl", "mistral3"):
        case = routed(family)
        batch = case.prompts([1])  # twice as wide as high
        places = case.model.route(**batch).kept_coordinates()[0]
        rows, columns = (len(places[:, i].unique()) for i in (1, 2))
        assert rows < columns and rows * columns == len(places)
        assert torch.equal(places[:columns, 1], places[:1, 1].expand(columns))


@pytest.mark.parametrize(("family", "limit"), [("llava_next", None), ("llava_onevision", 9), ("llava_onevision", 1)])
@pytest.mark.parametrize("size", [(48, 48), (30, 64), (64, 31), (20, 57)])  # height, width
def test_places_in_images_of_any_resolution(family, limit, size, routed):
    """By the model's own packing: it is given places in the padded grid where it expects features."""
    model, side = routed(family).model, 3
    config = copy.deepcopy(model.config)
    options = {"vision_feature_select_strategy": "full"}
    if limit is not None:
        config.vision_aspect_ratio = f"anyres_max_{limit}"
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    down, across = (n * side for n in get_anyres_image_grid_shape(size, config.image_grid_pinpoints, 24))
    grid = torch.stack(torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"), -1).double()
    tiles = grid.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).reshape(-1, side * side, 2)
    features = torch.cat([tiles[:1], tiles])
    line_end = torch.full((2,), -1.0, dtype=torch.double)
    packed = model.model.pack_image_features([features], [size], image_newline=line_end, **options)[0][0]
    shape = any_resolution_shape(config, size)
    assert shape.length == len(packed)
    places, finer = (part[side * side :] for part in (shape.coordinates(len(packed)).double(), packed))
    ends = finer[:, 0] == -1
    assert (places[ends, 1] == 1).all()
    assert limit == 1 or torch.equal(places[ends, 0], places[:, 0].unique())
    low, high = finer[~ends].amin(0), finer[~ends].amax(0)
    expected = (finer[~ends] - low + 0.5) / (high - low + 1)  # where tokens are merged, middles lie further in
    torch.testing.assert_close(places[~ends], expected, atol=0.25 if limit == 1 else 1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_places_are_known_for_any_number_of_images(family, routed):
    case = routed(family)
    for counts in ({0: 1, 1: 2}, {0: 1, 1: 1}):
        batch = case.prompts([0, 1], images=counts)
        places, visual = case.model.route(**batch, keep_layers=6).coordinates, case.visual(batch)
        for row, count in counts.items():
            assert places[row][visual[row], 0].unique().tolist() == list(range(count))
        first = places[1][visual[1]]  # 64 x 32
        assert torch.equal(first[4, 1:], torch.tensor([0.5, 0.5])) and (first[9:, 2] == 1).any()


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_budgets_are_kept_row_by_row(llava):
    batch = llava.prompts(images={0: 1, 1: 2, 2: 1})
    counts = llava.visual(batch).sum(1).tolist()
    assert counts == [25, 50, 25]
    kept = [len(tokens) for tokens in llava.model.route(**batch, keep_visual_tokens=40).kept_tokens()]
    assert kept == [25, 40, 25]
    kept = [len(tokens) for tokens in llava.model.route(**batch, keep_visual_tokens=0.5).kept_tokens()]
    assert kept == [12, 25, 12]
    layers = llava.model.route(**batch, keep_layers=4).executed_layers()
    assert [len(row) for row in layers] == [4, 4, 4] and all(row[:3] == [0, 1, 2] for row in layers)


def test_set_budget_and_presets(llava):
    batch = llava.prompts()
    model = llava.model
    try:
        model.set_budget("fast")
        assert torch.equal(model(**batch).route.keep, model.route(**batch, preset="fast").keep)
        model.set_budget(keep_visual_tokens=3)
        assert [len(tokens) for tokens in model(**batch).route.kept_tokens()] == [3, 3, 3]
        assert len(model(**batch, keep_visual_tokens=4).route.kept_tokens()[0]) == 4  # a call's own goes first
        assert not hasattr(model(**batch, preset="off"), "route")
    finally:
        model.set_budget("off")
    assert model.budget == Budget()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"keep_visual_tokens": 0}, "keep_visual_tokens=0 keeps nothing"),
        ({"keep_visual_tokens": -3}, "keep_visual_tokens=-3 keeps nothing"),
        ({"keep_visual_tokens": 1.5}, "keep_visual_tokens=1.5 is no share"),
        ({"keep_visual_tokens": "half"}, "'half' is neither a count"),
        ({"keep_visual_tokens": True}, "True is neither a count"),
        ({"keep_layers": 7}, "keep_layers=7 is out of range: of the 6 layers 3 may be skipped, .* from 3 to 6"),
        ({"keep_layers": 2}, "keep_layers=2 is out of range"),
        ({"keep_layers": 4.0}, "keep_layers=4.0 is out of range"),
        ({"preset": "turbo"}, "preset 'turbo' is not known: this model has off, quality, balanced, fast"),
        ({"preset": "fast", "keep_layers": 4}, "give either preset='fast' or keep_visual_tokens and keep_layers"),
        ({"route": Route(keep=torch.ones(3, 400))}, "the route given is for 400 tokens"),
        ({"route": Route(layers=torch.ones(3, 5))}, "the route given is for 5 layers, there are 6"),
        ({"route": Route(layers=torch.ones(2, 6))}, "the route given is for 2 sequences, the batch has 3"),
        ({"route": Route(keep=torch.zeros(3, 5))}, "the route given drops text"),
        ({"route": Route(layers=torch.ones(3, 6), drop_at=7)}, "drops at layer 7: give a number from 0 to 6"),
    ],
)
def test_bad_budgets(llava, budget, message):
    with pytest.raises(ValueError, match=message):
        llava.model.generate(**llava.prompts(), **budget)


def test_a_budget_above_the_tokens_keeps_all_and_says_so(llava, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    assert llava.model.route(**llava.prompts(), keep_visual_tokens=5000).keep.all()
    assert said == ["keep_visual_tokens=5000 is above the 25 visual tokens there are: all are kept."]


def test_misspelt_arguments_are_refused_by_generate(llava):
    with pytest.raises(ValueError, match="keep_visual_token"):
        llava.model.generate(**llava.prompts(), keep_visual_token=4)


# --- folders ----------------------------------------------------------------------------------------------------------

CLEAN = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "exporter":
            raise ImportError("the clean process must not import exporter")

sys.meta_path.insert(0, Blocked())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
folder, inputs = sys.argv[1], torch.load(sys.argv[2])
load = AutoModelForImageTextToText.from_pretrained
said = {}
for name, trusted in (("plain", None), ("routed", True), ("plain again", False)):
    model = load(folder, trust_remote_code=trusted)
    options = {"keep_visual_tokens": 5, "keep_layers": 4} if trusted else {}
    said[name] = [type(model).__name__, model.generate(**inputs, max_new_tokens=5, **options).tolist()]
    if trusted:
        model.save_pretrained(sys.argv[3])
        again = load(sys.argv[3], trust_remote_code=True)
        said["saved"] = [type(again).__name__, again.generate(**inputs, max_new_tokens=5, **options).tolist()]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
options = {"keep_visual_tokens": 5, "max_new_tokens": 2}
answer = pipe(images=Image.new("RGB", (40, 40)), text="USER: <image> what is this? ASSISTANT:", generate_kwargs=options)
said["pipeline"] = [type(pipe.model).__name__, len(answer)]
print(json.dumps(said))
"""


@pytest.mark.clean_process
def test_folder_in_a_clean_process(llava, tmp_path):
    """Routed with remote code, plain without, in either order; saved again; nothing of this package."""
    batch = llava.prompts()
    torch.save(dict(batch), tmp_path / "inputs.pt")
    saved = tmp_path / "saved"
    made = subprocess.run(
        [sys.executable, "-c", CLEAN, str(llava.folder), str(tmp_path / "inputs.pt"), str(saved)],
        capture_output=True, text=True, check=False, env={**hf_home(tmp_path)},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    plain = llava.plain.generate(**batch, max_new_tokens=5).tolist()
    routed = llava.model.generate(**batch, max_new_tokens=5, keep_visual_tokens=5, keep_layers=4).tolist()
    assert said["plain"] == said["plain again"] == ["LlavaForConditionalGeneration", plain]
    assert said["pipeline"] == ["RoutedLlavaForConditionalGeneration", 1]
    assert said["routed"] == said["saved"] == ["RoutedLlavaForConditionalGeneration", routed]
    for name in ("modeling_routed.py", ROUTER_FILE):
        assert (saved / name).read_bytes() == (llava.folder / name).read_bytes()
    assert (llava.folder / "modeling_routed.py").read_bytes() == Path(modeling_routed.__file__).read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["router"] == json.loads((llava.folder / "config.json").read_text())["router"]


def test_saved_from_the_package_is_a_routed_folder(llava, tmp_path):
    llava.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForImageTextToText": "modeling_routed.RoutedLlavaForConditionalGeneration"}
    assert (tmp_path / "modeling_routed.py").exists() and (tmp_path / ROUTER_FILE).exists()


def test_missing_router_file(llava, tmp_path):
    folder = copied(llava.folder, tmp_path / "model", without=("router",))
    with pytest.raises(OSError, match=r"has no router/model.safetensors: fetch the router's folder too"):
        routed_class("llava").from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained_for": {"hidden_size": 4096}}, "trained for another base model: hidden_size 4096, here it is 64"),
        ({"bottleneck": 32}, "is not the router that config.json describes: down.weight has the shape"),
        ({"drop_at": 9}, "read_at=0 and drop_at=9 must be ordered and within the 6 layers"),
        ({"candidates": [5, 6]}, r"candidates \[5, 6\] must lie from layer read_at=0 to 5"),
        ({"read_at": 4, "drop_at": 4}, "a layer that has run cannot be skipped"),
        ({"default": "turbo"}, "the default preset 'turbo' is not among off, quality"),
        ({"temperature": 1}, "router has no setting 'temperature'"),
        ({"format": 1}, "this router is of format 1, this code runs format 2: load the folder with its own modeling"),
    ],
)
def test_a_router_for_another_model(llava, tmp_path, change, message):
    folder = copied(llava.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["router"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        routed_class("llava").from_pretrained(folder)


def test_plain_folder_has_no_router(tiny, llava, tmp_path):
    folder = copied(tiny("llava"), tmp_path / "model")
    (folder / "router").mkdir()
    (folder / ROUTER_FILE).write_bytes((llava.folder / ROUTER_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"config\.json has no entry 'router'"):
        routed_class("llava").from_pretrained(folder)


def test_a_family_that_cannot_be_routed_is_refused(llava, monkeypatch):
    row = families.FAMILIES["llava"]
    monkeypatch.setitem(families.FAMILIES, "llava", replace(row, unroutable="its layers share their cache"))
    with pytest.raises(InputError, match=r"LLaVA 1.5, Pixtral model can't have a router: its layers share"):
        check_routable(llava.plain.config)


def test_settings_that_do_not_fit_are_refused(llava):
    with pytest.raises(InputError, match="candidates=5 of 6 layers begin at layer 1, before drop_at=2"):
        default_settings(llava.plain.config, drop_at=2, candidates=5)


def test_a_head_may_wrap_the_text_model_several_times():
    layers = SimpleNamespace(layers=[1])
    wrapped = SimpleNamespace(get_decoder=lambda: SimpleNamespace(model=SimpleNamespace(decoder=layers)))
    assert text_model_of(wrapped) is layers
    with pytest.raises(ValueError, match="SimpleNamespace has no decoder layers that a route could be followed in"):
        text_model_of(SimpleNamespace(get_decoder=SimpleNamespace))


def test_a_type_without_a_tower_of_its_own_has_shapes_too():
    """Fuyu's patches are described by the configuration itself, DeepSeek-OCR's tower by none of these words."""
    assert guessed_shape(SimpleNamespace(image_size=4, patch_size=2), 8).length == 4
    assert guessed_shape(SimpleNamespace(vision_config=SimpleNamespace()), 7).length == 7


def test_every_family_has_a_class():
    for name in families.FAMILIES:
        made = getattr(modeling_routed, class_name(name))
        assert made.__name__ == class_name(name) and made.config_class.model_type == name
    assert set(PLACEHOLDERS) == {*families.IMAGE_TOKENS, "video_token_id"}
    with pytest.raises(AttributeError, match="has no attribute 'RoutedBertModel'"):
        getattr(modeling_routed, "Routed" + "BertModel")
    with pytest.raises(AttributeError, match="has no attribute 'LlavaForConditionalGeneration'"):
        getattr(modeling_routed, "LlavaForConditional" + "Generation")
