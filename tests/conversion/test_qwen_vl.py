"""Qwen-VL: our modeling file computes what an independent reference does, and keeps the hub's names."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from fixtures.checkpoints import not_verified, recipe
from fixtures.originals import (
    LAYERS,
    QWEN,
    VISUAL,
    change_config,
    change_tensors,
    pickle_weights,
    tiktoken_ranks,
    write_qwen_vl,
)
from fixtures.own_types import healed_smaller, labelled
from fixtures.qwen_vl import qwen_logits
from PIL import Image
from safetensors.torch import load_file

from exporter import InputError, compress, convert, evaluate, push, reproduce, verify
from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.clean_room import encode, load_processor
from exporter.cli.entry import main
from exporter.conversion.tiktoken import make_tokenizer, read_ranks
from exporter.fold import reconstruction
from exporter.models.loading import load_model
from exporter.plan import LayerBudget


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the clean process at the end of `convert` and `compress`, which takes seconds."""
    for module in ("conversion.convert", "pipeline"):
        monkeypatch.setattr(f"exporter.{module}.require", not_verified)


@pytest.fixture
def made(qwen_vl: Path, tmp_path: Path, unchecked: None) -> Path:
    return convert(qwen_vl, tmp_path / "made")


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (5, 5, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((50, 70), Image.Resampling.NEAREST)


def prompts(folder: Path, *texts: str, pictures: int = 1):
    processor = load_processor(folder)
    chats = [
        [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}]
        for text in texts
    ]
    images = [[picture(10 * row + column) for column in range(pictures)] for row in range(len(texts))]
    return processor, encode(processor, chats, images if pictures else [[] for _ in texts])


@pytest.mark.parametrize("pictures", [1, 2])
def test_it_computes_what_the_original_does(made, qwen_vl, pictures):
    weights = load_file(qwen_vl / "model.safetensors")
    processor, inputs = prompts(made, "what color is the cat", "describe", pictures=pictures)
    pad = processor.tokenizer.convert_tokens_to_ids("<imgpad>")
    model, ignored = load_model(open_source(str(made)), "cpu", torch.float32)
    assert not ignored
    with torch.no_grad():
        logits = model(**inputs).logits
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        assert (ids == pad).sum() == 16 * pictures
        wanted = qwen_logits(weights, ids[mask], pad, inputs["pixel_values"].unflatten(0, (2, pictures))[row])
        assert (logits[row][mask] - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_answers_go_on_beyond_the_trained_length(made, qwen_vl):
    """Log-n attention from position 257 on, with the cache, as the reference has it without."""
    weights = load_file(qwen_vl / "model.safetensors")
    processor, inputs = prompts(made, "the cat " * 3)
    model, _ = load_model(open_source(str(made)), "cpu", torch.float32)
    new = 256 - inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=new + 4, min_new_tokens=new + 4, do_sample=False,
                            output_logits=True, return_dict_in_generate=True)  # fmt: skip
    pad = processor.tokenizer.convert_tokens_to_ids("<imgpad>")
    wanted = qwen_logits(weights, answer.sequences[0], pad, inputs["pixel_values"])
    decoded = torch.cat(answer.logits)
    assert answer.sequences.shape[1] == 260
    assert (decoded - wanted[-len(decoded) - 1 : -1]).abs().max() < 1e-4 * wanted.abs().max()


def test_longer_prompts_are_refused_aloud(made):
    _, inputs = prompts(made, "the cat " * 120)
    model, _ = load_model(open_source(str(made)), "cpu", torch.float32)
    with pytest.raises(
        ValueError, match=r"a prompt of \d+ tokens is longer than the 256 that Qwen-VL was trained with"
    ):
        model(**inputs)


def test_a_longer_question_is_named_by_its_line(made, tmp_path, capsys):
    picture(0).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": "the cat " * times} for times in (1, 120)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["score", str(made), "--calibration", str(tmp_path / "long.jsonl")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"long.jsonl line 2 makes a prompt of \d+ tokens, and the model takes 256", line)


