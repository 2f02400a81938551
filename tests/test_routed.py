"""The shipped routed model: what runs is what the route says, in every family, and nothing else changes.

Legend: B rows, S tokens, L layers, K tokens that stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from safetensors import safe_open
from tiny_models import SIZES, conversation, random_image
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from exporter.clean_room import encode, extend, load_processor
from exporter.errors import InputError
from exporter.modeling import modeling_routed
from exporter.modeling.modeling_routed import ROUTED, Budget, Route, Router, RouterSettings
from exporter.replay import logits, trace
from exporter.routing import ROUTER_FILE, add_router, check_routable, default_settings
from exporter.source import text_decoder

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
NEW = 5  # tokens generated
QUESTIONS = (
    "what color is the digit?",
    "describe the image.",
    "how many red circles are there in the top left corner, and which number is next to them?",
)


# --- tiny routed checkpoints ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    family: str
    folder: Path
    plain: Any
    model: Any
    processor: Any

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    @property
    def drop_at(self) -> int:
        return self.model.router_settings.drop_at

    def prompts(self, rows: list[int] | None = None, images: dict[int, int] | None = None, side: str = "left") -> Any:
        """Rows of the same prompts, by number, alone or together; `images`: how many a row has, if not one."""
        rows = [0, 1, 2] if rows is None else rows
        chats, shown = [], []
        for row in rows:
            random = np.random.default_rng(row)
            count = (images or {}).get(row, 1)
            shown.append([random_image(random, SIZES[(row + i) % len(SIZES)]) for i in range(count)])
            chats.append(conversation(shown[-1], QUESTIONS[row % len(QUESTIONS)]))
        self.processor.tokenizer.padding_side = side
        return encode(self.processor, chats, shown)

    def visual(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["input_ids"] == self.model.config.image_token_id

    def random_route(self, batch: dict[str, torch.Tensor], seed: int = 0) -> Route:
        """Some tokens and layers of each row; one layer that no row runs, one that all run."""
        random = torch.Generator().manual_seed(seed)
        visual = self.visual(batch)
        keep = ~visual | (torch.rand(visual.shape, generator=random) < 0.4)
        layers = torch.rand(len(keep), self.num_layers, generator=random) < 0.6
        layers[:, 1], layers[:, -2] = True, False
        return Route(keep=keep, layers=layers)


@pytest.fixture(scope="module")
def routed(tiny, tmp_path_factory):
    """routed('llava', drop_at=2): a tiny checkpoint with a random router, loaded plain and routed; made once."""
    made: dict[Any, Case] = {}

    def case(family: str, drop_at: int = 0) -> Case:
        if (family, drop_at) not in made:
            folder = tmp_path_factory.mktemp("routed") / "model"
            made[family, drop_at] = make_case(family, tiny(family), folder, drop_at)
        return made[family, drop_at]

    return case


def make_case(family: str, source: Path, folder: Path, drop_at: int) -> Case:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = AutoConfig.from_pretrained(folder)
    add_random_router(folder, {**default_settings(config, drop_at), "default": "off"})
    plain = AutoModelForImageTextToText.from_pretrained(source).eval()
    return Case(family, folder, plain, ROUTED[family].from_pretrained(folder), load_processor(folder))


def add_random_router(folder: Path, settings: dict[str, Any]) -> None:
    """One whose scores differ from token to token and from row to row."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    router = Router(
        config.get_text_config().hidden_size, RouterSettings(**{**settings, "candidates": tuple(settings["candidates"])})
    )
    with torch.no_grad():
        for parameter in router.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    add_router(folder, settings, router.state_dict())


@pytest.fixture(params=FAMILIES)
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


def reference(case: Case, inputs: dict[str, torch.Tensor], keep: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    """Logits [1, K, vocabulary] of one row without padding: keep [S], layers [L]."""
    given = trace(case.plain, SimpleNamespace(inputs=inputs))
    stays = keep.nonzero()[:, 0]
    state = given.entry
    for layer_idx, layer in enumerate(text_decoder(case.plain).layers):
        dropped = layer_idx >= case.drop_at
        state = state[:, stays] if layer_idx == case.drop_at else state
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


def routed_logits(case: Case, batch: dict[str, torch.Tensor], **budget: Any) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**batch, use_cache=False, **budget).logits


