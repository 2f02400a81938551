"""The shipped files and transformers: both names of the cache, and a refusal of what they do not know.

Every release from the floor to the newest runs these tests; what a coming one might change is put into the present one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures.routed import CLOSE, Case, generated, make_case
from transformers import AutoModelForImageTextToText, DynamicCache, cache_utils, conversion_mapping
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from exporter.checkpoints.source import open_source
from exporter.clean_room import extend
from exporter.errors import InputError
from exporter.modeling.routed_api import CACHE_NAMES, cache_of, checkpointing_spares_caches
from exporter.routing.folder import MODELING_FILES, MODELING_FOLDER, load_routed, routable

BUDGET = {"keep_visual_tokens": 5, "keep_layers": 4}
WHAT_TO_DO = (
    r"They were tested with transformers 5\.20\.0, 5\.23\.0, 5\.24\.0\. Install one of these "
    r"\(pip install 'transformers>=5\.20,<5\.25'\), or load the folder without trust_remote_code=True"
)


@pytest.fixture(scope="module")
def case(tiny, tmp_path_factory) -> Case:
    return make_case("llava", tiny("llava"), tmp_path_factory.mktemp("routed") / "model", drop_at=1)


def load(case: Case) -> Any:
    return AutoModelForImageTextToText.from_pretrained(case.folder, trust_remote_code=True)


# --- the cache under both names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_either_name(name, case):
    batch = case.prompts()
    made = generated(case, batch, **BUDGET)
    length = batch["input_ids"].shape[1]
    cache = DynamicCache(config=case.model.config.get_text_config())
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` counts
    with torch.no_grad():
        first = case.model(**batch, **BUDGET, position_ids=positions, use_cache=True, **{name: cache})
        token = first.logits[:, -1:].argmax(-1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        positions = mask.cumsum(1)[:, -1:] - 1
        step = case.model(input_ids=token, attention_mask=mask, position_ids=positions, **{name: cache})
    assert torch.equal(token, made.sequences[:, length : length + 1])
    torch.testing.assert_close(step.logits[:, -1], made.logits[1], **CLOSE)
    assert cache.route is not None and cache.get_seq_length() == length + 1


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_with_a_cache_under_either_name(name, case):
    batch = case.prompts()
    expected = generated(case, batch, **BUDGET)
    cache = DynamicCache(config=case.model.config.get_text_config())
    found = generated(case, batch, **BUDGET, **{name: cache})
    assert torch.equal(found.sequences, expected.sequences) and cache.route is found.route
    answer = found.sequences[:, batch["input_ids"].shape[1] :]
    whole = extend(batch, answer, torch.ones_like(answer, dtype=torch.bool), "llava")
    text = {key: whole[key] for key in ("input_ids", "attention_mask")}
    again = generated(case, text, **{name: cache})
    assert again.route is found.route and cache.get_seq_length() == again.sequences.shape[1] - 1


def test_no_call_is_warned_of_a_name(case):
    """transformers warns of the older name, which none of our own calls uses where there is a newer one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning, message=".*past_key_values.*")
        generated(case, case.prompts(), **BUDGET)
        case.model.route(**case.prompts(), **BUDGET)


def test_of_two_caches_the_newer_name_counts(case):
    cache, other = (DynamicCache(config=case.model.config.get_text_config()) for _ in range(2))
    with torch.no_grad():
        case.model(**case.prompts(), **BUDGET, cache=cache, past_key_values=other)
    assert cache.get_seq_length() and not other.get_seq_length()


def test_training_mode_without_gradients_has_the_cache_that_transformers_leaves(case):
    """Gradient checkpointing takes the cache from layers, in newer releases only where there is a gradient."""
    model = load(case).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # newer releases call it by the first name
    batch = case.prompts()
    with torch.no_grad():
        output = model(**batch, **BUDGET, use_cache=True)
        expected = case.model(**batch, **BUDGET).logits
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    held = cache_of(output)
    assert (held is not None) == checkpointing_spares_caches()
    assert held is None or held.get_seq_length() == batch["input_ids"].shape[1]


# --- a transformers that is not understood ----------------------------------------------------------------------------


def changed_forward(monkeypatch: pytest.MonkeyPatch, cls: Any, change: Any) -> None:
    """Give a class's forward another signature: `change` gets the list of its parameters."""
    forward = cls.forward
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    vars(changed)["__signature__"] = signature.replace(parameters=change(list(signature.parameters.values())))
    monkeypatch.setattr(cls, "forward", changed)


