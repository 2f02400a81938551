"""mPLUG-Owl2: our modeling file computes what an independent reference does, and keeps the hub's names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.checkpoints import not_verified, recipe
from fixtures.mplug_owl2 import ABSTRACTOR, QUERIES, TOWER, owl_logits
from fixtures.originals import change_config, change_tensors, pickle_weights
from fixtures.own_types import healed_smaller, labelled
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from exporter import InputError, compress, convert, evaluate, push, reproduce, verify
from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.clean_room import encode, load_processor
from exporter.cli.entry import main
from exporter.data.batches import Batch
from exporter.fold import reconstruction
from exporter.models.loading import load_model
from exporter.models.replay import last_output, logits, trace, walk
from exporter.plan import LayerBudget
from exporter.recipe import Method

IMAGE = "<|image|>"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the clean process at the end of `convert` and `compress`, which takes seconds."""
    for module in ("conversion.convert", "pipeline"):
        monkeypatch.setattr(f"exporter.{module}.require", not_verified)


@pytest.fixture
def made(mplug_owl2: Path, tmp_path: Path, unchecked: None) -> Path:
    return convert(mplug_owl2, tmp_path / "made")


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (5, 5, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((30, 50), Image.Resampling.NEAREST)


def prompts(folder: Path, *asked: tuple[str, int]):
    """Questions, each with so many pictures, as one batch with padding."""
    processor = load_processor(folder)
    chats = [
        [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}]
        for text, pictures in asked
    ]
    images = [[picture(10 * row + column) for column in range(count)] for row, (_, count) in enumerate(asked)]
    return processor, encode(processor, chats, images)


def by_reference(folder: Path, inputs, processor, layers=range(4)):
    """The reference's logits of each sequence, [S of its own, V]."""
    weights = load_file(folder / "model.safetensors")
    image_id, left = processor.tokenizer.convert_tokens_to_ids(IMAGE), list(inputs.get("pixel_values", ()))
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        count = int((ids == image_id).sum()) // (QUERIES + 1)
        yield owl_logits(weights, ids[mask], image_id, left[:count], layers)
        left = left[count:]


def close(ours, wanted) -> bool:
    return bool((ours - wanted).abs().max() < 1e-4 * wanted.abs().max())


MIXED = (("what color is the cat", 1), ("describe", 0), ("is there a red square", 2))


@pytest.mark.parametrize("asked", [MIXED, (("what color is the cat", 0), ("describe", 0))])
def test_it_computes_what_the_original_does(asked, made, mplug_owl2):
    processor, inputs = prompts(made, *asked)
    model, ignored = load_model(open_source(str(made)), "cpu", torch.float32)
    assert not ignored
    with torch.no_grad():
        ours = model(**inputs).logits
    for row, wanted in enumerate(by_reference(mplug_owl2, inputs, processor)):
        assert close(ours[row][inputs["attention_mask"][row].bool()], wanted)


def test_both_modalities_count(made, mplug_owl2):
    """The weights for pictures change nothing in a prompt without any, and everything behind one."""
    processor, inputs = prompts(made, ("what color is the cat", 1))
    changed = load_file(mplug_owl2 / "model.safetensors")
    for name in changed:
        if "multiway.1" in name:
            changed[name] = changed[name].roll(1, 0)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    (wanted,) = by_reference(mplug_owl2, inputs, processor)
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    first = int((ids == image_id).nonzero()[0])
    other = owl_logits(changed, ids, image_id, pixels)
    assert torch.equal(other[:first], wanted[:first]) and not close(other[-1], wanted[-1])
    text = ids[ids != image_id]
    assert torch.equal(owl_logits(changed, text, image_id, []),
                       owl_logits(load_file(mplug_owl2 / "model.safetensors"), text, image_id, []))  # fmt: skip


def test_what_is_generated_is_text(made, mplug_owl2):
    """The logits from the cache are those of the reference without one, of each sequence of a padded batch."""
    processor, inputs = prompts(made, *MIXED)
    model, _ = load_model(open_source(str(made)), "cpu", torch.float32)
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
                            return_dict_in_generate=True)  # fmt: skip
    new = torch.ones(len(MIXED), 4, dtype=torch.long)
    whole = {**inputs, "input_ids": answer.sequences, "attention_mask": torch.cat([inputs["attention_mask"], new], 1)}
    for row, wanted in enumerate(by_reference(mplug_owl2, whole, processor)):
        decoded = torch.stack([step[row] for step in answer.logits])
        assert close(decoded, wanted[-5:-1])


