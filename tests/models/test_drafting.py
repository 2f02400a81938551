"""Answers by guesses that are checked are those of one token a pass, whatever is guessed, and take fewer passes."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.three_questions import SAMPLES
from tiny_models import FAMILIES_HERE

from exporter.checkpoints.source import open_source
from exporter.clean_room import greedy, greedy_answers, load_processor
from exporter.data.batches import make_batch
from exporter.models import loading, residency, together
from exporter.models.drafting import drafted, may_draft
from exporter.models.drafts import MOST_ROOM, Draft, DraftPool
from exporter.models.loading import PartSizes, load_model, text_decoder

TOKENS = 24  # longer than Gemma 3's window of the tiny model


class Scripted(Draft):
    """Guesses a text of its own."""

    def __init__(self, guesses: list[int]) -> None:
        super().__init__(DraftPool(), [1], TOKENS)
        self.script = guesses

    def guess(self) -> list[int]:
        return self.script[len(self.answer) :][:7]

    def guesses(self, number: int) -> list[list[int]]:
        return [[0], self.guess(), [3, 4]][: max(1, number)] if number > 1 else [self.guess()]


def opened(folder: Any) -> tuple[Any, Any]:
    model, _ = load_model(open_source(str(folder)), "cpu", torch.float32)
    return model, make_batch(SAMPLES, load_processor(folder), model.config)


def passes_of(model: Any) -> list[int]:
    """Count passes over the layers from now on."""
    counted: list[int] = []
    text_decoder(model).layers[0].register_forward_hook(lambda *_: counted.append(1))
    return counted


def damaged(answer: list[int], share: float, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [token if draw.random() >= share else (token + 1) % 50 for token in answer]


@pytest.mark.parametrize("family", [*FAMILIES_HERE, "qwen3_vl_moe"])
def test_answers_are_those_of_one_token_a_pass_whatever_is_guessed(family, tiny):
    """Sequences of a batch keep different numbers of guesses, in prompts of different lengths."""
    model, batch = opened(tiny(family))
    assert may_draft(model.config)
    right = greedy_answers(model, batch.inputs, TOKENS).tolist()
    counted = passes_of(model)
    for shares, width in (((0, 0, 0), 1), ((0.2, 0, 0.4), 3), ((1, 0.3, 0.2), 1)):
        counted.clear()
        drafts = [Scripted(damaged(answer, share, 3)) for answer, share in zip(right, shares, strict=True)]
        with greedy(model, max_new_tokens=TOKENS) as settings:
            drafted(model, batch.inputs, drafts, settings, width=width)
        for draft, answer in zip(drafts, right, strict=True):
            assert draft.answer == answer
        assert len(counted) < TOKENS or max(shares) == 1


def test_an_answer_ends_with_its_end_token_wherever_that_was_guessed(tiny):
    model, batch = opened(tiny("llava"))
    with greedy(model, max_new_tokens=TOKENS) as settings:
        right = model.generate(**batch.inputs, generation_config=settings)[:, batch.inputs["input_ids"].shape[1] :]
    ends = frozenset(right[:, 5].tolist())
    wanted = [answer[: next(n for n, token in enumerate(answer) if token in ends) + 1] for answer in right.tolist()]
    drafts = [Draft(DraftPool(), [1], TOKENS, ends, label) for label in right.tolist()]
    counted = passes_of(model)
    with greedy(model, max_new_tokens=TOKENS) as settings:
        drafted(model, batch.inputs, drafts, settings)
    assert [draft.answer for draft in drafts] == wanted and len(counted) == 1
    again = [Draft(DraftPool(), [1], TOKENS) for _ in drafts]
    with greedy(model, max_new_tokens=TOKENS) as settings:
        drafted(model, batch.inputs, again, settings, never=sorted(ends))
    assert all(len(draft.answer) == TOKENS and not ends & set(draft.answer) for draft in again)


@pytest.mark.parametrize(("family", "limit"), [("llava", None), ("gemma3", 0), ("qwen2_5_vl", 0), ("qwen3_5", 0)])
def test_layers_on_disk_are_read_once_for_answers_that_are_guessed(family, limit, tiny, monkeypatch):
    """A model that takes nothing back, such as one with linear attention, says one token a pass."""
    monkeypatch.setattr(loading, "AT_ONCE", 1)
    model, batch = opened(tiny(family))
    right = greedy_answers(model, batch.inputs, TOKENS).tolist()
    source, read = open_source(str(tiny(family))), vars(residency)["read_tensor"]
    sizes = PartSizes.of(source, 4)
    streamed, _ = load_model(source, "cpu", torch.float32, f"{sizes.least / 1000 + 1:.0f}KB")
    monkeypatch.setattr(residency.ranges_of(streamed).room, "for_states", limit)
    bytes_read: list[int] = []
    monkeypatch.setattr(residency, "read_tensor", lambda entry: (bytes_read.append(entry.num_bytes), read(entry))[1])

    def drafts_of(_: object) -> list[Draft]:
        return [Draft(DraftPool(), [1], TOKENS, label=damaged(answer, 0.1, 1)) for answer in right]

    (answered,) = together.answered_together(streamed, [batch], TOKENS, drafts_of)
    assert answered.targets.tolist() == [token for answer in right for token in answer]
    passes = sum(bytes_read) / sum(sizes.layers)
    assert (passes < TOKENS / 2) == may_draft(model.config) == (family != "qwen3_5")


def test_types_whose_caches_are_not_lists_of_their_own_tokens_are_not_guessed(tiny):
    config = open_source(str(tiny("llava"))).config
    assert may_draft(config)
    for name, value in (("cross_attention_layers", [1]), ("num_kv_shared_layers", 2)):
        text = copy.deepcopy(config.get_text_config())
        setattr(text, name, value)
        assert not may_draft(SimpleNamespace(model_type="llava", get_text_config=lambda text=text: text))
    assert not may_draft(SimpleNamespace(model_type="qwen", get_text_config=config.get_text_config))


def test_a_question_aside_ends_with_the_others(tiny, monkeypatch):
    monkeypatch.setattr(loading, "AT_ONCE", 1)
    source = open_source(str(tiny("llava")))
    streamed, _ = load_model(source, "cpu", torch.float32, f"{PartSizes.of(source, 4).least / 1000 + 1:.0f}KB")
    batch = make_batch(SAMPLES, load_processor(source.folder), streamed.config)
    aside = Draft(DraftPool(), [1], 100)
    drafts = [Draft(DraftPool(), [1], 4) for _ in SAMPLES]
    one = make_batch(SAMPLES[:1], load_processor(source.folder), streamed.config)
    list(together.answered_together(streamed, [batch], 4, lambda _: drafts, aside=(one, aside)))
    assert 1 <= len(aside.answer) < 40 and aside.answer[:3] == drafts[0].answer[:3]


def test_a_pool_guesses_what_followed_the_longest_ending():
    pool = DraftPool()
    pool.note([1, 2, 3, 4, 5], 0)
    pool.note([9, 3, 7, 8], 0)
    assert pool.guess([3], 2) == [7, 8]  # what was said last
    assert pool.guess([1, 2, 3], 2) == [4, 5] == pool.guess([2, 3], 2)
    assert pool.guess([6], 2) == [] == pool.guess([3], 0)
    assert pool.guesses([1, 2, 3], 2, 3) == [[4, 5], [7, 8]]
    growing = [6, 6]
    pool.note(growing, 0)
    assert len(pool.guess([6], 5)) == 5  # goes on from what it guessed


def test_guesses_that_are_checked_side_by_side_begin_with_different_tokens():
    pool = DraftPool()
    pool.note([1, 2, 3, 4, 5], 0)
    pool.note([9, 3, 7, 8], 0)
    assert Draft(pool, [1, 2, 3], 20).guesses(4) == [[4, 5], [7, 8]]
    assert Draft(pool, [1, 2, 3], 20, label=[6]).guesses(4) == [[6], [4, 5], [7, 8]]
    assert Draft(pool, [1, 2, 3], 20, label=[6]).guesses(2) == [[6], [4, 5]]
    assert Draft(DraftPool(), [1], 20).guesses(4) == [[]]


def test_a_label_is_followed_until_it_is_wrong_twice():
    pool = DraftPool()
    draft = Draft(pool, [1], 20, frozenset([0]), [5, 6, 7, 0])
    assert draft.guess() == [5, 6, 7, 0]
    assert draft.take([5, 9]) == 2 and draft.guess() == [7, 0]  # another word in the same place
    assert draft.take([8]) == 1 and draft.guess() == [0]
    assert draft.take([4]) == 1 and draft.guess() == []
    assert draft.take([0, 3]) == 1 and draft.done and draft.guess() == []
    assert draft.take([3]) == 0 and draft.answer == [5, 9, 8, 4, 0]
    short = Draft(pool, [1], 2, label=[5, 6, 7, 0])
    assert short.guess() == [5] and short.take([5, 6, 7]) == 2 and short.done


def test_more_is_guessed_where_guesses_are_right_and_less_where_they_are_wrong():
    pool = DraftPool()
    pool.note(list(range(1, 200)), 0)
    draft = Draft(pool, [1], 500)
    rooms = []
    for _ in range(4):
        guessed = draft.guess()
        rooms.append(len(guessed))
        draft.take([*guessed, guessed[-1] + 1])
    assert rooms == [8, 16, 32, MOST_ROOM]
    draft.take([50])
    assert len(draft.guess()) == 4


def test_no_more_is_guessed_at_once_than_there_is_room_for():
    """A long guess that is wrong at its end leaves as much room as there may be, and no more."""
    pool = DraftPool()
    pool.note(list(range(1, 4000)), 0)
    draft = Draft(pool, [1], 5000)
    for _ in range(8):
        guessed = draft.guess()
        assert len(guessed) <= MOST_ROOM
        draft.take([*guessed[:-1], 1])