def required(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [*parameters[:1], inspect.Parameter("memory", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters[1:]]


def optional(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [*parameters[:-1], inspect.Parameter("tree", inspect.Parameter.KEYWORD_ONLY, default=None), parameters[-1]]


def renamed_cache(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [one.replace(name="kv") if one.name in CACHE_NAMES else one for one in parameters]


def without(name: str) -> Any:
    return lambda parameters: [one for one in parameters if one.name != name]


@pytest.mark.parametrize(
    ("cls", "change", "reason"),
    [
        (LlamaModel, required, r"LlamaModel\.forward takes an argument that they do not know, 'memory'"),
        (LlamaModel, optional, r"LlamaModel\.forward takes an argument that they do not know, 'tree'"),
        (LlamaDecoderLayer, required, r"LlamaDecoderLayer\.forward takes an argument that they do not know, 'memory'"),
        (LlamaModel, renamed_cache, r"LlamaModel\.forward takes an argument that they do not know, 'kv'"),
        (LlamaDecoderLayer, renamed_cache, r"LlamaDecoderLayer\.forward takes an argument .* 'kv'"),
        (LlamaDecoderLayer, without("position_embeddings"), r"forward has no argument 'position_embeddings'"),
        (LlamaModel, without("kwargs"), r"LlamaModel\.forward hands on no further keywords"),
    ],
)
def test_a_decoder_that_is_not_known_is_refused_when_loaded(cls, change, reason, case, monkeypatch):
    changed_forward(monkeypatch, cls, change)
    message = rf"do not understand transformers {transformers.__version__}: .*{reason}.*{WHAT_TO_DO}"
    with pytest.raises(ValueError, match=message):
        load(case)
    with pytest.raises(InputError, match=reason):
        load_routed(open_source(str(case.folder)), "cpu", torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(case.folder)
    with pytest.raises(InputError, match=reason):
        routable(plain)


def shorter(self: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
    return query_length, 0


@pytest.mark.parametrize(
    ("cls", "name", "value", "reason"),
    [
        (cache_utils.Cache, "get_mask_sizes", shorter, "DynamicCache.layers and get_mask_sizes work in another way"),
        (cache_utils.DynamicLayer, "crop", None, "keys, values and crop work in another way .*TypeError"),
        (cache_utils.Cache, "reorder_cache", lambda self, rows: None, "the methods of Cache work in another way"),
        (cache_utils.StaticLayer, "get_seq_length", lambda self: 0, "StaticLayer.max_cache_len and update"),
    ],
)
def test_a_cache_that_works_otherwise_is_refused_when_loaded(cls, name, value, reason, case, monkeypatch):
    monkeypatch.setattr(cls, name, value)
    with pytest.raises(ValueError, match=f"{reason}.*{WHAT_TO_DO}"):
        load(case)


@pytest.mark.parametrize(
    ("module", "name"),
    [(cache_utils, "StaticSlidingWindowLayer"), (conversion_mapping, "register_checkpoint_conversion_mapping")],
)
def test_a_missing_class_is_one_sentence_when_imported(module, name, monkeypatch):
    monkeypatch.delattr(module, name)
    with pytest.raises(ImportError, match=f"do not understand .*cannot import name '{name}'.*{WHAT_TO_DO}") as raised:
        freshly_imported(monkeypatch)
    assert raised.value.__suppress_context__ and "\n" not in str(raised.value)


def test_a_missing_module_is_one_sentence_when_imported(monkeypatch):
    """As in transformers 4.57."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(ImportError, match=rf"transformers\.conversion_mapping.*{WHAT_TO_DO}"):
        freshly_imported(monkeypatch)


def freshly_imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shipped files as a package of their own."""
    spec = importlib.util.spec_from_file_location(
        "fresh", MODELING_FOLDER / "__init__.py", submodule_search_locations=[str(MODELING_FOLDER)]
    )
    monkeypatch.setitem(sys.modules, "fresh", importlib.util.module_from_spec(spec))
    for name in MODELING_FILES:
        monkeypatch.delitem(sys.modules, f"fresh.{Path(name).stem}", raising=False)
    return importlib.import_module(f"fresh.{Path(MODELING_FILES[0]).stem}")


def test_a_budget_that_does_not_reach_the_decoder_is_no_answer(case, monkeypatch):
    stock = case.model._stock.forward

    def deaf(self: Any, *args: Any, routing: Any = None, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)

    model = load(case)
    monkeypatch.setattr(type(model)._stock, "forward", deaf)
    with pytest.raises(RuntimeError, match="the budget did not reach the decoder"):
        model.route(**case.prompts(), **BUDGET)


def test_layers_that_do_not_hear_of_the_route_are_no_answer(case):
    model = load(case)
    model.get_decoder().layers[0].__class__ = LlamaDecoderLayer
    with pytest.raises(RuntimeError, match="5 of 6 decoder layers were told of the route"):
        model(**case.prompts(), **BUDGET)


def test_packed_sequences_are_refused(case):
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"packed sequences \(cu_seq_lens_q\) cannot be routed"):
        case.model(**case.prompts([0]), **BUDGET, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
