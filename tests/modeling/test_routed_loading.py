"""A routed folder as its users load it: in either order with the plain class, in a pipeline, with adapters on it.

What a model does under a route is tested in test_routed.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.routed import CLOSE, Case, hf_home, make_case, seen_by_router
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import SIZES, conversation, random_image
from transformers import AutoModelForImageTextToText, pipeline

from exporter.clean_room import extend
from exporter.modeling.modeling_routed import ROUTER_FILE
from exporter.models.loading import text_decoder

BUDGET = {"keep_visual_tokens": 5, "keep_layers": 4}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def case(tiny, tmp_path_factory) -> Case:
    return make_case("llava", tiny("llava"), tmp_path_factory.mktemp("routed") / "model", drop_at=1)


def load(case: Case, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(case.folder, trust_remote_code=True, **options)


# --- loading ----------------------------------------------------------------------------------------------------------

ORDERS = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
folder, inputs = sys.argv[1], torch.load(sys.argv[2])
load = AutoModelForImageTextToText.from_pretrained
said = []
for how in sys.argv[3:]:
    if how == "stock":
        model = LlavaForConditionalGeneration.from_pretrained(folder)
    else:
        model = load(folder, trust_remote_code=how == "routed")
    options = {"preset": "off"} if how == "routed" else {}
    said.append([type(model).__name__, model.generate(**inputs, max_new_tokens=5, **options).tolist()])
print(json.dumps(said))
"""


@pytest.mark.clean_process
@pytest.mark.parametrize("order", [("routed", "plain", "stock"), ("stock", "plain", "routed")], ids=lambda o: o[0])
def test_either_order_in_one_process(order, case, tmp_path):
    """Without trust in remote code the folder is the plain model, whose answers are those of preset='off'."""
    batch = case.prompts()
    torch.save(dict(batch), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", ORDERS, str(case.folder), str(tmp_path / "inputs.pt"), *order]
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=hf_home(tmp_path))
    assert made.returncode == 0, made.stderr
    expected = case.plain.generate(**batch, max_new_tokens=5).tolist()
    names = {"routed": "RoutedLlavaForConditionalGeneration"}
    assert json.loads(made.stdout) == [
        [names.get(how, "LlavaForConditionalGeneration"), expected] for how in order
    ]  # fmt: skip


def test_half_precision_and_placement_at_once(case, tmp_path):
    """dtype, attention and device_map as people combine them; saved again in that dtype."""
    model = load(case, dtype=torch.bfloat16, device_map="auto", attn_implementation="eager")
    assert model.config.get_text_config()._attn_implementation == "eager"
    made = model.generate(**case.prompts(), **BUDGET, max_new_tokens=3, return_dict_in_generate=True)
    assert [len(kept) for kept in made.route.kept_tokens()] == [5, 5, 5]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / ROUTER_FILE, "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for (name, tensor), expected in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_pipeline_answers_a_conversation(case):
    """Images in the chat, budgets among the options of generate; a preset that is not known is refused."""
    model = load(case)
    pipe = pipeline("image-text-to-text", model=model, processor=case.processor)
    image = random_image(np.random.default_rng(3), SIZES[0])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is the digit?"}]
    chat = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 4, "do_sample": False, "preset": "fast"}
    with seen_by_router(model) as seen:
        said = pipe(text=chat, return_full_text=False, generate_kwargs=options)
    assert len(seen) == 1
    inputs = case.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    said = said[0]["generated_text"].strip()  # the pipeline cuts the prompt off as text, and leaves a space
    assert said == case.processor.decode(tokens, skip_special_tokens=True)
    with pytest.raises(ValueError, match="preset 'turbo' is not known"):
        pipe(text=chat, generate_kwargs={**options, "preset": "turbo"})


def test_a_budget_that_a_pipeline_keeps_to_itself_is_missed(case, monkeypatch):
    """transformers hands keywords that it does not know to the chat template: the model can say that it got none."""
    said: list[str] = []
    monkeypatch.setattr("logging.Logger.warning_once", lambda _, message: said.append(message))
    model = load(case)
    pipe = pipeline("image-text-to-text", model=model, processor=case.processor)
    chat = [{"role": "user", "content": [{"type": "text", "text": "what color is the digit?"}]}]
    pipe(text=chat, preset="turbo", generate_kwargs={"max_new_tokens": 1})
    assert [message for message in said if "budget" in message] == [
        "No budget reached `generate`: it runs under 'off', this checkpoint's default. If you passed one to a "
        "pipeline, pass it as generate_kwargs={'preset': 'off'}. The presets are off, quality, balanced, fast, "
        "token-only, layer-only; `set_budget` chooses one for all calls."
    ]
    pipe(text=chat, generate_kwargs={"max_new_tokens": 1, "keep_layers": 5})
    model.set_budget("fast")
    pipe(text=chat, generate_kwargs={"max_new_tokens": 1})
    pipeline("image-text-to-text", model=load(case, preset="off"), processor=case.processor)(
        text=chat, generate_kwargs={"max_new_tokens": 1}
    )
    assert len([message for message in said if "budget" in message]) == 1


