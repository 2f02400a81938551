"""Greedy means greedy: an answer depends on the weights and the prompt, not on what generation_config.json asks for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from exporter.checkpoints.source import open_source
from exporter.clean_room import GENERATION_TOKENS, greedy_answers, load_processor, reference_answer
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.evaluation.evaluate import evaluate
from exporter.models.answers import answered
from exporter.models.loading import load_model

ENTRIES = {
    "bad_words_ids": [[10]],
    "begin_suppress_tokens": [10, 11, 12, 13],
    "cache_implementation": "static",
    "custom_generate": "nobody/nothing",
    "diversity_penalty": 0.5,
    "do_sample": True,
    "dola_layers": "low",
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 5.0,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "exponential_decay_length_penalty": [1, 9.0],
    "forced_bos_token_id": 10,
    "forced_eos_token_id": 10,
    "guidance_scale": 1.5,
    "length_penalty": 3.0,
    "max_length": 3,
    "max_new_tokens": 1,
    "max_time": 0.00001,
    "min_length": 500,
    "min_new_tokens": 500,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_beam_groups": 2,
    "num_beams": 4,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 9.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[10], 50.0]],
    "stop_strings": ["dog"],
    "suppress_tokens": list(range(60, 160)),
    "temperature": 9.0,
    "token_healing": True,
    "top_k": 1,
    "typical_p": 0.2,
    "use_cache": False,
    "watermarking_config": {"bias": 90.0},
}


@pytest.fixture(scope="module")
def subject(tiny, questions):
    """A model, a batch of questions, and what it answers under the generation config that it was built with."""
    source = open_source(str(tiny("llava")))
    model, _ = load_model(source, "cpu", torch.float32)
    samples = load_calibration(str(questions), samples=3).samples
    batch = make_batch(samples, load_processor(source.folder), model.config)
    return (
        model,
        batch,
        greedy_answers(model, batch.inputs, 6),
        reference_answer(model, load_processor(source.folder)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_no_entry_of_the_generation_config_changes_an_answer(name, subject):
    model, batch, answers, reference = subject
    own = model.generation_config
    ids = {key: getattr(own, key) for key in GENERATION_TOKENS}
    model.generation_config = GenerationConfig(**ids)
    setattr(model.generation_config, name, ENTRIES[name])  # as one of its loaders does: without any validation
    changed = model.generation_config
    try:
        assert torch.equal(greedy_answers(model, batch.inputs, 6), answers)
        one = answered(model, batch, 6)
        assert torch.equal(one.batch.inputs["input_ids"][:, -answers.shape[1] :], answers)
        processor = load_processor(model.config._name_or_path)
        assert reference_answer(model, processor) == reference
        assert model.generation_config is changed  # the model is given back as it was
    finally:
        model.generation_config = own


def test_token_ids_do_count(subject):
    model, batch, answers, _ = subject
    own = model.generation_config
    stop = int(answers[0, 1])
    model.generation_config = GenerationConfig(eos_token_id=[stop, 9999], pad_token_id=0, bos_token_id=1)
    try:
        assert greedy_answers(model, batch.inputs, 6)[0].tolist()[:3] in (
            [*answers[0, :2].tolist(), 0],
            answers[0, :2].tolist(),
        )
    finally:
        model.generation_config = own


def test_a_token_id_that_is_none(subject):
    model, batch, answers, _ = subject
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=-1)
    try:
        assert torch.equal(greedy_answers(model, batch.inputs, 6), answers)
        model.generation_config.eos_token_id = "</s>"
        with pytest.raises(ValueError, match="eos_token_id is '</s>', which is no token id"):
            greedy_answers(model, batch.inputs, 6)
    finally:
        model.generation_config = own


@pytest.mark.parametrize("entry", ["sequence_bias", "return_dict_in_generate", "stop_strings"])
def test_evaluation_of_a_folder_with_such_a_file(entry, tiny, questions, tmp_path):
    folder = shutil.copytree(tiny("llava"), tmp_path / "model")
    task = tmp_path / "task.jsonl"
    lines = [json.loads(line) for line in questions.read_text().splitlines()[:3]]
    task.write_text(
        "".join(
            json.dumps(line | {"image": str(questions.parent / line["image"]), "answer": "red"}) + "\n"
            for line in lines
        )
    )
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: ENTRIES[entry]}))
    first, second = (
        evaluate([place], task, max_new_tokens=4, update_cards=False).models[0].answers
        for place in (tiny("llava"), folder)
    )
    assert first == second