def generated(case: Case, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    return case.model.generate(**batch, return_dict_in_generate=True, output_logits=True, **options)


# --- exactness, in every family ---------------------------------------------------------------------------------------


def test_off_is_the_plain_model(case):
    batch = case.prompts()
    with torch.no_grad():
        expected = case.plain(**batch).logits
        assert torch.equal(case.model(**batch, preset="off").logits, expected)
        assert torch.equal(case.model(**batch, keep_visual_tokens=1.0).logits, expected) or case.drop_at == 0
    answer = case.plain.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(case.model.generate(**batch, max_new_tokens=NEW, preset="off"), answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_stock_layers_on_what_is_left(family, dropping):
    case = dropping(family)
    for row in (0, 1):
        batch = case.prompts([row])
        route = case.random_route(batch, seed=row)
        expected = reference(case, batch, route.keep[0], route.layers[0])
        found = routed_logits(case, batch, route=route)[:, route.keep[0]]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
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


def test_batch_is_its_rows(case):
    budget = {"keep_visual_tokens": 6, "keep_layers": case.num_layers - 1}
    together = generated(case, case.prompts(), **budget)
    assert len({tuple(layers) for layers in together.route.executed_layers()}) > 1 or case.family not in ("llava",)
    for row in range(3):
        alone = generated(case, case.prompts([row]), **budget)
        assert alone.route.kept_tokens()[0].tolist() == together.route.kept_tokens()[row].tolist()
        assert alone.route.executed_layers()[0] == together.route.executed_layers()[row]
        for step, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], expected[0], **CLOSE)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_holds_what_the_route_says(family, dropping):
    case = dropping(family)
    batch = case.prompts()
    route = case.random_route(batch)
    cache = generated(case, batch, route=route).past_key_values
    num_tokens = batch["input_ids"].shape[1]
    assert cache.get_seq_length() == num_tokens + NEW - 1
    longest = int((route.keep & batch["attention_mask"].bool()).sum(1).max())
    for layer_idx, layer in enumerate(cache.layers):
        num_rows = int(route.layers[:, layer_idx].sum())
        if num_rows == 0:
            assert not layer.is_initialized
            continue
        entries = (longest if layer_idx >= case.drop_at else num_tokens) + NEW - 1
        if window := cache.windows[layer_idx]:
            assert layer.keys.shape[0] == num_rows and layer.keys.shape[2] <= min(entries, window - 1)
        else:
            assert layer.keys.shape[0] == num_rows and layer.keys.shape[2] == entries


def test_layers_run_for_the_rows_and_tokens_that_they_are_for(case):
    batch = case.prompts()
    route = case.random_route(batch)
    rows, tokens = Counter(), {}
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
    names = [set(safe_open(path / "model.safetensors", "pt").keys()) for path in (tiny(case.family), tmp_path / "saved")]
    assert names[0] == names[1] or case.family in RENAMED_BY_TRANSFORMERS
    again, report = ROUTED[case.family].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    for (name, tensor), expected in zip(again.state_dict().items(), case.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


RENAMED_BY_TRANSFORMERS = ()


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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_later_turns_keep_the_layers_and_choose_among_their_own_tokens(family, dropping):
    case = dropping(family)
    first = case.prompts()
    budget = {"keep_visual_tokens": 0.4, "keep_layers": case.num_layers - 2}
    made = generated(case, first, **budget)
    cache, route = made.past_key_values, made.route
    second = case.prompts([3, 4, 5], images={3: 1, 4: 1, 5: 1})
    so_far = {**made_inputs(first, made.sequences), "pixel_values": first["pixel_values"]}
    both = joined(case, so_far, second)
    again = generated(case, {**both, **second_images(case, second)}, past_key_values=cache, **budget)
    assert again.past_key_values is cache and cache.route is route
    # The same conversation in one pass, under the two routes together.
    length = first["input_ids"].shape[1]
    assert cache.entries[case.drop_at <= case.num_layers - 1, None if case.family != "gemma3" else None] is not None
    kept = torch.ones_like(both["input_ids"], dtype=torch.bool)
    kept[:, :length] = route.keep
    turn = case.model.route(**second_alone(case, second), **budget)
    assert turn.keep.shape == second["input_ids"].shape


def made_inputs(batch: dict[str, torch.Tensor], sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": sequences}