def test_too_few_places_for_pictures_are_said(made):
    _, inputs = prompts(made, "the cat")
    model, _ = load_model(open_source(str(made)), "cpu", torch.float32)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 16, features: 32"):
        model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})


# --- what is written --------------------------------------------------------------------------------------------------


def test_names_and_configuration_stay_the_hubs(made, qwen_vl):
    before, after = load_file(qwen_vl / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config, raw = (json.loads((folder / "config.json").read_text()) for folder in (made, qwen_vl))
    assert {key: value for key, value in config.items() if value != raw.get(key)} == {
        "auto_map": {
            "AutoConfig": "modeling_qwen_vl.QWenVLConfig",
            "AutoModelForImageTextToText": "modeling_qwen_vl.QWenVLForConditionalGeneration",
        }
    }
    files = {path.name for path in made.iterdir()}
    assert {"LICENSE", "NOTICE", "qwen.tiktoken", "modeling_qwen_vl.py", "tokenizer.json"} <= files
    assert not {"modeling_qwen.py", "visual.py", "tokenization_qwen.py"} & files
    assert "Copyright (c) Alibaba Cloud" in (made / "NOTICE").read_text()
    first = len(tiktoken_ranks())
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == [first + 2, first + 1, first]
    assert "trust_remote_code=True" in (made / "README.md").read_text()


def read_by_vllm(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors and shapes that vLLM 0.22.1 loads into its QwenVLForConditionalGeneration, w2 and w1 taken apart."""
    width, inner, tower = QWEN["hidden_size"], QWEN["intermediate_size"] // 2, VISUAL["width"]
    out, wide, queries = VISUAL["output_dim"], int(tower * VISUAL["mlp_ratio"]), VISUAL["n_queries"]
    wanted: dict[str, tuple[int, ...]] = {"transformer.ln_f.weight": (width,)}
    for layer in range(layers):
        linear = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "mlp.c_proj": (width, inner),
                  "mlp.w1": (inner, width), "mlp.w2": (inner, width)}  # fmt: skip
        parts: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
        parts |= {"attn.c_attn.bias": (3 * width,), "ln_1.weight": (width,), "ln_2.weight": (width,)}
        wanted |= {f"transformer.h.{layer}.{name}": shape for name, shape in parts.items()}
    visual: dict[str, tuple[int, ...]] = {
        "conv1.weight": (tower, 3, VISUAL["patch_size"], VISUAL["patch_size"]),
        "positional_embedding": (256, tower), "proj": (out, out),
        "attn_pool.query": (queries, out), "attn_pool.pos_embed": (queries, out),
        "attn_pool.kv_proj.weight": (out, tower), "attn_pool.attn.in_proj_weight": (3 * out, out),
        "attn_pool.attn.in_proj_bias": (3 * out,), "attn_pool.attn.out_proj.weight": (out, out),
        "attn_pool.attn.out_proj.bias": (out,),
    }  # fmt: skip
    norms = {"ln_pre": tower, "ln_post": out, "attn_pool.ln_q": out, "attn_pool.ln_kv": out}
    for block in range(VISUAL["layers"]):
        at = f"transformer.resblocks.{block}"
        norms |= {f"{at}.ln_1": tower, f"{at}.ln_2": tower}
        for name, rows, columns in (("attn.in_proj", 3 * tower, tower), ("attn.out_proj", tower, tower),
                                    ("mlp.c_fc", wide, tower), ("mlp.c_proj", tower, wide)):  # fmt: skip
            visual |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (rows,)}
    visual |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    return wanted | {f"transformer.visual.{name}": shape for name, shape in visual.items()}


@pytest.mark.slow
def test_a_smaller_one_is_what_vllms_class_loads(made, tmp_path, questions):
    small = compress(recipe(made, questions, budget=LayerBudget(drop_layers=1)), tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    stored = {name: tuple(t.shape) for path in small.glob("*.safetensors") for name, t in load_file(path).items()}
    rows = (config["vocab_size"], QWEN["hidden_size"])
    assert stored == {"transformer.wte.weight": rows, "lm_head.weight": rows, **read_by_vllm(LAYERS - 1)}
    read = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_epsilon", "visual",
            "max_position_embeddings", "tie_word_embeddings", "model_type")  # fmt: skip
    before = json.loads((made / "config.json").read_text())
    assert {key: config[key] for key in read} == {key: before[key] for key in read}
    assert config["num_hidden_layers"] == LAYERS - 1


def test_the_prompts(made, tmp_path, unchecked):
    processor, _ = prompts(made, "a")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "c?"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <img><imgpad></img>\nPicture 2: <img><imgpad></img>\na?<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nPicture 3: <img><imgpad></img>\nc?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = convert(write_qwen_vl(tmp_path / "plain", chat=False), tmp_path / "plain-made")
    text = load_processor(plain).apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    assert text == "<img><imgpad></img><img><imgpad></img>a? Answer:"


def test_the_tokenizer_merges_as_tiktoken_does(qwen_vl):
    regex = pytest.importorskip("regex")
    ranks = read_ranks(qwen_vl / "qwen.tiktoken")
    tokenizer = make_tokenizer(ranks, ("<|endoftext|>",), pad_token="<|endoftext|>")
    pieces = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for text in (
        "what's the color there?",
        "  the  cat\n\n in 1234 é¢ 猫 corners ☺",
        "describe\timage\r\nred",
        "x" * 9,
    ):
        wanted = []
        for piece in regex.findall(pieces, text):
            parts = [bytes([byte]) for byte in piece.encode()]
            while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
                _, at = min(pairs)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            wanted += [ranks[part] for part in parts]
        assert tokenizer(text)["input_ids"] == wanted, text
        assert tokenizer.decode(wanted) == text


# --- what can be done with it -----------------------------------------------------------------------------------------


@pytest.mark.clean_process
def test_from_the_hubs_format_to_a_smaller_model(qwen_vl, tmp_path, questions, capsys):
    pickle_weights(qwen_vl)
    out = tmp_path / "made"
    assert main(["convert", str(qwen_vl), "--out", str(out), "--allow-pickle"]) == 0
    assert "converted from Qwen-VL's own format, 4 decoder layers" in capsys.readouterr().out
    assert verify(out).details["class"] == "QWenVLForConditionalGeneration"
    assert reproduce(out, tmp_path / "again").identical
    small = compress(recipe(out, questions, budget=LayerBudget(drop_layers=1)), tmp_path / "small")
    checked = verify(small)
    assert checked.holds and checked.details["layers"] == 3
    names = load_file(small / "model-00001-of-00002.safetensors").keys()
    assert all(re.match(r"transformer\.|lm_head\.", name) for name in names)
    assert json.loads((small / "config.json").read_text())["num_hidden_layers"] == 3
    assert (small / "NOTICE").exists() and (small / "modeling_qwen_vl.py").exists() and (small / "LICENSE").exists()
    assert push(small, "somebody/small", dry_run=True)
    assert read_record(small).source.files["config.json"] == read_record(out).measured.files["config.json"]


@pytest.mark.parametrize("fold", ["none", "scp", "least_squares", "reconstruction"])
def test_layers_are_dropped_and_folded(fold, made, qwen_vl, tmp_path, questions, monkeypatch):
    from exporter.recipe import Method

    monkeypatch.setattr(reconstruction, "TOKENS_PER_INPUT", 0.5)  # six questions are few tokens
    small = compress(recipe(made, questions, budget=LayerBudget(layers=(2,)), fold=Method(fold)), tmp_path / "small")
    model, _ = load_model(open_source(str(small)), "cpu", torch.float32)
    processor, inputs = prompts(made, "what color is the cat")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    pad = processor.tokenizer.convert_tokens_to_ids("<imgpad>")
    stored = load_file(small / "model.safetensors")
    assert all(not name.startswith("transformer.h.3.") for name in stored)
    wanted = qwen_logits(stored, inputs["input_ids"][0], pad, inputs["pixel_values"], layers=(0, 1, 2))
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    changed = [
        n
        for n, t in load_file(qwen_vl / "model.safetensors").items()
        if n.endswith("h.1.mlp.c_proj.weight") and not torch.equal(t, stored[n])
    ]
    assert bool(changed) == (fold != "none")


def test_it_is_scored_and_evaluated(made, tmp_path, questions, capsys):
    assert main(["score", str(made), "--calibration", str(questions), "--samples", "4", "--localizer", "tis"]) == 0
    assert evaluate([made], str(labelled(questions))) is not None


@pytest.mark.slow
def test_it_is_healed(made, tmp_path, questions, monkeypatch):
    small, healed, learnt = healed_smaller(made, questions, tmp_path, monkeypatch)
    assert load_file(healed / "model.safetensors").keys() == load_file(small / "model.safetensors").keys()
    assert (healed / "modeling_qwen_vl.py").exists() and (healed / "qwen_vl_visual.py").exists()
    assert {"ln_1.weight", "ln_2.weight"} < learnt and any("c_attn" in name for name in learnt)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score", "compress"])
def test_the_original_is_recognised(command, qwen_vl, questions, tmp_path, capsys):
    more = ["--out", str(tmp_path / "out"), "--drop-layers", "1"] if command == "compress" else []
    assert main([command, str(qwen_vl), "--calibration", str(questions), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`lvlm-exporter convert {qwen_vl} --out DIR`" in line


def with_config(**changes):
    return lambda folder: change_config(folder, **changes)


def without(name: str):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def vocabulary(text: str):
    return lambda folder: (folder / "qwen.tiktoken").write_text(text)


def without_a_byte(folder: Path) -> None:
    lines = (folder / "qwen.tiktoken").read_text().splitlines(keepends=True)
    (folder / "qwen.tiktoken").write_text("".join(lines[:200] + lines[201:]))


def another_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(4)}))


REFUSED = {
    "text alone": (with_config(visual=None), "a Qwen without a vision tower"),
    "quantized": (with_config(quantization_config={"bits": 4}), "is quantized, which"),
    "no width": (with_config(hidden_size=None), "no whole number under hidden_size"),
    "no tower width": (with_config(visual={**VISUAL, "width": None, "image_start_id": 7}), "no number under width"),
    "biases": (with_config(no_bias=False), "rotary_pct or biases"),
    "another start": (with_config(visual={**VISUAL, "image_start_id": 7}), "<img> is token .* image_start_id=7"),
    "no vocabulary": (lambda folder: (folder / "qwen.tiktoken").unlink(), r"has no qwen\.tiktoken"),
    "damaged vocabulary": (vocabulary("IQ== 0\n!! x\n"), "line 2 is no token with its rank"),
    "a byte less": (without_a_byte, "has no token for byte 200"),
    "another tensor": (another_tensor, "holds the tensor model.norm.weight, which is none of Qwen-VL's"),
    "no head": (without("lm_head.weight"), "missing keys .*lm_head"),
    "no norm": (without("transformer.visual.ln_post.weight"), "missing keys .*ln_post"),
    "another size": (with_config(intermediate_size=64), "another shape"),
    "too many layers": (with_config(num_hidden_layers=5), "5 decoder layers, the weights hold 4"),
}


@pytest.mark.parametrize("row", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_one_sentence(row, qwen_vl, tmp_path):
    change, message = REFUSED[row]
    change(qwen_vl)
    with pytest.raises(InputError, match=message):
        convert(qwen_vl, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen-vl"]


def test_a_converted_one_is_not_converted_again(made, tmp_path):
    with pytest.raises(InputError, match="in no format that is converted"):
        convert(made, tmp_path / "again")
