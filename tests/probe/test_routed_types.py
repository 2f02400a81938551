"""Model types that no table names, routed: a probe says which, and why others can't be."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exporter.errors import InputError
from exporter.modeling.routed_pass import RoutedForward
from exporter.probe import routed as probe
from exporter.probe.pictures import NoPicture, picture_prompts
from exporter.probe.routed import (
    as_routed,
    cache_of_pass,
    check_head,
    check_off,
    check_on,
    check_router,
    check_routes,
    check_structure,
    why_not_routed,
    with_short_windows,
)
from exporter.probe.stack import NoStack, build, final_norm
from exporter.probe.stock_layers import Stock, Unroutable, passed
from exporter.probe.tiny_config import tiny_config
from exporter.routing.settings import check_routable
from exporter.survey import trial
from exporter.survey.table import listed_findings, markdown
from exporter.survey.trial import Failed, TypeFindings, try_names, why_no_route

# One of each kind: Llama's layers; Cohere's, with windows; experts, visual features added between layers and three
# positions; queries and keys of another width than values; positions that count the pictures of a batch.
KINDS = ("vipllava", "aya_vision", "qwen3_vl_moe", "kimi_k25", "hunyuan_vl")
ROUTED = [found.model_type for found in listed_findings() if found.route is None and not found.listed]
REFUSED = {
    "qwen3_5": r"keep something else than keys and values of each token \(LinearAttentionLayer\), of which a token",
    "hy_v4_vl": r"keep something else than keys and values of each token \(DynamicIndexedLayer\)",
    "unlimited_ocr": r"\(UnlimitedOcrDynamicReferenceSlidingWindowLayer\), of which a token cannot be left out",
    "gemma4": r"each layer is given embeddings of its own \(Gemma4TextDecoderLayer takes 'per_layer_input'\)",
    "gemma4_unified": r"layers use the keys and values of earlier ones \(.* takes 'shared_kv_states'\)",
    "mllama": r"layers attend to the picture beside the text \(.* takes 'cross_attention_states'\)",
    "granite4_vision": r"features of the picture are added between layers that the configuration names",
    "ernie4_5_vl_moe": r"experts are chosen by which tokens are visual",
    "emu3": "its configuration names no token that stands for a picture's features",
    "llama4": "no picture could be put before its small model, which does not run without one",
}


def small(model_type: str):
    return build(with_short_windows(tiny_config(CONFIG_MAPPING[model_type](), 4)))


@pytest.fixture(scope="module")
def stock():
    model = small("qwen3_vl_moe")
    prompts, with_picture = picture_prompts(model)
    assert with_picture
    return Stock(model, prompts)


@pytest.fixture
def routed(stock):
    return as_routed(copy.deepcopy(stock.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [*KINDS, *(pytest.param(name, marks=pytest.mark.long_tail) for name in ROUTED if name not in KINDS)],
)
def test_routed_is_stock_layers_on_what_is_left(model_type):
    """Off bit for bit the stock model; under routes and the router within 1e-4; saved by the names of the hub."""
    assert why_no_route(TypeFindings(model_type)) is None


def test_more_than_forty_types_route():
    assert set(KINDS) <= set(ROUTED)
    assert sum(found.route is None for found in listed_findings()) >= 40


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_types_are_refused_with_the_reason(model_type):
    config = tiny_config(CONFIG_MAPPING[model_type](), 4)
    with pytest.raises(InputError, match=rf"a {model_type} model can't have a router: .*{REFUSED[model_type]}"):
        check_routable(config)


def test_types_of_the_tables_need_no_probe(monkeypatch):
    monkeypatch.setattr(probe, "tried", lambda *_: pytest.fail("it was tried"))
    assert why_not_routed(CONFIG_MAPPING["llava"]()) is None


def test_a_configuration_that_no_small_model_is_built_of_is_refused(monkeypatch):
    monkeypatch.setattr(probe, "tiny_config", lambda *_: 1 / 0)
    config = CONFIG_MAPPING["aya_vision"](image_token_id=7)
    assert why_not_routed(config) == "no small model could be made to look (division by zero)"


def test_the_table_says_what_was_routed_without_a_picture():
    alone = TypeFindings("fuyu", details={"routed_with_picture": False})
    text = markdown([alone, TypeFindings("aria", details={"routed_with_picture": True})])
    assert "`fuyu`: routed with placeholders alone; no picture could be made that its small model takes" in text
    assert "`aria`" not in text


# --- what is wrong is seen --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_are_given_the_wrong_positions_are_seen(stock, routed, monkeypatch):
    real = RoutedForward._tokens

    def shifted(self, positions, running):
        return real(self, positions if running is None else positions.roll(1, -2), running)

    monkeypatch.setattr(RoutedForward, "_tokens", shifted)
    with pytest.raises(Unroutable, match="with tokens dropped at layer 0 and layers skipped, its logits differ by"):
        check_on(stock, routed, 0)


@torch.no_grad()
def test_a_cache_that_holds_other_tokens_is_seen(stock, routed, monkeypatch):
    generated = probe.generated

    def other(model, batch, **options):
        made = generated(model, batch, **options)
        made.logits = [step + 0.1 for step in made.logits]
        return made

    monkeypatch.setattr(probe, "generated", other)
    with pytest.raises(Unroutable, match="with a cache, tokens dropped at layer 2 and layers skipped, its logits"):
        check_on(stock, routed, 2)


@torch.no_grad()
def test_a_model_that_changes_without_a_budget_is_seen(stock, routed, monkeypatch):
    check_off(stock, routed)
    said = SimpleNamespace(sequences=torch.zeros(2, 3))
    monkeypatch.setattr(probe, "generated", lambda model, *_, **__: said if model is routed else Said())
    with pytest.raises(Unroutable, match="without a budget its routed model says something else than the stock one"):
        check_off(stock, routed)
    final_norm(routed).weight += 0.1
    with pytest.raises(Unroutable, match="without a budget its routed model gives other logits than the stock one"):
        check_off(stock, routed)


class Said:
    sequences = torch.ones(2, 3)


@torch.no_grad()
def test_a_budget_that_is_not_kept_is_seen(stock, routed, monkeypatch):
    check_router(stock, routed)
    monkeypatch.setattr("exporter.modeling.routed_pass.best_tokens", lambda scores, shown, **_: torch.ones_like(shown))
    with pytest.raises(Unroutable, match="a budget of half its visual tokens and a layer less is not kept"):
        check_router(stock, routed)


@torch.no_grad()
def test_layers_that_change_nothing_are_seen(stock, routed, monkeypatch):
    monkeypatch.setattr(probe, "refuse_gap", lambda *_: None)
    monkeypatch.setattr(probe, "close", lambda *_: True)
    with pytest.raises(Unroutable, match="what is left out changes nothing: it is not what its logits come from"):
        check_on(stock, routed, 0)


@torch.no_grad()
def test_a_head_of_another_kind_is_seen(stock, monkeypatch):
    check_head(stock)
    monkeypatch.setattr(stock.model, "logit_scale", 0.5, raising=False)
    with pytest.raises(Unroutable, match="its logits are made of the last layer's output in a way that is not known"):
        check_head(stock)


def test_names_and_weights_on_disk_are_the_stock_models(stock, monkeypatch):
    try_names(stock.model)
    monkeypatch.setattr(trial, "safe_names", lambda path: [str(path)])
    with pytest.raises(Failed, match="routed, it is saved under other names than the hub's"):
        try_names(stock.model)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(Failed, match=r"routed, it is loaded with another .*weight than was saved"):
        try_names(stock.model)


def test_a_model_that_fails_on_a_text_with_gaps_is_seen(stock, monkeypatch):
    monkeypatch.setattr(probe, "check_on", lambda *_: 1 / 0)
    with pytest.raises(Unroutable, match="does not run with fewer tokens and layers: division by zero"):
        check_routes(stock.model)


def test_what_a_router_needs_to_see_is_asked_for(stock, monkeypatch):
    """A cache, every layer once, pixels where features of them are added to layers, a known norm, known arguments."""
    with pytest.raises(Unroutable, match="it hands no cache on, in which a route could lie"):
        cache_of_pass(lambda **_: SimpleNamespace(), {})
    layers = stock.model.get_decoder().layers
    with pytest.raises(Unroutable, match="0 of its 4 layers run in a pass"):
        passed(Lazy(stock.model), {})
    monkeypatch.setattr("exporter.probe.pictures.picture_inputs", lambda _: iter(()))
    with pytest.raises(NoPicture, match="no picture could be put before its small model, whose layers are given"):
        check_routes(stock.model)
    with pytest.raises(NoStack, match="SimpleNamespace has no norm behind its layers by the name of norm, final_layer"):
        final_norm(SimpleNamespace(get_decoder=lambda: SimpleNamespace(layers=layers), config=stock.model.config))
    monkeypatch.setattr("exporter.modeling.routed_api.LAYER_TAKES", frozenset({"hidden_states"}))
    with pytest.raises(Unroutable, match=r"it is not known what stays of it when tokens leave \(Qwen3VLMoeTextDecoder"):
        check_structure(stock.model)


class Lazy:
    """A model that runs none of its layers."""

    def __init__(self, model):
        self.config, self.get_decoder = model.config, model.get_decoder

    def __call__(self, **_):
        return None
