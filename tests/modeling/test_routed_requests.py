"""What a routed model is asked for, and by whom: numbers of any kind, presets, caches, assistants, several pictures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.routed import CLOSE, NEW, Case, generated, make_case, routed_logits, seen_by_router
from tiny_models import SIZES, random_image
from transformers import AutoModelForImageTextToText, pipeline

from exporter.clean_room import extend
from exporter.modeling.routed_api import cache_of, logger
from exporter.modeling.routed_route import Budget, RouterSettings
from exporter.modeling.routed_router import best_tokens
from exporter.onnx.graphs.router import argsort_descending, floors_first
from exporter.routing.rules import Rule, assemble
from exporter.routing.settings import IMAGE_FLOOR, default_settings


@pytest.fixture(scope="module")
def case(tiny, tmp_path_factory) -> Case:
    return make_case("llava", tiny("llava"), tmp_path_factory.mktemp("routed") / "model", drop_at=1)


def load(case: Case, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(case.folder, trust_remote_code=True, **options)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("three", [np.int64(3), np.int32(3), torch.tensor(3), np.array(3)])
def test_counts_of_numpy_and_torch_are_counts(three, case):
    assert Budget(three, torch.tensor(5)) == Budget(3, 5)
    route = case.model.route(**case.prompts(), keep_visual_tokens=three, keep_layers=np.int64(5))
    assert [len(kept) for kept in route.kept_tokens()] == [3, 3, 3] and int(route.layers[0].sum()) == 5


@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_shares_of_numpy_and_torch_are_shares(half, case):
    expected = case.model.route(**case.prompts(), keep_visual_tokens=0.5)
    found = case.model.route(**case.prompts(), keep_visual_tokens=half)
    assert torch.equal(found.keep, expected.keep) and not found.keep.all()


@pytest.mark.parametrize("wrong", [torch.tensor([3]), np.bool_(True), "3", np.float32(1.5), torch.tensor(0)])
def test_what_is_no_budget_is_refused_in_any_guise(wrong, case):
    with pytest.raises(ValueError, match="keep_visual_tokens="):
        case.model.generate(**case.prompts([0]), keep_visual_tokens=wrong, max_new_tokens=1)
    with pytest.raises(ValueError, match="keep_visual_tokens="):
        case.model.set_budget(keep_visual_tokens=wrong)


# --- presets ----------------------------------------------------------------------------------------------------------


def test_unknown_presets_are_refused_wherever_they_can_be_seen(case):
    """Before anything runs: by text alone too, and when the model is loaded."""
    text = case.prompts([0], images={0: 0})
    with pytest.raises(ValueError, match="preset 'nonsense' is not known: this model has off, quality, balanced"):
        case.model.generate(**text, preset="nonsense", max_new_tokens=1)
    with pytest.raises(ValueError, match="preset 'nonsense' is not known"):
        case.model(**text, preset="nonsense")
    with pytest.raises(ValueError, match="preset 'nonsense' is not known"):
        load(case, preset="nonsense")
    with pytest.raises(ValueError, match="preset 'nonsense' is not known"):
        pipeline(
            "image-text-to-text", model=str(case.folder), processor=case.processor, trust_remote_code=True,
            model_kwargs={"preset": "nonsense"},
        )  # fmt: skip


def test_a_preset_can_be_given_when_the_model_is_loaded(case):
    model = load(case, preset="fast")
    assert model.budget == model.router_settings.preset("fast")
    batch = case.prompts()
    found = model.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(found, case.model.generate(**batch, max_new_tokens=NEW, preset="fast"))


def test_off_on_a_cache_that_holds_a_route_is_refused(case):
    batch = case.prompts()
    made = generated(case, batch, keep_visual_tokens=5)
    answer = made.sequences[:, batch["input_ids"].shape[1] :]
    whole = extend(batch, answer, torch.ones_like(answer, dtype=torch.bool), "llava")
    turn = {name: whole[name] for name in ("input_ids", "attention_mask")}
    cache = cache_of(made)
    before = cache.get_seq_length()
    for call in (case.model.generate, case.model):
        with pytest.raises(ValueError, match="preset='off' asks for the whole model, and this cache holds a route"):
            call(**turn, past_key_values=cache, preset="off")
    assert cache.get_seq_length() == before
    assert generated(case, turn, past_key_values=cache).route is made.route  # without it, the route goes on


# --- without a cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_the_route_is_in_the_output_without_a_cache_too(options, case):
    batch, budget = case.prompts(), {"keep_visual_tokens": 5, "keep_layers": 4}
    expected = case.model.route(**batch, **budget)
    made = generated(case, batch, **budget, **options, use_cache=False)
    repeats = len(made.route.layers) // 3
    assert torch.equal(made.route.keep, expected.keep.repeat_interleave(repeats, 0))
    assert torch.equal(made.route.layers, expected.layers.repeat_interleave(repeats, 0))
    assert generated(case, batch, preset="off", use_cache=False).route is None


# --- assistants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("budget", [{"preset": "off"}, {"keep_visual_tokens": 5, "keep_layers": 4}, {"preset": "fast"}])
def test_a_plain_draft_changes_no_token(family, budget, case, tiny, tmp_path):
    if family != "llava":
        if "preset" in budget:
            pytest.skip("one budget is enough for a second family")
        case = make_case(family, tiny(family), tmp_path / "model", drop_at=1)
    batch = case.prompts([2])
    options = {**budget, "max_new_tokens": 9, "min_new_tokens": 9}
    draft = copy.deepcopy(case.plain)
    expected = generated(case, batch, **options)
    found = generated(case, batch, **options, assistant_model=draft, num_assistant_tokens=3)
    assert torch.equal(found.sequences, expected.sequences)
    assert budget == {"preset": "off"} or found.route.executed_layers() == expected.route.executed_layers()


def test_a_routed_draft_has_a_budget_of_its_own(case):
    draft = load(case)
    draft.set_budget(keep_visual_tokens=2, keep_layers=3)
    batch = case.prompts([2])
    with seen_by_router(draft) as seen:
        found = generated(case, batch, preset="quality", assistant_model=draft, num_assistant_tokens=3)
    assert len(seen) == 1
    assert torch.equal(found.sequences, generated(case, batch, preset="quality").sequences)


def test_a_routed_draft_helps_a_plain_model(case):
    draft = load(case, preset="fast")
    batch = case.prompts([2])
    expected = case.plain.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(case.plain.generate(**batch, max_new_tokens=NEW, assistant_model=draft), expected)


def test_a_call_leaves_nothing_behind(case):
    """What one call of generate was asked for is gone when it ends, or fails."""
    batch = case.prompts()
    expected = routed_logits(case, batch)
    with pytest.raises(TypeError):
        case.model.generate(**batch, preset="fast", streamer=object(), max_new_tokens=object())
    case.model.generate(**batch, preset="fast", max_new_tokens=1)
    assert torch.equal(routed_logits(case, batch), expected)


# --- a picture before its question ------------------------------------------------------------------------------------


def test_a_picture_without_its_question_is_warned_of_once(case, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    batch = case.prompts([0])
    end = int(case.visual(batch)[0].nonzero()[-1]) + 1
    whole = {**batch, "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    alone = {**whole, "input_ids": whole["input_ids"][:, :end], "attention_mask": whole["attention_mask"][:, :end]}
    with torch.no_grad():
        case.model(**whole, keep_visual_tokens=5)
        case.model(**alone, preset="off")
        assert not [line for line in said if "before its question" in line]
        case.model(**alone, keep_visual_tokens=5, use_cache=True)
    (line,) = (line for line in said if "before its question" in line)
    assert "Give the picture and its question in one pass" in line


# --- several pictures -------------------------------------------------------------------------------------------------


def two_pictures(logits_of_second: float = -9.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row of text, 8 tokens of one image, text, 4 of another whose logits are all lower; then text."""
    visual = torch.tensor([[False] + [True] * 8 + [False] + [True] * 4 + [False]])
    logits = torch.arange(15.0)[None].clone()
    logits[:, 10:14] += logits_of_second - 10
    patches = torch.zeros(1, 15, 3)
    patches[:, 10:14, 0] = 1
    return logits, visual, patches


