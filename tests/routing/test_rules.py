"""Routes by rule: FastV's attention is the model's own, draws belong to the question, and every rule runs.

Legend: B rows, S tokens, L layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from exporter.checkpoints.source import open_source
from exporter.data.batches import make_batch, make_batches
from exporter.data.calibration import read_samples
from exporter.errors import InputError
from exporter.modeling.routed_route import Budget
from exporter.models.loading import load_model, text_decoder
from exporter.routing.folder import load_routed, routable
from exporter.routing.rules import Rule, block_influences, drawn, fastv_scores, generators, make_route, par_actions

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
HALF = Budget(keep_visual_tokens=0.5, keep_layers=4)


@pytest.fixture
def samples(questions):
    return read_samples(str(questions))[:4]


def batch_of(case, samples):
    return make_batch(samples, case.processor, case.model.config)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("asked_by", ["last", "all"])
def test_fastv_scores_are_the_attention_of_the_second_layer(family, asked_by, routed, samples):
    case = routed(family)
    batch = batch_of(case, samples)
    eager = AutoModelForImageTextToText.from_pretrained(
        case.folder, attn_implementation="eager", trust_remote_code=False
    )
    with torch.no_grad():
        attention = eager.eval()(**batch.inputs, output_attentions=True).attentions[1].mean(1)  # [B, S, S]
    real = batch.inputs["attention_mask"].bool()
    expected = attention[:, -1] if asked_by == "last" else (attention * real[..., None]).sum(1) / real.sum(1)[:, None]
    for model in (case.model, case.plain):
        found = fastv_scores(model, batch, asked_by=asked_by)
        assert (found[~batch.is_visual] == -torch.inf).all()
        torch.testing.assert_close(found[batch.is_visual].exp(), expected[batch.is_visual], **CLOSE)


def test_fastv_looks_after_any_layer_and_runs_no_further(routed, samples):
    case = routed("llava")
    batch = batch_of(case, samples)
    ran = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, layer_idx=layer_idx: ran.append(layer_idx))
        for layer_idx, layer in enumerate(text_decoder(case.model).layers)
    ]
    try:
        scores = [fastv_scores(case.model, batch, layer=layer) for layer in (1, 2, 6)]
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 0, 1, *range(6)]
    assert not torch.equal(scores[0], scores[1])
    with pytest.raises(InputError, match="layer=7: FastV reads attention after 1 to 6 layers"):
        fastv_scores(case.model, batch, layer=7)
    with pytest.raises(InputError, match="asked_by='first' is not known: last, all"):
        fastv_scores(case.model, batch, asked_by="first")


def test_noise_is_gaussian_on_the_logarithm(routed, samples):
    case = routed("llava")
    batch = batch_of(case, samples)
    plain = fastv_scores(case.model, batch)
    noisy = fastv_scores(case.model, batch, noise=2.0, draws=generators(batch.samples, 0))
    expected = 2 * drawn(batch.is_visual, generators(batch.samples, 0))
    torch.testing.assert_close((noisy - plain)[batch.is_visual], expected[batch.is_visual], **CLOSE)
    numbers = drawn(torch.ones(1, 20_000, dtype=torch.bool), generators(batch.samples[:1], 0))
    assert abs(float(numbers.mean())) < 0.05 and abs(float(numbers.std()) - 1) < 0.05


@pytest.mark.parametrize("rule", ["random", "fastv+random", "fastv+shortgpt", "router", "router+shortgpt"])
def test_a_route_does_not_depend_on_the_batch(rule, routed, samples):
    case = routed("qwen2_vl")  # rows of different lengths
    influence = block_influences(case.model, [batch_of(case, samples)])
    together = make_route(case.model, batch_of(case, samples), HALF, Rule.parse(rule), influence=influence)
    for row, sample in enumerate(samples):
        alone = make_route(case.model, batch_of(case, [sample]), HALF, Rule.parse(rule), influence=influence)
        assert alone.kept_tokens()[0].tolist() == together.kept_tokens()[row].tolist()
        assert alone.executed_layers()[0] == together.executed_layers()[row]
        assert len(alone.executed_layers()[0]) == 4
        assert len(alone.kept_tokens()[0]) == round(0.5 * int(alone.visual.sum()))
        assert torch.equal(alone.kept_coordinates()[0], together.kept_coordinates()[row])


def test_random_routes_differ_by_question_and_seed(routed, samples):
    case = routed("llava")
    batch = batch_of(case, samples)
    first, same, other = (make_route(case.model, batch, HALF, Rule.parse("random"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.keep, same.keep) and torch.equal(first.layers, same.layers)
    assert not torch.equal(first.keep, other.keep)
    kept = {tuple(tokens.tolist()) for tokens in first.kept_tokens()}
    assert len(kept) == len(samples)


@pytest.mark.parametrize("drop_at", [None, 0])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_every_rule_runs(family, drop_at, routed, samples):
    case = routed(family)
    batch = batch_of(case, samples)
    influence = block_influences(case.model, [batch])
    for name in ("random", "fastv", "shortgpt", "fastv+shortgpt", "router+all", "all+router"):
        rule = Rule.parse(name, drop_at)
        tokens, layers = (None if part == "all" else value for part, value in ((rule.tokens, 4), (rule.layers, 5)))
        route = make_route(case.model, batch, Budget(tokens, layers), rule, influence=influence)
        with torch.no_grad():
            output = case.model(**batch.inputs, route=route)
        assert output.logits[:, -1].isfinite().all()
        assert output.route.drop_at == (drop_at if drop_at is not None else 2 if rule.tokens == "fastv" else 0)
        assert {len(row) for row in route.executed_layers()} == {layers or 6}
        assert all(
            len(row) == (tokens or int(v.sum())) for row, v in zip(route.kept_tokens(), batch.is_visual, strict=True)
        )


def test_shortgpt_skips_the_candidates_of_least_influence(routed, samples, tiny):
    case = routed("llava")
    batches = list(make_batches(samples, case.processor, case.model.config, 2))
    influence = block_influences(case.model, batches)
    cosine = torch.zeros(6, dtype=torch.double)
    count = 0
    for batch in batches:
        with torch.no_grad():
            states = case.plain(**batch.inputs, output_hidden_states=True).hidden_states
        counted = batch.is_visual | batch.is_text
        last: list[Any] = []
        handle = (
            text_decoder(case.plain).layers[-1].register_forward_hook(lambda _, __, out, last=last: last.append(out))
        )
        with torch.no_grad():
            case.plain(**batch.inputs)
        handle.remove()
        outputs = [*states[1:6], last[0][0] if isinstance(last[0], tuple) else last[0]]
        for layer in range(6):
            cosine[layer] += torch.cosine_similarity(states[layer], outputs[layer], dim=-1)[counted].double().sum()
        count += int(counted.sum())
    torch.testing.assert_close(influence, 1 - cosine / count, atol=1e-6, rtol=1e-5)
    route = make_route(case.model, batches[0], Budget(keep_layers=5), Rule.parse("shortgpt"), influence=influence)
    skipped = min((3, 4, 5), key=lambda layer: influence[layer])
    assert route.executed_layers() == [[layer for layer in range(6) if layer != skipped]] * 2


def test_par_actions(routed, samples):
    case = routed("llava", drop_at=2)
    batch = batch_of(case, samples)
    actions = list(par_actions(case.model, batch, Budget(0.5, 5)))
    assert len(actions) == 5
    assert all(action.drop_at == 2 for action in actions)
    assert len({tuple(action.keep[0].tolist()) for action in actions}) == 5
    again = list(par_actions(case.model, batch_of(case, samples[2:3]), Budget(0.5, 5)))
    for action, alone in zip(actions, again, strict=True):
        assert torch.equal(action.kept_tokens()[2], alone.kept_tokens()[0])
        assert action.executed_layers()[2] == alone.executed_layers()[0]
    quiet = next(iter(par_actions(case.model, batch, Budget(0.5, 5), noise=0.0)))
    by_rule = make_route(case.model, batch, Budget(0.5), Rule.parse("fastv"))
    assert torch.equal(quiet.keep, by_rule.keep)


def test_rows_without_images_run_whole(routed, samples):
    case = routed("llava")
    inputs = case.prompts([0, 1], images={0: 0, 1: 1})
    batch = batch_of(case, samples[:2])
    batch = type(batch)(inputs, case.visual(inputs), ~case.visual(inputs), batch.samples)
    influence = torch.arange(6.0)
    for name in ("random", "fastv+shortgpt", "router"):
        route = make_route(case.model, batch, HALF, Rule.parse(name), influence=influence)
        assert route.executed_layers()[0] == list(range(6)) and len(route.executed_layers()[1]) == 4
        with torch.no_grad():
            assert case.model(**inputs, route=route).logits[:, -1].isfinite().all()


def test_a_plain_model_follows_rules(routed, samples, tiny):
    case = routed("llava")
    source = open_source(str(tiny("llava")))
    model = routable(load_model(source, "cpu", torch.float32)[0])
    batch = batch_of(case, samples)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, case.plain(**batch.inputs).logits)
        route = make_route(model, batch, Budget(6, 5), Rule.parse("fastv+random"))
        expected = case.model(**batch.inputs, route=route).logits
        torch.testing.assert_close(model(**batch.inputs, route=route).logits, expected)
    assert torch.equal(model.generate(**batch.inputs, route=route, max_new_tokens=3),
                       case.model.generate(**batch.inputs, route=route, max_new_tokens=3))  # fmt: skip
    with pytest.raises(InputError, match="rule 'router' needs a router, and this model has none"):
        make_route(model, batch, HALF, Rule.parse("router"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_routed_folders_load_without_trusting_them(family, routed):
    case = routed(family)
    (case.folder / "modeling_routed.py").write_text("raise SystemExit('this was run')\n")
    model = load_routed(open_source(str(case.folder)), "cpu", torch.float32)
    batch = case.prompts()
    with torch.no_grad():
        expected = case.model(**batch, preset="fast")
        found = model(**batch, preset="fast")
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.route.keep, expected.route.keep)


def test_rules_that_will_not_do(routed, samples):
    case = routed("llava")
    batch = batch_of(case, samples)
    for text in ("fastvv", "fastv+", "shortgpt+fastv", "a+b+c"):
        with pytest.raises(InputError, match=r"is not known: router, random, fastv, shortgpt, or TOKENS\+LAYERS with"):
            Rule.parse(text)
    with pytest.raises(InputError, match="rule 'shortgpt' keeps all visual tokens"):
        make_route(case.model, batch, HALF, Rule.parse("shortgpt"))
    with pytest.raises(InputError, match="rule 'fastv' keeps all layers"):
        make_route(case.model, batch, HALF, Rule.parse("fastv"))
    with pytest.raises(InputError, match="measures layers on questions: give --calibration FILE"):
        make_route(case.model, batch, HALF, Rule.parse("random+shortgpt"))
    assert [str(Rule.parse(text)) for text in ("router+router", "fastv+all", "fastv+random")] == [
        "router", "fastv", "fastv+random"]  # fmt: skip
    assert str(Rule.parse("fastv", 0)) == "fastv at 0"
