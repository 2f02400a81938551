"""The original LLaVA format: converted to what an independent reference computes, or refused in one sentence."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.checkpoints import recipe
from fixtures.originals import (
    HEADS,
    LAYERS,
    LLAVA,
    TOWER,
    change_config,
    change_tensors,
    pickle_weights,
    write_json,
    write_llava,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from exporter import InputError, compress, convert, reproduce, verify
from exporter.checkpoints.record import read_record
from exporter.clean_room import encode, load_processor
from exporter.cli.entry import main

Weights = dict[str, Tensor]


# --- the reference: what the original code computes, in plain torch ---------------------------------------------------


def clip_features(weights: Weights, pixels: Tensor) -> Tensor:
    """Patches of the last layer but one: [N, 3, H, W] -> [N, P, D]."""
    w = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    patches = F.conv2d(pixels, w["embeddings.patch_embedding.weight"], stride=TOWER["patch_size"])
    x = patches.flatten(2).transpose(1, 2)
    first = w["embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w["embeddings.position_embedding.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm(x, "pre_layrnorm")
    heads = TOWER["num_attention_heads"]
    for layer in range(TOWER["num_hidden_layers"] - 1):  # the last layer's output is not read
        at = f"encoder.layers.{layer}"
        y = norm(x, f"{at}.layer_norm1")
        q, k, v = (linear(y, f"{at}.self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        seen = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), f"{at}.self_attn.out_proj")
        y = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{at}.mlp.fc2")
    return x[:, 1:]


def llava_logits(weights: Weights, tower: Weights, ids: Tensor, image_id: int, pixels: Tensor) -> Tensor:
    """Logits [S, V] of one prompt [S] whose runs of `image_id` stand for the pictures' patches."""
    features = clip_features(tower, pixels)
    for map_idx in (0, 2):
        projector = f"model.mm_projector.{map_idx}"
        features = F.linear(features, weights[f"{projector}.weight"], weights[f"{projector}.bias"])
        features = F.gelu(features) if map_idx == 0 else features
    is_image = ids == image_id
    x = F.embedding(ids.masked_fill(is_image, 0), weights["model.embed_tokens.weight"])
    x[is_image] = features.flatten(0, 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + LLAVA["rms_norm_eps"])

    size = x.shape[-1] // HEADS
    angles = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)  # [S, size / 2]

    def rotate(x: Tensor) -> Tensor:  # [h, S, size]
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (F.linear(y, weights[f"{at}.self_attn.{which}_proj.weight"]).unflatten(-1, (-1, size)).transpose(0, 1)
                   for which in "qkv")  # fmt: skip
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(HEADS // len(t), 0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(size)).masked_fill(future, -math.inf)
        x = x + F.linear(
            (torch.softmax(scores, -1) @ v).transpose(0, 1).flatten(1), weights[f"{at}.self_attn.o_proj.weight"]
        )
        y = norm(x, f"{at}.post_attention_layernorm")
        gate = F.silu(F.linear(y, weights[f"{at}.mlp.gate_proj.weight"]))
        x = x + F.linear(gate * F.linear(y, weights[f"{at}.mlp.up_proj.weight"]), weights[f"{at}.mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm"), weights["lm_head.weight"])


def padded_pixels(image: Image.Image) -> Tensor:
    """The original's pictures: padded to a square with CLIP's mean, scaled, normalized."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    scaled = square.resize((TOWER["image_size"],) * 2, Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(scaled)) / 255  # [H, W, 3]
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` without the clean process at its end, which takes seconds."""
    monkeypatch.setattr("exporter.conversion.convert.require", lambda *_: None)


def picture(size: tuple[int, int]) -> Image.Image:
    noise = torch.randint(0, 256, (5, 5, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("inside", [False, True], ids=["tower given", "tower inside"])
@pytest.mark.usefixtures("unchecked")
def test_it_computes_what_the_original_does(tmp_path, inside):
    folder = write_llava(tmp_path / "llava", tower_inside=inside)
    made = convert(folder, tmp_path / "made", vision_tower=tmp_path / "llava-tower")
    stored, tower = load_file(folder / "model.safetensors"), load_file(tmp_path / "llava-tower" / "model.safetensors")
    if inside:
        prefix = "model.vision_tower.vision_tower."
        tower = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    processor, image = load_processor(made), picture((56, 40))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the cat?"}]}]
    inputs = encode(processor, [chat], [[image]])
    pixels = padded_pixels(image)
    assert (inputs["pixel_values"][0] - pixels).abs().max() < 0.02  # a step of 1/255 where a resize rounds otherwise
    model = AutoModelForImageTextToText.from_pretrained(made).eval()
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    wanted = llava_logits(stored, tower, inputs["input_ids"][0], image_id, inputs["pixel_values"])
    assert (inputs["input_ids"] == image_id).sum() == 25
    assert (logits[:, : wanted.shape[1]] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # rows that were added are never likelier than the unknown token
    unknown = logits[:, processor.tokenizer.unk_token_id, None]
    assert (logits[:, wanted.shape[1] :] - unknown).abs().max() < 1e-5


@pytest.mark.usefixtures("unchecked")
def test_the_prompt_is_the_originals(llava, tmp_path):
    made = convert(llava, tmp_path / "made", vision_tower=f"{llava}-tower")
    processor = load_processor(made)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("questions. USER: <image>\na? ASSISTANT: b</s>USER: c? ASSISTANT:")
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant. The assistant")
    assert processor.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *chat], tokenize=False
    ).startswith("Be brief. USER:")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_pickles_give_the_same_bytes(llava, tmp_path):
    made = convert(llava, tmp_path / "made", vision_tower=f"{llava}-tower")
    before = {name: t for path in made.glob("*.safetensors") for name, t in load_file(path).items()}
    pickle_weights(llava)
    with pytest.raises(InputError, match=r"pickled weights only .* nothing but its tensors with --allow-pickle"):
        convert(llava, tmp_path / "again", vision_tower=f"{llava}-tower")
    again = convert(llava, tmp_path / "again", vision_tower=f"{llava}-tower", allow_pickle=True)
    after = {name: t for path in again.glob("*.safetensors") for name, t in load_file(path).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.clean_process
def test_from_the_command_line_to_a_smaller_model(llava, tmp_path, questions, capsys):
    out = tmp_path / "made"
    arguments = ["convert", llava, "--out", out, "--vision-tower", f"{llava}-tower", "--json", tmp_path / "told.json"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "converted from the original LLaVA format, 4 decoder layers" in capsys.readouterr().out
    assert json.loads((tmp_path / "told.json").read_text())["format"] == "the original LLaVA format"
    assert verify(out).holds
    record = read_record(out)
    assert {"config.json", "model.safetensors", "vision_tower/model.safetensors"} <= record.source.files.keys()
    assert (out / "LICENSE").exists() and "in the original LLaVA format" in (out / "README.md").read_text()
    assert reproduce(out, tmp_path / "again").identical
    small = compress(recipe(out, questions), tmp_path / "small")
    assert read_record(small).source.files["config.json"] == record.measured.files["config.json"]
    change_config(llava, mm_vision_select_layer=-1)
    with pytest.raises(InputError, match=r"is not the source .* config.json differs"):
        reproduce(out, tmp_path / "third")
    assert not (tmp_path / "third").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", "compress", "route", "bench", "onnx"])
def test_it_is_recognised_wherever_a_model_is_given(command, llava, tmp_path, questions, capsys):
    data = ["--calibration", str(questions)] if command in ("score", "compress", "route") else []
    more = ["--out", str(tmp_path / "out")] if command in ("compress", "route", "onnx") else []
    assert main([command, str(llava), *data, *more, *(["--drop-layers", "1"] if command == "compress" else [])]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`lvlm-exporter convert {llava} --out DIR` converts it" in line and "llava-hf/llava-1.5-7b-hf" in line


def text_of(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def without(name: str):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def with_config(**changes):
    return lambda folder: change_config(folder, **changes)


def as_newline(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.image_newline": torch.ones(64)}))


REFUSED = {
    "another architecture": (with_config(architectures=["LlavaMptForCausalLM"]), "which is not"),
    "mistral": (with_config(architectures=["LlavaMistralForCausalLM"]), "llava-v1.6-mistral"),
    "unknown architecture": (with_config(architectures=["LlavaLlamaTwoForCausalLM"]), "names the architecture"),
    "no original": (with_config(architectures=["GPT"], mm_vision_tower=None), "no format that is conv"),
    "tiles": (with_config(image_aspect_ratio="anyres"), "is LLaVA 1.6 .* take llava-hf/llava-v1.6-vicuna"),
    "newlines": (as_newline, "LLaVA 1.6"),
    "a linear projector": (with_config(mm_projector_type="linear"), "has the projector 'linear'"),
    "no projector type": (with_config(mm_projector_type=None), "has the projector 'linear'"),
    "unknown projector": (with_config(mm_projector_type="resampler"), "has the projector 'resampler'"),
    "tokens around images": (with_config(mm_use_im_start_end=True), "<im_start> and <im_end>"),
    "another selection": (with_config(mm_vision_select_feature="slicefour"), "='slicefour'; patch or"),
    "another aspect": (with_config(image_aspect_ratio="squash"), "image_aspect_ratio='squash'"),
    "no width": (with_config(hidden_size=None), "no number under hidden_size"),
    "no projector": (without("model.mm_projector.2.weight"), "no tensor model.mm_projector.2.weight"),
    "no head": (without("lm_head.weight"), "missing keys .*lm_head"),
    "a layer less": (without("model.layers.3.mlp.up_proj.weight"), "missing keys .*up_proj"),
    "wrong width": (with_config(intermediate_size=96), "another shape"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "damaged config": (text_of("config.json", "{"), "is no JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "damaged tokenizer": (text_of("tokenizer.json", "{"), "tokenizer does not load"),
    "damaged weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged|truncated|no safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_one_sentence(row, llava, tmp_path):
    change, message = REFUSED[row]
    change(llava)
    with pytest.raises(InputError, match=message):
        convert(llava, tmp_path / "made", vision_tower=f"{llava}-tower")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "llava-tower"]


def tower_config(**changes):
    def change(tower: Path) -> None:
        write_json(tower / "config.json", json.loads((tower / "config.json").read_text()) | changes)

    return change


def other_tensors(tower: Path) -> None:
    save_file({"x": torch.ones(1)}, tower / "model.safetensors", {"format": "pt"})


TOWERS = {
    "not given": (None, "holds no vision tower, config.json names 'some/clip': give it with --vision-tower"),
    "no folder": (shutil.rmtree, "neither a folder nor a hub id|not in the local hub cache"),
    "another kind": (tower_config(model_type="siglip"), "is a 'siglip', and the vision tower .* is a CLIP model"),
    "no settings": (tower_config(vision_config={}), "does not say hidden_size"),
    "no tower in it": (other_tensors, "no tensor of a CLIP vision tower"),
    "another size": (tower_config(vision_config={**TOWER, "hidden_size": 16}), "another shape"),
    "a layer too many": (tower_config(vision_config={**TOWER, "num_hidden_layers": 4}), "missing keys .*vision_tower"),
}  # fmt: skip


@pytest.mark.parametrize("row", TOWERS)
@pytest.mark.usefixtures("unchecked")
def test_a_tower_is_never_random(row, llava, tmp_path):
    change, message = TOWERS[row]
    tower = tmp_path / "llava-tower"
    if change is not None:
        change(tower)
    with pytest.raises(InputError, match=message):
        convert(llava, tmp_path / "made", vision_tower=None if change is None else tower)
    assert not (tmp_path / "made").exists()


def test_a_tower_without_settings_asks_for_them(tmp_path):
    folder = write_llava(tmp_path / "llava", tower_inside=True)
    with pytest.raises(InputError, match="holds a vision tower and not its settings"):
        convert(folder, tmp_path / "made")


class Runs:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["RUNS"])),))


PICKLES = {
    "a program": (lambda path: torch.save({"model.norm.weight": Runs()}, path), "can't be read as tensors alone"),
    "no tensors": (lambda path: torch.save([1, 2], path), "holds a list, not tensors"),
    "a number": (lambda path: torch.save({"step": 3}, path), "holds int under 'step'"),
    "rubbish": (lambda path: path.write_bytes(b"PK rubbish"), "can't be read as tensors alone"),
    "empty": (lambda path: path.write_bytes(b""), "can't be read as tensors alone"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "missing": (lambda path: path.unlink(), "lacks 1 of its 2 pickled shards"),
}


@pytest.mark.parametrize("row", PICKLES)
def test_of_pickles_only_tensors_are_read(row, llava, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "it ran"))
    pickle_weights(llava)
    write, message = PICKLES[row]
    write(llava / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputError, match=message):
        convert(llava, tmp_path / "made", vision_tower=f"{llava}-tower", allow_pickle=True)
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "made").exists()