@pytest.mark.parametrize(
    ("count", "floor", "expected"),
    [
        (6, 0.0, [6, 0]),  # without a floor the second is gone
        (6, 0.25, [5, 1]),  # a quarter of 3 is none: one, at least
        (8, 0.5, [6, 2]),
        (8, 1.0, [4, 4]),
        (12, 1.0, [8, 4]),  # all
        (2, 1.0, [1, 1]),
        (1, 1.0, [1, 0]),  # fewer tokens than images: those with the best tokens
    ],
)
def test_each_picture_of_a_row_has_a_floor(count, floor, expected):
    logits, visual, patches = two_pictures()
    keep = best_tokens(logits, visual, Budget(count), patches, floor)
    found = [int((keep & visual & (patches[..., 0] == image)).sum()) for image in (0, 1)]
    assert found == expected and keep[~visual].all()
    kept = (keep & visual)[0].nonzero()[:, 0].tolist()
    assert kept == [*range(9 - expected[0], 9), *range(14 - expected[1], 14)]  # the best of each


def test_a_single_picture_is_not_touched_by_the_floor():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, generator=random)
    visual = torch.rand(3, 20, generator=random) < 0.7
    for count in (1, 5, 12):
        keep = best_tokens(logits, visual, Budget(count), torch.zeros(3, 20, 3), 1.0)
        assert torch.equal(keep, best_tokens(logits, visual, Budget(count)))