@pytest.mark.parametrize("leave_out", [(), (1,), (0, 2)])
def test_layers_run_one_by_one_know_the_modality(leave_out, made, mplug_owl2):
    processor, inputs = prompts(made, *MIXED)
    model, _ = load_model(open_source(str(made)), "cpu", torch.float32)
    visual = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)
    traced = trace(model, Batch(dict(inputs), visual, ~visual, ()))
    assert all(torch.equal(keywords["modality"][..., 0], visual) for keywords in traced.keywords)
    output = last_output(walk(model.model.layers, traced, leave_out=frozenset(leave_out)), traced.entry)
    ours, kept = logits(model, output), [layer for layer in range(4) if layer not in leave_out]
    for row, wanted in enumerate(by_reference(mplug_owl2, inputs, processor, kept)):
        assert close(ours[row][inputs["attention_mask"][row].bool()], wanted)


def test_pictures_without_places_are_said(made):
    _, inputs = prompts(made, ("the cat", 1))
    model, _ = load_model(open_source(str(made)), "cpu", torch.float32)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 5, features: 10"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match="5 tokens stand for pictures, and there are no pixel_values"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64), pixel_values=inputs["pixel_values"])


# --- what is written --------------------------------------------------------------------------------------------------


def test_names_and_configuration_stay_the_hubs(made, mplug_owl2):
    before, after = load_file(mplug_owl2 / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() - after.keys() == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)}
    assert all(torch.equal(before[name], after[name]) for name in after)
    config, raw = (json.loads((folder / "config.json").read_text()) for folder in (made, mplug_owl2))
    assert {key: value for key, value in config.items() if value != raw.get(key)} == {
        "image_token_index": raw["vocab_size"],
        "auto_map": {
            "AutoConfig": "modeling_mplug_owl2.MPLUGOwl2Config",
            "AutoModelForImageTextToText": "modeling_mplug_owl2.MPLUGOwl2ForConditionalGeneration",
        },
    }
    files = {path.name for path in made.iterdir()}
    assert {"LICENSE", "NOTICE", "modeling_mplug_owl2.py", "mplug_owl2_visual.py", "tokenizer.json"} <= files
    assert "Copyright (c) Meta Platforms" in (made / "NOTICE").read_text()
    card = (made / "README.md").read_text()
    assert "trust_remote_code=True" in card and "llama-2-community-license" in card


def test_a_picture_becomes_a_square_of_the_mean_and_deviation_beside_it(made):
    _, inputs = prompts(made, ("the cat", 1))
    pixels = np.asarray(picture(0).resize((24, 24), Image.Resampling.BICUBIC)) / 255
    wanted = torch.tensor((pixels - (0.4, 0.5, 0.6)) / (0.2, 0.3, 0.25)).permute(2, 0, 1)
    assert (inputs["pixel_values"][0] - wanted).abs().max() < 0.05  # one step of eight bits is 0.02


def test_the_prompts(made):
    processor, _ = prompts(made, ("a", 1))
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "c?"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == f"USER: {IMAGE}a? ASSISTANT: b</s>USER: {IMAGE}{IMAGE}c? ASSISTANT:"
    spoken = [{"role": "system", "content": "Be short."}, *chat[:1]]
    text = processor.apply_chat_template(spoken, add_generation_prompt=True, tokenize=False)
    assert text == f"Be short. USER: {IMAGE}a? ASSISTANT:"


