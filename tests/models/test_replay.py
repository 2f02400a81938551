"""Running layers one at a time is the model's own forward pass, in every family."""

from __future__ import annotations

import pytest
import torch
from fixtures.checkpoints import FAMILIES

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor
from exporter.data.batches import make_batches
from exporter.data.calibration import load_calibration
from exporter.models.answers import AnswerDivergence, answered
from exporter.models.capture import attention_means, layer_statistics
from exporter.models.loading import load_model, text_decoder
from exporter.models.replay import last_output, logits, trace, walk


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tiny, questions):
    source = open_source(str(tiny(request.param)))
    model, _ = load_model(source, "cpu", torch.float32)
    processor = load_processor(source.folder)
    samples = load_calibration(str(questions), samples=6).samples
    return model, list(make_batches(samples, processor, source.config, 3))


def test_replayed_layers_give_the_models_logits(opened):
    model, batches = opened
    layers = text_decoder(model).layers
    for batch in batches:
        given = trace(model, batch)
        replayed = logits(model, last_output(walk(layers, given), given.entry))
        with torch.no_grad():
            expected = model(**batch.inputs, use_cache=False).logits
        real = batch.inputs["attention_mask"].bool()
        torch.testing.assert_close(replayed[real], expected[real], atol=1e-5, rtol=1e-5)


def test_left_out_layer_is_an_identity(opened):
    model, (batch, *_) = opened
    layers = text_decoder(model).layers
    given = trace(model, batch)
    skipped = last_output(walk(layers, given, leave_out={3}), given.entry)
    forward = layers[3].forward
    layers[3].forward = lambda hidden_states, **_: hidden_states
    try:
        with torch.no_grad():
            expected = model(**batch.inputs, use_cache=False).logits
    finally:
        layers[3].forward = forward
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, skipped)[real], expected[real], atol=1e-5, rtol=1e-5)


def test_attention_means_are_those_of_the_full_map_and_change_nothing(opened):
    model, (batch, *_) = opened
    decoder = text_decoder(model)
    with torch.no_grad():
        expected_logits = model(**batch.inputs, use_cache=False).logits
        with attention_means(model) as reducer:
            reducer.is_visual, reducer.is_text = batch.is_visual, batch.is_text
            got_logits = model(**batch.inputs, use_cache=False).logits
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(got_logits[real], expected_logits[real], atol=2e-4, rtol=1e-4)
    last = reducer.take()

    decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(**batch.inputs, use_cache=False, output_attentions=True).attentions[-1].mean(1)  # [B, S, S]
    finally:
        decoder.set_attn_implementation("sdpa")
    visual, text = batch.is_visual.float(), batch.is_text.float()
    from_visual = torch.einsum("bi,bij->bj", visual, maps) / visual.sum(1, keepdim=True).clamp(min=1)
    to_text = torch.einsum("bij,bj->bi", maps, text) / text.cumsum(1).clamp(min=1)
    torch.testing.assert_close(last.visual_from_visual * visual, from_visual * visual, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last.text_to_text * text, to_text * text, atol=1e-5, rtol=1e-4)


def test_statistics_do_not_count_padding_or_depend_on_the_batch(opened):
    model, batches = opened
    together = next(iter(layer_statistics(model, batches[:1])))
    samples = batches[0].samples
    assert together.cosine.shape[0] == len(text_decoder(model).layers)
    assert not (together.is_visual & together.is_text).any()
    padding = ~batches[0].inputs["attention_mask"].bool()
    assert not (together.is_text & padding).any()
    assert (together.visual_scores[:, padding] == 0).all()
    assert len(samples) == 3


def test_removal_loss_shares_prefixes_without_changing_them(opened):
    model, batches = opened
    loss = AnswerDivergence.of(model, [answered(model, batch, 4) for batch in batches[:1]])
    sets = [frozenset(layers) for layers in ((1, 4), (3, 4), (0,), (), (1, 3), (5,), (1, 4))]
    alone = [loss.of_sets([dropped])[0] for dropped in sets]
    assert loss.of_sets(sets) == pytest.approx(alone, rel=1e-4)
    assert alone[3] == 0 and min(alone[:3]) > 0