def test_text_alone_is_answered_by_the_plain_model(case):
    """By a model whose default is a budget too, and in a batch of one."""
    model = load(case)
    model.set_budget("fast")
    batch = case.prompts([0], images={0: 0})
    assert "pixel_values" not in batch
    assert torch.equal(model.generate(**batch, max_new_tokens=4), case.plain.generate(**batch, max_new_tokens=4))


# --- a second image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral3"])
def test_the_router_sees_where_the_tokens_of_a_later_image_lie(family, tiny, tmp_path):
    """Images of any shape, on a cache that holds a turn already; the whole conversation is handed over.

    transformers itself cannot do that with mRoPE, which asks for the grids of earlier images too.
    """
    case = make_case(family, tiny(family), tmp_path / "model", drop_at=0)
    random = np.random.default_rng(0)
    shown = [random_image(random, SIZES[i]) for i in (1, 0)]
    first, second = (case.processor(text=[_turn(case, [i])], images=[[i]], return_tensors="pt") for i in shown)
    made = case.model.generate(**first, **BUDGET, max_new_tokens=3, return_dict_in_generate=True)
    answer = made.sequences[:, first["input_ids"].shape[1] :]
    said = extend(dict(first), answer, torch.ones_like(answer, dtype=torch.bool), family)
    text = [name for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids") if name in said]
    whole = {**second, **{name: torch.cat([said[name], second[name]], 1) for name in text}}
    with seen_by_router(case.model) as seen:
        case.model.generate(**whole, **BUDGET, max_new_tokens=2, past_key_values=made.past_key_values)
    expected = case.model.route(**second, **BUDGET).coordinates
    ((_, visual, _, places),) = seen
    torch.testing.assert_close(places[visual], expected[case.visual(second)])


def _turn(case: Case, images: list[Any]) -> str:
    return case.processor.apply_chat_template(conversation(images, "what is it?"), add_generation_prompt=True)


# --- adapters ---------------------------------------------------------------------------------------------------------


def labelled(case: Case) -> dict[str, torch.Tensor]:
    batch = case.prompts()
    answer = torch.tensor([[9, 10, 11]] * 3)
    inputs = extend(batch, answer, torch.ones_like(answer, dtype=torch.bool), "llava")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = answer
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("targets", [LORA["target_modules"], "all-linear"], ids=["some", "all-linear"])
def test_lora_is_trained_under_a_budget(targets, case, tmp_path):
    """Steps with labels lower the loss; the router has no gradient and stays as it is, whatever modules are named."""
    torch.manual_seed(0)
    base = load(case)
    router = {name: tensor.clone() for name, tensor in base.router.state_dict().items()}
    config = LoraConfig(**{**LORA, "init_lora_weights": True, "target_modules": targets}, exclude_modules=r"router\..*")
    model = get_peft_model(base, config).train()
    inputs = labelled(case)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        output = model(**inputs, **BUDGET)
        output.loss.backward()
        skipped = {i for i in range(6) if not output.route.layers[:, i].any()}
        for layer_idx, layer in enumerate(text_decoder(base).layers):
            gradient = layer.mlp.down_proj.lora_B["default"].weight.grad
            assert bool(gradient is not None and gradient.abs().sum() > 0) == (layer_idx not in skipped)
        assert all(p.grad is None for p in base.router.parameters())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(output.loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, router[name]) for name, tensor in base.router.state_dict().items())
    check_adapter_travels(model.eval(), case, tmp_path)


def check_adapter_travels(model: Any, case: Case, folder: Any) -> None:
    """Saved by itself and put on a fresh model; merged, and saved as a routed folder."""
    batch = case.prompts()
    expected = model.generate(**batch, **BUDGET, max_new_tokens=4)
    logits = model(**batch, **BUDGET).logits
    model.save_pretrained(folder / "adapter")
    assert not (folder / "adapter" / ROUTER_FILE).exists()
    again = PeftModel.from_pretrained(load(case), folder / "adapter").eval()
    torch.testing.assert_close(again(**batch, **BUDGET).logits, logits, **CLOSE)
    merged = again.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    names = [set(safe_open(f / "model.safetensors", "pt").keys()) for f in (case.folder, folder / "merged")]
    assert names[0] == names[1]
    loaded = AutoModelForImageTextToText.from_pretrained(folder / "merged", trust_remote_code=True)
    assert torch.equal(loaded.generate(**batch, **BUDGET, max_new_tokens=4), expected)


def test_adapters_of_transformers_itself(case, tmp_path):
    """`add_adapter`: what is saved is the adapter alone."""
    torch.manual_seed(0)
    model = load(case)
    try:
        model.add_adapter(LoraConfig(**LORA))
    except ValueError as error:  # transformers 5.24 asks for a release of PEFT that is not out yet
        pytest.skip(str(error))
    batch = case.prompts()
    with torch.no_grad():
        expected = model(**batch, **BUDGET).logits
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
        assert not (tmp_path / ROUTER_FILE).exists()
        again = load(case)
        again.load_adapter(str(tmp_path))
        torch.testing.assert_close(again(**batch, **BUDGET).logits, expected, **CLOSE)
        again.disable_adapters()
        torch.testing.assert_close(again(**batch, preset="off").logits, case.plain(**batch).logits, **CLOSE)