def like_llamas(legacy: bool):
    """A tokenizer of letters that marks spaces as Llama's does: in front of each text of its own, or of the first."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:?.!,"
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>", *letters))}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_around_a_picture_are_the_originals(legacy, mplug_owl2, tmp_path, unchecked):
    """The original tokenizes what stands before and behind it as texts of their own, and strips their beginnings."""
    tokenizer = like_llamas(legacy)
    tokenizer.save_pretrained(mplug_owl2)
    made = convert(mplug_owl2, tmp_path / "made")
    processor, inputs = prompts(made, ("What is it?", 1))
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    behind = tokenizer("What is it? ASSISTANT:")["input_ids"][1:]
    assert inputs["input_ids"][0].tolist() == [*tokenizer("USER: ")["input_ids"], *[image_id] * 5, *behind]
    assert read_record(made).conversion.notes == () and processor.tokenizer.pad_token == "<unk>"


# --- what can be done with it -----------------------------------------------------------------------------------------


@pytest.mark.clean_process
def test_from_the_hubs_format_to_a_smaller_model(mplug_owl2, tmp_path, questions, capsys):
    pickle_weights(mplug_owl2)
    out = tmp_path / "made"
    assert main(["convert", str(mplug_owl2), "--out", str(out), "--allow-pickle"]) == 0
    assert "converted from mPLUG-Owl2's own format, 4 decoder layers" in capsys.readouterr().out
    assert verify(out).details["class"] == "MPLUGOwl2ForConditionalGeneration"
    assert reproduce(out, tmp_path / "again").identical
    small = compress(recipe(out, questions, budget=LayerBudget(drop_layers=1)), tmp_path / "small")
    checked = verify(small)
    assert checked.holds and checked.details["layers"] == 3
    assert json.loads((small / "config.json").read_text())["num_hidden_layers"] == 3
    assert (small / "NOTICE").exists() and (small / "modeling_mplug_owl2.py").exists() and (small / "LICENSE").exists()
    assert push(small, "somebody/small", dry_run=True)
    assert read_record(small).source.files["config.json"] == read_record(out).measured.files["config.json"]


@pytest.mark.parametrize("fold", ["none", "scp", "least_squares", "reconstruction"])
def test_layers_are_dropped_and_folded(fold, made, tmp_path, questions, monkeypatch):
    monkeypatch.setattr(reconstruction, "TOKENS_PER_INPUT", 0.5)  # six questions are few tokens
    small = compress(recipe(made, questions, budget=LayerBudget(layers=(2,)), fold=Method(fold)), tmp_path / "small")
    model, _ = load_model(open_source(str(small)), "cpu", torch.float32)
    processor, inputs = prompts(made, ("what color is the cat", 1))
    with torch.no_grad():
        ours = model(**inputs).logits[0]
    (wanted,) = by_reference(small, inputs, processor, range(3))
    assert close(ours, wanted)
    before, after = load_file(made / "model.safetensors"), load_file(small / "model.safetensors")
    changed = {n for n in after if re.match(r"model\.layers\.[01]\.", n) and not before[n].equal(after[n])}
    kinds = {name.split(".", 3)[3] for name in changed}
    assert kinds <= {"mlp.down_proj.weight", "self_attn.o_proj.weight"} and bool(kinds) == (fold != "none")


@pytest.mark.parametrize("localizer", ["tis", "block_influence"])
def test_it_is_scored(localizer, made, questions):
    assert main(["score", str(made), "--calibration", str(questions), "--samples", "4", "--localizer", localizer]) == 0


def test_it_is_evaluated(made, questions):
    assert evaluate([made], str(labelled(questions))) is not None


@pytest.mark.slow
def test_it_is_healed(made, tmp_path, questions, monkeypatch):
    small, healed, learnt = healed_smaller(made, questions, tmp_path, monkeypatch)
    assert load_file(healed / "model.safetensors").keys() == load_file(small / "model.safetensors").keys()
    assert (healed / "modeling_mplug_owl2.py").exists() and (healed / "mplug_owl2_visual.py").exists()
    assert {"input_layernorm.multiway.1.weight", "self_attn.k_proj.multiway.1.lora_A"} < learnt


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", "compress"])
def test_the_original_is_recognised(command, mplug_owl2, questions, tmp_path, capsys):
    more = ["--out", str(tmp_path / "out"), "--drop-layers", "1"] if command == "compress" else []
    assert main([command, str(mplug_owl2), "--calibration", str(questions), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`lvlm-exporter convert {mplug_owl2} --out DIR`" in line


def with_config(**changes):
    return lambda folder: change_config(folder, **changes)


def with_visual(part: str, **changes):
    parts = {"visual_model": TOWER, "visual_abstractor": ABSTRACTOR}
    return with_config(visual_config={**parts, part: parts[part] | changes})


def without(name: str):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def another_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"transformer.wte.weight": torch.ones(4)}))


PLACES = "model.visual_abstractor.encoder.layers.1.crossattention.attention.k_pos_embed"
REFUSED = {
    "text alone": (with_config(visual_config=None), "has no 'visual_model': it is no whole"),
    "no abstractor": (with_config(visual_config={"visual_model": TOWER}), "has no 'visual_abstractor'"),
    "quantized": (with_config(quantization_config={"bits": 4}), "is quantized, which"),
    "no width": (with_config(hidden_size=None), "config.json has no number under hidden_size"),
    "no queries": (with_visual("visual_abstractor", num_learnable_queries=None), "under num_learnable_queries"),
    "longer positions": (with_config(rope_scaling={"type": "linear", "factor": 2.0}), "says rope_scaling=.* has None"),
    "no class token": (with_visual("visual_model", use_cls_token=False), "says use_cls_token=False, and .* has True"),
    "another grid": (with_visual("visual_abstractor", grid_size=5), "a grid of 3 x 3 are needed"),
    "another tensor": (another_tensor, "holds the tensor transformer.wte.weight, which is none"),
    "one modality": (without("model.layers.0.self_attn.k_proj.multiway.1.weight"), "holds no keys of its own"),
    "no head": (without("lm_head.weight"), "missing keys .*lm_head"),
    "no places": (without(PLACES), "missing keys .*k_pos_embed"),
    "another size": (with_config(intermediate_size=64), "another shape"),
    "too many layers": (with_config(num_hidden_layers=5), "5 decoder layers, the weights hold 4"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "Owl 2.1": (with_config(model_type="mplug_owl2_1"), "in no format that is converted"),
}


@pytest.mark.parametrize("row", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_one_sentence(row, mplug_owl2, tmp_path):
    change, message = REFUSED[row]
    change(mplug_owl2)
    with pytest.raises(InputError, match=message):
        convert(mplug_owl2, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owl"]
