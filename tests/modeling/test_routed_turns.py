"""Conversations whose tokens come back: a later turn's answer is that of the whole conversation, routed afresh.

Legend: B rows, S tokens of a turn, T of the conversation.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from fixtures.checkpoints import ROUTED
from fixtures.priced import priced
from fixtures.routed import CLOSE, Case, generated, seen_by_router
from transformers import DynamicCache

from exporter.clean_room import extend
from exporter.modeling.routed_api import cache_of, logger
from exporter.modeling.routed_route import Route
from exporter.modeling.routed_turns import Aside, PassedTokens
from exporter.models.loading import text_decoder

BUDGET, LATER = {"keep_visual_tokens": 4, "keep_layers": 4}, {"keep_visual_tokens": 6, "keep_layers": 5}
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def asked(case: Case, before: dict[str, torch.Tensor], made: Any, seed: int = 0, length: int = 6) -> Any:
    """The conversation with its last answer and a further question in random words: inputs, images among them."""
    answer = made.sequences[:, before["input_ids"].shape[1] :]
    random = torch.Generator().manual_seed(seed)
    new = torch.cat([answer, torch.randint(100, 160, (len(answer), length), generator=random)], 1)
    return extend(before, new, torch.ones_like(new, dtype=torch.bool), case.family)


def text_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in OF_TEXT if name in inputs}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.route.layers, expected.route.layers)
    assert [kept.tolist() for kept in found.route.kept_tokens()] == [
        kept.tolist() for kept in expected.route.kept_tokens()
    ]
    torch.testing.assert_close(found.route.coordinates, expected.route.coordinates)


# --- exactness, in every family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_at", [0, 2])
@pytest.mark.parametrize("family", ROUTED)
def test_a_later_turn_is_the_whole_conversation_routed_afresh(family, drop_at, routed):
    """Two further questions to a batch with padding. Without `reversible`, the route of the first turn stays."""
    case = routed(family, drop_at)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=True)
    assert_same(made, generated(case, first, **BUDGET))
    second = asked(case, first, made)
    expected = generated(case, second, **LATER)
    kept = generated(case, text_of(second), **LATER, past_key_values=cache_of(generated(case, first, **BUDGET)))
    differs = [not torch.allclose(*pair, **CLOSE) for pair in zip(kept.logits, expected.logits, strict=True)]
    assert any(differs)  # what left was missed
    again = generated(case, text_of(second), **LATER, past_key_values=cache_of(made), reversible=True)
    assert_same(again, expected)
    third = asked(case, second, again, seed=1)
    last = generated(case, text_of(third), keep_visual_tokens=0.5, past_key_values=cache_of(again), reversible="cpu")
    assert_same(last, generated(case, third, keep_visual_tokens=0.5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("read_at", "drop_at"), [(1, 1), (1, 3), (0, 2)])
def test_sliding_windows_that_have_passed_tokens(read_at, drop_at, attention, routed):
    """Layers with windows lie before the router, between it and the drop layer, and after that."""
    case = routed("gemma3", 1)
    model = copy.deepcopy(case.model)
    model.router_settings = dataclasses.replace(model.router_settings, read_at=read_at, drop_at=drop_at)
    model.set_attn_implementation(attention)
    case = dataclasses.replace(case, model=model)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=True)
    assert any(window and window < len(first["input_ids"][0]) for window in cache_of(made).windows[:drop_at])
    second = asked(case, first, made)
    again = generated(case, text_of(second), **LATER, past_key_values=cache_of(made), reversible=True)
    assert_same(again, generated(case, second, **LATER))
    for layer, window in zip(cache_of(again).layers, cache_of(again).windows, strict=True):
        assert not window or not layer.is_initialized or layer.keys.shape[2] < window
    third = asked(case, second, again, seed=1)
    last = generated(case, text_of(third), **BUDGET, past_key_values=cache_of(again), reversible=True)
    assert_same(last, generated(case, third, **BUDGET))


# --- what a turn may bring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1), (0, 1), (2, 1)], ids=["one", "none before", "two before"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "internvl"])
def test_a_turn_with_a_picture_of_its_own(family, counts, routed):
    """Pictures are counted through the conversation, and each of them keeps its floor."""
    case = routed(family, 2)
    first, added = (case.prompts([row], images={row: count}) for row, count in zip((0, 4), counts, strict=True))
    made = generated(case, first, **BUDGET, reversible=True)
    said = asked(case, first, made, length=1)
    text = {name: torch.cat([said[name], added[name]], 1) for name in text_of(said)}
    images = {name: value for name, value in added.items() if name not in OF_TEXT}
    whole = {name: torch.cat([first[name], value]) if name in first else value for name, value in images.items()}
    again = generated(case, text | images, **LATER, past_key_values=cache_of(made), reversible=True)
    assert_same(again, generated(case, text | whole, **LATER))
    assert int(again.route.coordinates[..., 0].max()) + 1 == sum(counts)


def test_a_turn_between_goes_on_with_the_route(routed):
    """What is said in it is there for the next reversible turn."""
    case = routed("llava", 2)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=True)
    second = asked(case, first, made)
    between = generated(case, text_of(second), **BUDGET, past_key_values=cache_of(made))
    assert between.route is made.route
    third = asked(case, second, between, seed=1)
    last = generated(case, text_of(third), **LATER, past_key_values=cache_of(between), reversible=True)
    assert_same(last, generated(case, third, **LATER))


def test_pictures_are_counted_through_a_turn_that_goes_on_with_the_route(routed):
    case = routed("llava", 2)
    first, added = case.prompts([0]), case.prompts([4])
    made = generated(case, first, **BUDGET, reversible=True)
    said = asked(case, first, made, length=1)
    text = {name: torch.cat([said[name], added[name]], 1) for name in text_of(said)}
    pixels = added["pixel_values"]
    between = generated(case, text | {"pixel_values": pixels}, **BUDGET, past_key_values=cache_of(made))
    assert between.route is made.route
    whole = text | {"pixel_values": torch.cat([first["pixel_values"], pixels])}
    third = asked(case, whole, between, seed=1)
    last = generated(case, text_of(third), **LATER, past_key_values=cache_of(between), reversible=True)
    assert_same(last, generated(case, third, **LATER))
    assert last.route.coordinates[..., 0].unique().tolist() == [0, 1]


def test_every_kind_of_budget_holds_for_its_turn(routed):
    case = routed("llava", 2)
    case = dataclasses.replace(case, model=copy.deepcopy(case.model))
    priced(case.model)
    first = case.prompts()
    for budget in ({"flops": 0.6}, {"quality": 0.9}, {"preset": "fast"}, {"keep_visual_tokens": 1.0}):
        made = generated(case, first, **BUDGET, reversible=True)
        second = asked(case, first, made)
        again = generated(case, text_of(second), **budget, past_key_values=cache_of(made), reversible=True)
        assert_same(again, generated(case, second, **budget))
    assert again.route.keep.all()  # all that left is back


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_forward_returns_the_logits_of_the_new_tokens(family, routed):
    case = routed(family, 2)
    first = case.prompts([2])
    made = generated(case, first, **BUDGET, reversible=True)
    second = asked(case, first, made)
    new = {"input_ids": second["input_ids"][:, cache_of(made).get_seq_length() :]}
    with torch.no_grad():
        found = case.model(**new, **LATER, past_key_values=cache_of(made), reversible=True)
        expected = case.model(**second, **LATER, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits[:, -new["input_ids"].shape[1] :], **CLOSE)
    assert found.route.keep.shape == second["input_ids"].shape


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_only_new_tokens_pass_the_layers_before_the_router(routed):
    case = routed("llava", 2)
    first = case.prompts([2])
    made = generated(case, first, **BUDGET, reversible=True)
    second = asked(case, first, made)
    ran: dict[int, int] = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, i=i: ran.setdefault(i, inputs[0].shape[1]) and None)
        for i, layer in enumerate(text_decoder(case.model).layers)
    ]
    with seen_by_router(case.model) as seen:
        again = generated(case, text_of(second), **LATER, past_key_values=cache_of(made), reversible=True)
    for handle in handles:
        handle.remove()
    length, new = second["input_ids"].shape[1], second["input_ids"].shape[1] - made.sequences.shape[1] + 1
    assert len(seen) == 1 and seen[0][0].shape[1] == length
    kept = int(again.route.keep.sum())
    assert [ran.get(i, kept) for i in range(case.num_layers)] == [new] * 2 + [kept] * (case.num_layers - 2)


@pytest.mark.parametrize("where", [True, "cpu"])
def test_what_is_kept_aside_is_a_state_for_each_token(where, routed):
    case = routed("llava", 2)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=where)
    cache = cache_of(made)
    states = 3 * cache.get_seq_length() * case.model.config.get_text_config().hidden_size * 4
    assert states < cache.aside_bytes < 1.5 * states
    assert cache_of(generated(case, first, **BUDGET)).aside_bytes == 0


def test_turns_that_keep_aside_in_different_places_are_joined():
    """One says reversible=True on a GPU, and another one reversible="cpu"; here meta stands for one of the two."""
    aside = Aside(2)
    for number, device in enumerate([None, "meta", "meta"]):
        aside.device = device
        visual, positions = torch.ones(1, 3, dtype=torch.bool), torch.arange(3 * number, 3 * number + 3)
        states = torch.ones(1, 3, 8)
        aside.add(PassedTokens(visual, torch.zeros(1, 3, 3), visual.long(), positions=positions, states=states))
        whole = aside.joined()
        assert whole.states.shape[1] == whole.positions.shape[-1] == 3 * (number + 1)
        assert whole.states.device.type == (device or "cpu")


def test_no_more_than_the_bound_is_kept_aside(routed, monkeypatch):
    """The conversation goes on with its route, and says why it cannot do more."""
    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    case = routed("llava", 2)
    first = case.prompts()
    expected = generated(case, first, **BUDGET, reversible=True)
    need = cache_of(expected).aside_bytes
    made = generated(case, first, **BUDGET, reversible=True, aside_bytes=need - 1)
    assert torch.equal(made.sequences, expected.sequences) and cache_of(made).aside_bytes == 0
    assert [message.split(" bytes")[0] for message in said] == [
        f"what this conversation keeps aside has grown to {need}"
    ]
    second = text_of(asked(case, first, made))
    with pytest.raises(ValueError, match=rf"does not have: they grew beyond aside_bytes={need - 1}\. Begin with a new"):
        generated(case, second, **LATER, past_key_values=cache_of(made), reversible=True)
    assert generated(case, second, **LATER, past_key_values=cache_of(made)).route is made.route
    enough = generated(case, first, **BUDGET, reversible=True, aside_bytes=need)
    assert cache_of(enough).aside_bytes == need


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reversible": "gpu"}, "reversible='gpu' is neither True, which keeps what left on the model's device, nor"),
        ({"preset": "off"}, "brings back what left under a budget, and this call runs under none: name one, such as"),
        ({"route": Route(layers=torch.ones(3, 6))}, "asks the router in each turn, and route= is given in its place"),
        ({**BUDGET, "aside_bytes": 0}, r"aside_bytes=0 is no number of bytes: give 2\*\*30 for one GiB"),
        ({**BUDGET, "reversible": False, "aside_bytes": 9}, "aside_bytes=9 bounds what reversible=True keeps aside: "),
        ({**BUDGET, "use_cache": False}, "reversible=True continues a cache, and use_cache is False: set it to True"),
        ({**BUDGET, "cache_implementation": "static"}, "fills the later layers of a cache anew in each turn: use"),
        ({**BUDGET, "num_beams": 2}, "keeps aside the states of one text, and num_beams tries others: leave one of"),
        ({**BUDGET, "prompt_lookup_num_tokens": 2}, "and prompt_lookup_num_tokens tries others: leave one of them out"),
    ],
)  # fmt: skip
def test_misuse(options, message, routed):
    case = routed("llava", 2)
    with pytest.raises(ValueError, match=message):
        generated(case, case.prompts(), **{"reversible": True, **options})


def test_misuse_of_forward(routed):
    case = routed("llava", 2)
    batch = case.prompts()
    with pytest.raises(ValueError, match=r"reversible=True is for answering: leave labels out, and call model\.eval"):
        case.model(**batch, **BUDGET, labels=batch["input_ids"], reversible=True)
    mask = torch.ones(3, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"give attention_mask as \[B, T\] for the whole text, with 1 at tokens"):
        case.model(**{**batch, "attention_mask": mask}, **BUDGET, reversible=True)
    with pytest.raises(ValueError, match="and assistant_model tries others: leave one of them out"):
        generated(case, batch, **BUDGET, assistant_model=case.plain, reversible=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "an earlier turn did not say reversible=True"),
        (lambda cache: cache.crop(-1), "it was cropped"),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1, 0])), "its sequences were chosen anew"),
    ],
)
def test_a_cache_without_the_states_is_refused_as_it_is(change, reason, routed):
    case = routed("llava", 2)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=change is not None)
    cache, second = cache_of(made), text_of(asked(case, first, made))
    if change is not None:
        change(cache)
    length = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=f"states of all earlier turns, which this cache does not have: {reason}. Begin"
    ):
        generated(case, second, **LATER, past_key_values=cache, reversible=True)
    assert cache.get_seq_length() == length
    cache.reset()
    if change is not None:
        whole = generated(case, first, **BUDGET, past_key_values=cache, reversible=True)
        assert torch.equal(whole.sequences, made.sequences)


def test_a_plain_cache_is_refused(routed):
    case = routed("llava", 2)
    text = case.prompts(images={0: 0, 1: 0, 2: 0})
    made = generated(case, text, **BUDGET)
    assert type(cache_of(made)) is DynamicCache
    with pytest.raises(ValueError, match="this cache does not have: an earlier turn did not say reversible=True"):
        generated(case, asked(case, text, made), **BUDGET, past_key_values=cache_of(made), reversible=True)


def test_a_transformers_that_makes_masks_in_another_way_is_named(routed, monkeypatch):
    case = routed("gemma3", 1)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=True)
    cache, second = cache_of(made), text_of(asked(case, first, made))
    monkeypatch.setattr(type(case.model), "create_masks_for_generate", None)
    with pytest.raises(
        RuntimeError, match=r"RoutedGemma3ForConditionalGeneration has no create_masks_for_generate\. They"
    ):
        generated(case, second, **LATER, past_key_values=cache, reversible=True)
    assert cache.get_seq_length() == made.sequences.shape[1] - 1


# --- a pass that broke off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reversible", [True, False])
def test_a_cache_that_a_pass_has_left_half_filled_is_refused(reversible, routed, monkeypatch):
    """As after running out of memory: in silence it would answer from layers that hold other tokens than the rest."""
    case = routed("llava", 1)
    first = case.prompts()
    made = generated(case, first, **BUDGET, reversible=reversible)
    second = text_of(asked(case, first, made))
    going_on = {**(LATER if reversible else BUDGET), "past_key_values": cache_of(made), "reversible": reversible}

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("no memory is left")

    with monkeypatch.context() as broken:
        broken.setattr(text_decoder(case.model).layers[2].mlp, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            generated(case, second, **going_on)
    with pytest.raises(ValueError, match=r"broke off .* begin with a new cache"):
        generated(case, second, **going_on)
    cache_of(made).reset()
    assert_same(generated(case, first, **BUDGET, past_key_values=cache_of(made)), generated(case, first, **BUDGET))
