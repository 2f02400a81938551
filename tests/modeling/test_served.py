"""Served classes: a shorter prompt is that of the stock model on shorter inputs, and callers meet their own lengths.

Shapes: B sequences, S tokens of the caller's prompt, n rows of a picture that stay, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import conversation, inputs, random_image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
)

from exporter.clean_room import encode, load_processor
from exporter.modeling.modeling_served import served, served_name
from exporter.modeling.served_cells import blocks
from exporter.modeling.served_layout import padded_questions
from exporter.modeling.served_router import TYPES, ServingRouter, ServingSettings, select, tokens_kept
from exporter.routing.serving.folder import add_serving_router
from exporter.routing.serving.settings import serving_settings

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
FAST = {"preset": "serve-fast"}


@dataclass(frozen=True)
class Case:
    family: str
    folder: Path
    model: Any
    stock: Any
    processor: Any

    def prompt(self, seed: int = 0, images: int = 1, question: str = "what color is the digit?") -> dict[str, Any]:
        random = np.random.default_rng(seed)
        shown = [random_image(random, (60 + 20 * seed, 50)) for _ in range(images)]
        return dict(encode(self.processor, [conversation(shown, question)], [shown]))

    @property
    def embedding(self) -> Any:
        return self.stock.get_input_embeddings()


def make(family: str, plain: Path, folder: Path) -> Case:
    import shutil

    shutil.copytree(plain, folder)
    config = AutoConfig.from_pretrained(folder)
    entry = serving_settings(config, question_aware=True)
    config.serving_router = entry
    torch.manual_seed(1)
    router = ServingRouter(config.get_text_config().hidden_size, ServingSettings.of(config))
    torch.nn.init.normal_(router.up.weight, std=0.2)
    torch.nn.init.normal_(router.head[-1].weight)
    add_serving_router(folder, entry, router.state_dict())
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model = served(type(stock)).from_pretrained(folder).eval()
    return Case(family, folder, model, stock, load_processor(folder))


@pytest.fixture(scope="module", params=TYPES)
def case(request, tiny, tmp_path_factory) -> Case:
    return make(request.param, tiny(request.param), tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def llava(tiny, tmp_path_factory) -> Case:
    return make("llava", tiny("llava"), tmp_path_factory.mktemp("served") / "model")


def positions_by_hand(case: Case, prompt: dict[str, Any], number: int, stays: int) -> torch.Tensor:
    """Positions of one shorter prompt, [1, W]; in models with three axes the whole prompt's, [3, 1, W]."""
    pictured = prompt["input_ids"][0] == case.stock.config.image_token_id
    if case.model.axes() is None:
        return torch.arange(len(pictured) - number + stays)[None]
    named = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    whole, _ = case.stock.model.get_rope_index(**{name: prompt[name] for name in named})
    _, lines, columns = (prompt["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    cells = blocks(case.model.coordinates_of(0, torch.empty(number), prompt), stays)
    at = torch.cartesian_prod(torch.arange(lines), torch.arange(columns)).double()
    middles = [at[cells == cell].mean(0) for cell in range(stays)]
    apart = [torch.where(cells == cell, (at - middle).norm(dim=1), torch.inf) for cell, middle in enumerate(middles)]
    keep = ~pictured
    keep[pictured.nonzero()[:, 0][torch.stack(apart).argmin(1)]] = True
    return whole[..., keep]


@torch.no_grad()
def by_hand(case: Case, prompt: dict[str, Any], budget: float, question: torch.Tensor | None = None) -> list[int]:
    """Greedy answer of the stock model to one sequence of one picture, whose rows were left out by hand."""
    model, ids = case.stock, prompt["input_ids"]
    named = ("pixel_values", "image_sizes", "image_grid_thw")
    outputs = model.get_image_features(**{n: prompt[n] for n in named if n in prompt})
    features = outputs.pooler_output
    rows = features.flatten(0, -2) if isinstance(features, torch.Tensor) else torch.cat(list(features))
    places = case.model.coordinates_of(0, rows, prompt)
    stays, index = select(case.model.serving_router, rows, budget, places, question)
    assert len(stays) == tokens_kept(len(rows), budget) < len(rows)
    pictured = ids[0] == model.config.image_token_id
    keep = ~pictured
    keep[pictured.nonzero()[:, 0][index]] = True
    embeds = case.embedding(ids[:, keep]).masked_scatter(pictured[keep][None, :, None], stays)
    first = positions_by_hand(case, prompt, len(rows), len(stays))
    deepstack = getattr(outputs, "deepstack_features", None)
    chosen = None if deepstack is None else [torch.cat(list(level))[index] for level in deepstack]
    answer: list[int] = []
    for _ in range(GREEDY["max_new_tokens"]):
        said = case.embedding(torch.tensor([answer], dtype=torch.long)) if answer else embeds[:, :0]
        whole = torch.cat([embeds, said], 1)
        later = first.max() + 1 + torch.arange(len(answer))
        positions = torch.cat([first, later.expand(*first.shape[:-1], -1)], -1)
        more: dict[str, Any] = {}
        if chosen is not None:
            mask = torch.cat([pictured[keep], torch.zeros(len(answer), dtype=torch.bool)])[None]
            more = {"visual_pos_masks": mask, "deepstack_visual_embeds": chosen}
        states = model.get_decoder()(
            inputs_embeds=whole,
            position_ids=positions,
            use_cache=False,
            **more,
        )
        answer.append(int(model.lm_head(states.last_hidden_state[:, -1]).argmax()))
    return answer


# --- what is computed -------------------------------------------------------------------------------------------------


def test_without_a_budget_it_is_the_plain_model_bit_for_bit(case):
    batch = inputs(case.processor, batch=3)
    assert torch.equal(case.model.generate(**batch, **GREEDY), case.stock.generate(**batch, **GREEDY))
    with torch.no_grad():
        assert torch.equal(case.model(**batch).logits, case.stock(**batch).logits)
        assert torch.equal(case.model(**batch, preset="off").logits, case.stock(**batch).logits)


@pytest.mark.parametrize("asked", [False, True])
def test_an_answer_is_that_of_the_stock_model_on_shorter_inputs(case, asked):
    prompt = case.prompt()
    ids = case.processor.tokenizer("which digit?", add_special_tokens=False)["input_ids"]
    question = case.embedding(torch.tensor(ids)) if asked else None
    for budget in (0.25, 0.5, 7):
        output = case.model.generate(
            **prompt, **GREEDY, keep_visual_tokens=budget, question_ids=[ids] if asked else None
        )
        length = prompt["input_ids"].shape[1]
        assert torch.equal(output[:, :length], prompt["input_ids"])  # the caller's own prompt
        assert output[0, length:].tolist() == by_hand(case, prompt, budget, question)


def test_a_batch_is_its_sequences_one_by_one(case):
    prompts = [case.prompt(seed, question=q) for seed, q in enumerate(("name it.", "how many are there in it?"))]
    random = [np.random.default_rng(seed) for seed in (0, 1)]
    shown = [[random_image(r, (60 + 20 * n, 50))] for n, r in enumerate(random)]
    questions = ("name it.", "how many are there in it?")
    batch = dict(encode(case.processor, [conversation(s, q) for s, q in zip(shown, questions, strict=True)], shown))
    together = case.model.generate(**batch, **GREEDY, **FAST)[:, batch["input_ids"].shape[1] :]
    for number, prompt in enumerate(prompts):
        alone = case.model.generate(**prompt, **GREEDY, **FAST)[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(together[number], alone)


def test_the_pass_of_a_prompt_is_that_of_generate_and_as_long_as_the_prompt(case):
    batch = inputs(case.processor, batch=3)
    steps = case.model.generate(**batch, **GREEDY, **FAST, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        output = case.model(**batch, **FAST)
        last = case.model(**batch, **FAST, logits_to_keep=1).logits
    assert output.logits.shape[:2] == batch["input_ids"].shape
    assert torch.allclose(output.logits[:, -1], steps.logits[0], **CLOSE)
    assert torch.allclose(output.logits[:, -1:], last, **CLOSE)
    assert steps.served.width == output.served.width < batch["input_ids"].shape[1]


@torch.no_grad()
def test_a_loop_of_ones_own_goes_on_with_the_cache(case):
    batch = inputs(case.processor, batch=2)
    expected = case.model.generate(**batch, **GREEDY, **FAST)[:, batch["input_ids"].shape[1] :]
    output, mask, answer = case.model(**batch, **FAST, use_cache=True), batch["attention_mask"], []
    for _ in range(GREEDY["max_new_tokens"]):
        token = output.logits[:, -1:].argmax(-1)
        answer.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        output = case.model(input_ids=token, attention_mask=mask, cache=output.cache)
    assert torch.equal(torch.cat(answer, 1), expected)


def test_several_pictures_keep_their_share_each_and_none_is_the_plain_model(case):
    prompt = case.prompt(images=2)
    output = case.model.generate(**prompt, **GREEDY, keep_visual_tokens=3, return_dict_in_generate=True)
    pictured = prompt["input_ids"] == case.model.config.image_token_id
    assert output.served.length - output.served.width == int(pictured.sum()) - 6
    text = dict(case.processor.tokenizer("name it.", return_tensors="pt"))
    text = {name: text[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(case.model.generate(**text, **GREEDY, **FAST), case.stock.generate(**text, **GREEDY))


def test_beams_and_several_answers_run(case):
    prompt = case.prompt()
    beams = case.model.generate(**prompt, max_new_tokens=3, num_beams=2, num_return_sequences=2, **FAST)
    assert len(beams) == 2 and torch.equal(beams[0, : prompt["input_ids"].shape[1]], prompt["input_ids"][0])


def test_padding_on_the_right_and_labels(llava):
    batch = inputs(llava.processor, batch=2)
    lengths = batch["attention_mask"].sum(1)
    flipped = {n: torch.stack([row.roll(int(k)) for row, k in zip(batch[n], lengths, strict=True)])
               for n in ("input_ids", "attention_mask")}  # fmt: skip
    labels = flipped["input_ids"].masked_fill(flipped["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == llava.model.config.image_token_id, -100)
    with torch.no_grad():
        left = llava.model(**batch, **FAST).logits
        right = llava.model(**{**batch, **flipped}, labels=labels, **FAST)
    for row, number in enumerate(lengths.tolist()):
        assert torch.allclose(right.logits[row, :number], left[row, -number:], **CLOSE)
    assert right.loss.isfinite()


def test_a_conversation_goes_on_with_the_cache(llava):
    prompt, cache = llava.prompt(), DynamicCache()
    first = llava.model.generate(**prompt, **GREEDY, **FAST, past_key_values=cache)
    more = llava.processor.tokenizer(" and the next one ?", add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([first, more], 1)
    again = llava.model.generate(input_ids=whole, past_key_values=cache, **GREEDY)
    anew = llava.model.generate(
        **{**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}, **GREEDY, **FAST
    )
    assert torch.equal(again, anew)


def test_lengths_count_the_callers_prompt(llava):
    prompt = llava.prompt()
    length = prompt["input_ids"].shape[1]
    output = llava.model.generate(**prompt, max_length=length + 2, min_length=length + 2, do_sample=False, **FAST)
    assert output.shape[1] == length + 2


def test_a_cache_that_was_reset_takes_another_picture(llava):
    cache = StaticCache(config=llava.model.config, max_cache_len=200)
    for seed in (0, 1):
        prompt = llava.prompt(seed)
        expected = llava.model.generate(**prompt, **GREEDY, **FAST)
        assert torch.equal(llava.model.generate(**prompt, **GREEDY, **FAST, past_key_values=cache), expected)
        cache.reset()
    assert torch.equal(
        llava.model.generate(**prompt, **GREEDY, past_key_values=cache), llava.stock.generate(**prompt, **GREEDY)
    )


def test_criteria_and_processors_are_given_the_callers_ids(llava):
    prompt, seen = llava.prompt(), []
    ids, length = prompt.pop("input_ids"), prompt["attention_mask"].shape[1]

    class Watching(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, tokens, scores):
            seen.append(tokens)
            return scores

    class Stopping(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, tokens, scores, **kwargs):
            return torch.full((len(tokens),), tokens.shape[1] == length + 2)

    kinds = {"logits_processor": LogitsProcessorList([Watching()]), "stopping_criteria": [Stopping()]}
    output = llava.model.generate(ids, **prompt, **kinds, **GREEDY, **FAST)
    assert output.shape[1] == length + 2 and [tokens.shape[1] for tokens in seen] == [length, length + 1]
    assert all(torch.equal(tokens[:, :length], ids) for tokens in seen)
    llava.model.generate(ids, None, LogitsProcessorList([Watching()]), **prompt, max_new_tokens=1, num_beams=2, **FAST)
    assert torch.equal(seen[-1], ids.repeat(2, 1))


def test_a_model_that_drafts_changes_no_answer_and_no_gradient_is_kept(llava):
    prompt = llava.prompt()
    expected = llava.model.generate(**prompt, **GREEDY, **FAST)
    assert torch.equal(llava.model.generate(**prompt, **GREEDY, **FAST, assistant_model=llava.stock), expected)
    seen = []
    hook = llava.model.model.vision_tower.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    llava.model.generate(**prompt, **GREEDY, **FAST)
    hook.remove()
    assert seen == [False]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_runs_by_its_own_files_and_is_plain_without_them(case, tmp_path):
    prompt = case.prompt()
    expected = case.model.generate(**prompt, **GREEDY, **FAST)
    model = AutoModelForImageTextToText.from_pretrained(case.folder, trust_remote_code=True, preset="serve-fast").eval()
    assert type(model).__name__ == served_name(case.family) and "transformers_modules" in type(model).__module__
    assert torch.equal(model.generate(**prompt, **GREEDY), expected)
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").architectures == [
        type(case.stock).__name__
    ]  # as engines go by
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert torch.equal(saved.generate(**prompt, **GREEDY, **FAST), expected)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(plain.generate(**prompt, **GREEDY), case.stock.generate(**prompt, **GREEDY))


def test_the_router_stays_in_float32(llava):
    model = served(type(llava.stock)).from_pretrained(llava.folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for cast in (model, model.half(), model.to(torch.bfloat16)):
        assert {p.dtype for p in cast.serving_router.parameters()} == {torch.float32}


def test_a_budget_is_set_for_all_calls(llava):
    prompt = llava.prompt()
    expected = llava.model.generate(**prompt, **GREEDY, **FAST)
    llava.model.set_budget("serve-fast")
    try:
        assert torch.equal(llava.model.generate(**prompt, **GREEDY), expected)
        off = llava.model.generate(**prompt, **GREEDY, preset="off")
        assert torch.equal(off, llava.stock.generate(**prompt, **GREEDY))
    finally:
        llava.model.set_budget("off")


def test_questions_come_as_lists_or_padded(llava):
    prompt = llava.prompt()
    ids = [[5, 9, 17]]
    padded = padded_questions([[5, 9, 17], [4, 4, 4, 4]])[:1]
    assert padded.tolist() == [[5, 9, 17, -1]]
    with torch.no_grad():
        told = [llava.model(**prompt, **FAST, question_ids=q).logits for q in (ids, padded)]
    assert torch.equal(*told)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_made_shorter_is_refused(llava):
    prompt = llava.prompt()
    embeds = llava.embedding(prompt["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds alone do not tell which tokens are of a picture"):
        llava.model(inputs_embeds=embeds, **FAST)
    with pytest.raises(ValueError, match="under a budget a prompt is input_ids alone: leave inputs_embeds out"):
        llava.model.generate(**prompt, inputs_embeds=embeds, **FAST)
    with pytest.raises(ValueError, match="keeps tokens of pictures, not of videos"):
        llava.model(**prompt, pixel_values_videos=torch.zeros(1), **FAST)
    with pytest.raises(ValueError, match="there are no pixel_values for them"):
        llava.model(input_ids=prompt["input_ids"], **FAST)
    with pytest.raises(ValueError, match="has 4 dimensions: under a budget it has to be"):
        llava.model(**{**prompt, "attention_mask": torch.ones(1, 1, 2, 2)}, **FAST)
    with pytest.raises(ValueError, match=r"has \d+ placeholders of pictures, and the pictures give \d+ rows"):
        llava.model(**{**prompt, "input_ids": prompt["input_ids"][:, 8:], "attention_mask": None}, **FAST)
    with pytest.raises(ValueError, match="preset 'fast' is not known: this serving router has off, serve-accurate"):
        llava.model.generate(**prompt, preset="fast")
    with pytest.raises(ValueError, match="one list of token ids for each of the 1 sequences"):
        llava.model(**prompt, **FAST, question_ids=[[1], [2]])


def test_a_cache_of_a_shorter_prompt_takes_no_picture_and_no_other_budget(llava):
    prompt = llava.prompt()
    with torch.no_grad():
        cache = llava.model(**prompt, **FAST, use_cache=True).cache
    token = torch.tensor([[5]])
    with pytest.raises(ValueError, match="this cache holds a shorter prompt: begin with a new cache"):
        llava.model(input_ids=token, cache=cache, preset="off")
    with pytest.raises(
        ValueError, match=r"attention_mask is \[1, 1\]: behind this cache it has to tell of all \d+ tokens"
    ):
        llava.model(input_ids=token, cache=cache, attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="takes no further picture"):
        llava.model(input_ids=token, cache=cache, pixel_values=prompt["pixel_values"])


def test_a_picture_behind_a_plain_cache_is_refused(llava):
    prompt = llava.prompt()
    with torch.no_grad():
        cache = llava.model(input_ids=torch.tensor([[5, 6]]), use_cache=True).cache
    with pytest.raises(ValueError, match="a picture that comes behind a cache is not made shorter"):
        llava.model(**prompt, cache=cache, **FAST)
    with pytest.raises(ValueError, match="a picture that comes behind a cache is not made shorter"):
        llava.model.generate(**prompt, past_key_values=cache, **GREEDY, **FAST)


def test_a_router_without_questions_takes_none(llava):
    settings = llava.model.serving_settings
    llava.model.serving_settings = ServingSettings(settings.bottleneck, settings.num_heads)
    try:
        with pytest.raises(ValueError, match="was trained without questions: leave question_ids out"):
            llava.model(**llava.prompt(), **FAST, question_ids=[[1]])
    finally:
        llava.model.serving_settings = settings


def test_other_types_and_folders_without_the_file_are_refused(tiny, llava, tmp_path):
    import shutil

    gemma = AutoModelForImageTextToText.from_pretrained(tiny("gemma3"))
    with pytest.raises(ValueError, match="no serving router runs in a gemma3 model: it is made and tested for llava"):
        served(type(gemma))(gemma.config)
    folder = tmp_path / "model"
    shutil.copytree(llava.folder, folder, ignore=shutil.ignore_patterns("serving_router"))
    with pytest.raises(OSError, match=r"has no serving_router/model.safetensors: fetch the serving router's folder"):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