def test_graphs_rank_as_the_model_does():
    random = torch.Generator().manual_seed(0)
    for seed in range(20):
        logits = torch.randint(0, 9, (2, 30), generator=random).float()  # with equal ones
        visual = torch.rand(2, 30, generator=random) < 0.8
        images = torch.randint(0, 4, (2, 30), generator=random).sort(dim=1).values.float()
        floor = (seed % 5) / 4 or 0.1
        count = torch.tensor([7, 3]).clamp(max=visual.sum(1))
        patches = torch.stack([images, torch.zeros(2, 30), torch.zeros(2, 30)], -1)
        for row in range(2):
            here = slice(row, row + 1)
            expected = best_tokens(logits[here], visual[here], Budget(int(count[row])), patches[here], floor)
            scores = floors_first(logits[here], visual[here], images[here], count[here], floor)
            best = torch.zeros_like(visual[here])
            best.scatter_(1, argsort_descending(scores)[:, : int(count[row])], True)
            assert torch.equal(best | ~visual[here], expected)


def test_new_routers_have_a_floor_and_rules_keep_it(case):
    assert default_settings(case.plain.config)["image_floor"] == IMAGE_FLOOR
    batch = case.prompts([0, 1], images={0: 2, 1: 3})
    route = case.model.route(**batch, keep_visual_tokens=12)
    for row, images in ((0, 2), (1, 3)):
        places = route.kept_coordinates()[row]
        counts = places[:, 0].long().bincount(minlength=images)
        assert counts.sum() == 12 and counts.min() >= max(1, int(12 * IMAGE_FLOOR / images))


def test_a_rule_keeps_the_floor(case):
    visual = case.visual(batch := case.prompts([0], images={0: 2}))
    scores = -torch.arange(visual.shape[1]).float()[None]  # the first image only

    class Asked:
        is_visual, inputs = visual, batch

    layers = torch.zeros(1, len(case.model.router_settings.candidates))
    route = assemble(case.model, Asked, Budget(8), scores, layers, Rule("fastv", "all"))
    assert route.kept_coordinates()[0][:, 0].long().bincount().tolist() == [7, 1]


def test_routers_made_before_there_was_a_floor_have_none(case):
    settings = {name: value for name, value in case.model.config.router.items() if name != "image_floor"}
    config = copy.deepcopy(case.model.config)
    config.router = settings
    assert RouterSettings.of(config).image_floor == 0
    config.router = {**settings, "image_floor": 2}
    with pytest.raises(ValueError, match="image_floor=2 is no share"):
        RouterSettings.of(config)


def test_a_pipeline_takes_the_preset_of_its_model(case):
    model = load(case, preset="fast")
    pipe = pipeline("image-text-to-text", model=model, processor=case.processor)
    image = random_image(np.random.default_rng(3), SIZES[0])
    with seen_by_router(model) as seen:
        pipe(text=chat(image), generate_kwargs={"max_new_tokens": 2})
    assert len(seen) == 1


def chat(image: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is the digit?"}]
    return [{"role": "user", "content": content}]


def test_a_static_cache_that_is_cropped_stays_in_step(case):
    """Of newer releases: assisted decoding takes tokens back from static caches too."""
    from transformers.cache_utils import StaticLayer

    if not hasattr(StaticLayer, "crop"):
        pytest.skip("static layers of this transformers cannot be cropped")
    batch, budget = case.prompts([2]), {"keep_visual_tokens": 5, "keep_layers": 4}
    expected = generated(case, batch, **budget)
    found = generated(
        case, batch, **budget, assistant_model=copy.deepcopy(case.plain), num_assistant_tokens=2,
        cache_implementation="static",
    )  # fmt: skip
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits[0], expected.logits[0], **CLOSE)
