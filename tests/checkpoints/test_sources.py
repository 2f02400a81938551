"""Any checkpoint gives the right value or one sentence: each row damages a tiny checkpoint in one way, and says which.

A row is a name, what is done to the folder, and what must be said of it (a regular expression), or None where the
checkpoint must open. `change` gets the folder; `edit`, `tensors` and `header` are the tools.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from fixtures.checkpoints import FAMILIES
from fixtures.damage import (
    WEIGHTS,
    Change,
    both,
    check,
    config,
    edit,
    header,
    index,
    remove,
    shards,
    split,
    tensors,
    write,
)
from safetensors.torch import load_file

from exporter.checkpoints.source import open_source
from exporter.clean_room import load_processor, reference_inputs
from exporter.models.loading import load_model

FIRST = "language_model.model.layers.0.mlp.down_proj.weight"


# --- tools ------------------------------------------------------------------------------------------------------------


# --- weights ----------------------------------------------------------------------------------------------------------

QUIET = b"\x00" * 64
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WEIGHT_ROWS: dict[str, tuple[Change, str | None]] = {
    "as it is": (lambda folder: None, None),
    "two shards": (shards(), None),
    "empty file": (write(WEIGHTS, b""), "no safetensors file: its header would be 0 of its 0 bytes"),
    "zero bytes": (write(WEIGHTS, QUIET), "no safetensors file"),
    "a text": (write(WEIGHTS, "<html>not found</html>" * 9), "no safetensors file"),
    "git lfs pointer": (write(WEIGHTS, POINTER), "Git LFS pointer.*git lfs pull"),
    "a folder": (both(remove(WEIGHTS), lambda f: (f / WEIGHTS).mkdir()), "is a folder"),
    "a pipe": (both(remove(WEIGHTS), lambda f: os.mkfifo(f / WEIGHTS)), "no regular file"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 500_000), "it is truncated"),
    "too long": (lambda f: (f / WEIGHTS).open("ab").write(b"xx"), "it is damaged"),
    "huge header": (
        lambda f: os.truncate(f / WEIGHTS, 0) or (f / WEIGHTS).open("wb").write(struct.pack("<Q", 2 << 30)),
        "its header would be 2147483648",
    ),
    "header is a list": (header(lambda h, n: "[1, 2]"), "a list, not an object"),
    "header in UTF-16": (header(lambda h, n: "\udc00".encode("utf-16", "surrogatepass").decode("latin1")), "damaged"),
    "header nested too deep": (header(lambda h, n: "[" * 9999), "damaged safetensors header"),
    "unknown dtype": (header(lambda h, n: h[n[0]].update(dtype="Q4")), "dtype 'Q4'"),
    "dtype is a list": (header(lambda h, n: h[n[0]].update(dtype=["F32"])), "has the dtype"),
    "wider dtype": (header(lambda h, n: h[n[0]].update(dtype="F64")), r"\(F64 .* needs .* bytes and has"),
    "negative shape": (header(lambda h, n: h[n[0]].update(shape=[-1, 4])), r"has the shape \[-1, 4\]"),
    "shape of floats": (header(lambda h, n: h[n[0]].update(shape=[2.0])), r"has the shape \[2.0\]"),
    "shape of truth": (header(lambda h, n: h[n[0]].update(shape=[True])), "has the shape"),
    "enormous shape": (header(lambda h, n: h[n[0]].update(shape=[10**30])), "has the shape"),
    "overlap": (header(lambda h, n: h[n[1]].update(data_offsets=h[n[0]]["data_offsets"])), "needs|is due"),
    "offsets backwards": (header(lambda h, n: h[n[0]]["data_offsets"].reverse()), " at "),
    "three offsets": (header(lambda h, n: h[n[0]]["data_offsets"].append(9)), " at "),
    "no offsets": (header(lambda h, n: h[n[0]].pop("data_offsets")), "has no dtype, shape and data_offsets"),
    "a tensor that is a number": (header(lambda h, n: h.update({n[0]: 3})), "has no dtype"),
    "metadata is a list": (header(lambda h, n: h.update(__metadata__=[1])), "__metadata__"),
    "metadata of numbers": (header(lambda h, n: h.update(__metadata__={"a": 1})), "__metadata__"),
    "a name twice": (
        header(lambda h, n: json.dumps(h)[:-1] + f", {json.dumps(n[0])}: {json.dumps(h[n[0]])}}}"),
        "stands in it twice",
    ),
    "a hole": (header(lambda h, n: h.pop(n[2])), "is due"),
    # which files
    "single file and stale index": (both(split, remove("a.safetensors", "b.safetensors")), None),
    "index of the single file": (lambda f: index(dict.fromkeys(load_file(f / WEIGHTS), WEIGHTS))(f), None),
    "two sets with the same names": (split, None),
    "two sets of other names": (both(split, tensors(lambda t: t.pop(FIRST))), "two sets of weights that differ"),
    "consolidated beside it": (tensors(lambda t: t.clear(), to="consolidated.safetensors"), None),
    "index is empty": (shards(write("model.safetensors.index.json", "")), "it is empty"),
    "index is a list": (shards(write("model.safetensors.index.json", "[]")), "holds a list"),
    "index of a list": (shards(write("model.safetensors.index.json", '{"weight_map": []}')), "no 'weight_map'"),
    "index of numbers": (
        shards(index({"a": 3})),
        "names the weight file 3",
    ),
    "index leads outside": (shards(index({"a": "../x.safetensors"})), "outside the folder"),
    "index leads to the root": (shards(index({"a": "/etc/passwd"})), "a file of the folder is needed"),
    "index names a tensor too many": (shards(extra={"more.weight": "a.safetensors"}), "'more.weight' is not in a"),
    "shards without index": (
        both(
            shards(remove("model.safetensors.index.json")),
            lambda f: (f / "a.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        ),
        "but no model.safetensors.index.json",
    ),
    "a tensor in two shards": (
        shards(tensors(lambda t: t.update({FIRST: torch.zeros(64, 112)}), file="b.safetensors")),
        "holds '.*' twice, in a.safetensors and in b.safetensors",
    ),
    "named by config.json": (
        both(lambda f: (f / WEIGHTS).rename(f / "w.safetensors"), config(transformers_weights="w.safetensors")),
        None,
    ),
    "named outside": (config(transformers_weights="../w.safetensors"), "outside the folder"),
    "pickled": (both(remove(WEIGHTS), write("pytorch_model.bin", QUIET)), "pickled weights only"),
    "training state only": (both(remove(WEIGHTS), write("optimizer.pt", QUIET)), "holds no weights: neither"),
    "gguf": (both(remove(WEIGHTS), write("model-q4.gguf", QUIET)), "GGUF weights only"),
    "weights in a checkpoint of training": (
        lambda f: (f / "checkpoint-500").mkdir() or (f / WEIGHTS).rename(f / "checkpoint-500" / WEIGHTS),
        "there are some in .*/checkpoint-500",
    ),
    "training state beside weights": (
        both(
            write("optimizer.pt", QUIET),
            write("training_args.bin", QUIET),
            write("trainer_state.json", "{}"),
            lambda f: (f / "checkpoint-500").mkdir(),
        ),
        None,
    ),
    "adapter beside weights": (write("adapter_config.json", "{}"), "weights and an adapter beside them"),
    "adapter alone": (both(remove(WEIGHTS), write("adapter_config.json", "{}")), "an adapter .* and no weights"),
}


@pytest.mark.parametrize("row", WEIGHT_ROWS)
def test_weights(row, damaged):
    change, expected = WEIGHT_ROWS[row]
    check(damaged(change), expected)


def test_of_two_sets_the_one_that_transformers_loads_is_read(damaged, caplog):
    folder = damaged(both(split, tensors(lambda t: t.update({FIRST: t[FIRST] * 1.0005}))))
    source = open_source(str(folder))
    assert "model.safetensors is read" in caplog.text
    assert torch.equal(source.weights.read(FIRST), load_file(folder / WEIGHTS)[FIRST])
    model, _ = load_model(source, "cpu", torch.float32)
    assert torch.equal(model.get_decoder().layers[0].mlp.down_proj.weight, source.weights.read(FIRST))


# --- config.json ------------------------------------------------------------------------------------------------------

CONFIG_ROWS: dict[str, tuple[Change, str | None]] = {
    "empty": (write("config.json", ""), "it is empty"),
    "truncated": (write("config.json", '{"model_type": '), "is no JSON"),
    "a list": (write("config.json", "[]"), "holds a list"),
    "UTF-16": (write("config.json", "{}".encode("utf-16")), "no JSON in UTF-8"),
    "NaN": (write("config.json", '{"model_type": NaN}'), "NaN is no value of JSON"),
    "git lfs pointer": (write("config.json", POINTER), "Git LFS pointer"),
    "nested too deep": (write("config.json", "[" * 99999), "is no JSON"),
    "a folder": (both(remove("config.json"), lambda f: (f / "config.json").mkdir()), "is a folder"),
    "no type": (config(model_type=None), "has no model_type"),
    "type is a list": (config(model_type=["llava"]), r"no model_type \['llava'\]"),
    "text is a list": (config(text_config=[1]), r"text_config is \[1\], not an object"),
    "text is a text": (config(text_config="llama"), "text_config is 'llama', not an object"),
    "vision is a number": (config(vision_config=3), "vision_config is 3, not an object"),
    "layers in words": (config(text_config__num_hidden_layers="6"), "num_hidden_layers='6'; a positive whole"),
    "no layer": (config(text_config__num_hidden_layers=0), "num_hidden_layers=0; 1 to 1000"),
    "negative layers": (config(text_config__num_hidden_layers=-1), "num_hidden_layers=-1; 1 to 1000"),
    "a trillion layers": (config(text_config__num_hidden_layers=10**12), "num_hidden_layers=1000000000000; 1 to 1000"),
    "half a layer": (config(text_config__num_hidden_layers=5.5), "num_hidden_layers=5.5; a positive whole"),
    "a layer too many": (config(text_config__num_hidden_layers=7), "says 7 decoder layers, the weights hold 6"),
    "heads in words": (config(text_config__num_attention_heads="4"), "num_attention_heads='4'"),
    "heads that do not divide": (config(text_config__num_attention_heads=7), "can't build|another shape|not accepted"),
    "strict validation": (config(text_config__rms_norm_eps="small"), "config.json is not accepted.*rms_norm_eps"),
    "negative vocabulary": (config(text_config__vocab_size=-4), "vocab_size=-4"),
    "another vocabulary": (config(text_config__vocab_size=100), r"another shape .* \[\d+, 64\] instead of \[100, 64\]"),
    "another width": (config(text_config__intermediate_size=96), "another shape .* instead of"),
    "another activation": (config(text_config__hidden_act="nonsense"), "can't build a model.*nonsense"),
    "a vision layer too many": (config(vision_config__num_hidden_layers=3), "missing keys .*vision_tower"),
    "a million vision layers": (config(vision_config__num_hidden_layers=10**6), "vision_config says num_hidden_layers"),
    "tied to nothing": (both(config(tie_word_embeddings=True, text_config__tie_word_embeddings=True)), None),
    "no head": (tensors(lambda t: t.pop("language_model.lm_head.weight")), "missing keys .*lm_head"),
    "original LLaVA": (config(architectures=["LlavaLlamaForCausalLM"]), "original LLaVA .*llava-hf/llava-1.5-7b-hf"),
    "original LLaVA by its tower": (config(mm_vision_tower="openai/clip"), "original LLaVA format"),
    "original LLaVA by type": (
        config(model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"]),
        "llava-hf/llava-1.5-13b-hf",
    ),
    "Qwen-VL": (config(model_type="qwen"), "lvlm-exporter convert"),
    "mPLUG-Owl2": (config(model_type="mplug_owl2"), "mPLUG-Owl2 runs with a package of its own"),
    "flash attention": (config(attn_implementation="flash_attention_2"), None),
    "flash attention inside": (config(text_config___attn_implementation="flash_attention_3"), None),
    "quantized by a list": (config(quantization_config=[4]), "config.json is not accepted"),
    # placeholders
    "another placeholder": (config(image_token_index=7), "says image_token_index=7 .* Set image_token_index to 3"),
    "no placeholder": (config(image_token_index=None), "has no image_token_index, by default 32000"),
    "a placeholder of another key": (config(image_token_index=None, image_token_id=7), "Set image_token_id to 3"),
    "a placeholder twice": (config(image_token_id=3), None),
    "two placeholders": (config(image_token_id=7), "two placeholders, image_token_id=7 and image_token_index=3"),
    "a placeholder in words": (config(image_token_index="<image>"), "image_token_index='<image>'; the id"),
    "a placeholder beyond": (config(image_token_index=10**9), "no token of the tokenizer"),
    "negative placeholder": (config(image_token_index=-200), "image_token_index=-200"),
    "another selection": (
        config(vision_feature_select_strategy="full"),
        "says vision_feature_select_strategy='default'",
    ),
    "another patch": (config(vision_config__patch_size=4), "another shape|says patch_size=8"),
}


@pytest.mark.parametrize("row", CONFIG_ROWS)
def test_config(row, damaged):
    change, expected = CONFIG_ROWS[row]
    check(damaged(change), expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "gemma3", "paligemma", "smolvlm", "mistral3", "glm4v"])
def test_placeholders_of_other_families(family, damaged):
    def change(folder: Path) -> None:
        name = next(k for k in json.loads((folder / "config.json").read_text()) if k.startswith("image_token_i"))
        config(**{name: 0})(folder)

    check(damaged(change, family), "config.json says image_token_i.*=0 .* where pictures go")


@pytest.mark.parametrize("place", ["attn_implementation", "text_config___attn_implementation"])
def test_an_attention_that_is_not_here_is_left_out(place, damaged, caplog):
    source = open_source(str(damaged(config(**{place: "flash_attention_2"}))))
    assert "asks for the attention flash_attention_2" in caplog.text
    assert "flash" not in json.dumps(source.raw_config)
    model, _ = load_model(source, "cpu", torch.float32)
    assert model.config._attn_implementation == "sdpa"


# --- processor and tokenizer ------------------------------------------------------------------------------------------

SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
PROCESSOR_ROWS: dict[str, tuple[Change, str | None]] = {
    "no preprocessor_config.json": (remove("preprocessor_config.json"), "has no preprocessor_config.json. Copy its"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer .tokenizer.json or tokenizer.model.. Copy its"),
    "broken tokenizer": (write("tokenizer.json", "{"), "tokenizer.json is no JSON"),
    "another's tokenizer": (write("tokenizer.json", "{}"), "does not load .*Copy its"),
    "broken preprocessor": (write("preprocessor_config.json", "{"), "preprocessor_config.json is no JSON"),
    "a list for a processor": (write("processor_config.json", "[1]"), "processor_config.json holds a list"),
    "NaN for a mean": (write("preprocessor_config.json", '{"image_mean": NaN}'), "NaN is no value"),
    "empty tokenizer_config.json": (write("tokenizer_config.json", ""), "tokenizer_config.json is no JSON"),
    "an unknown class": (
        both(
            edit("processor_config.json", processor_class="LlavaGemmaProcessor"),
            edit("preprocessor_config.json", processor_class="LlavaGemmaProcessor"),
        ),
        "the processor class 'LlavaGemmaProcessor', which transformers does not have",
    ),
    "the old name of a class": (
        edit(
            "preprocessor_config.json",
            image_processor_type="CLIPFeatureExtractor",
            feature_extractor_type="CLIPFeatureExtractor",
        ),
        None,
    ),
    "no processor_config.json": (remove("processor_config.json"), None),
    **{f"no {name}": (edit("processor_config.json", **{name: None}), None) for name in SETTINGS},
    "another patch size": (edit("processor_config.json", patch_size=4), "patch_size=4, .* asks for 8"),
    "another number of class tokens": (edit("processor_config.json", num_additional_image_tokens=0), "asks for 1"),
    "another crop": (edit("preprocessor_config.json", crop_size={"height": 32, "width": 32}), "asks for 40"),
    "no padding token": (edit("tokenizer_config.json", pad_token=None), None),
    "a template that does not parse": (
        edit("chat_template.json", chat_template="{{"),
        "model: the chat template fails",
    ),
    "a template that raises": (edit("chat_template.json", chat_template="{{ 1 / 0 }}"), "fails .*division by zero"),
    "a template that refuses": (
        edit("chat_template.json", chat_template="{{ raise_exception('none') }}"),
        "chat template fails.*none",
    ),
}


@pytest.mark.parametrize("row", PROCESSOR_ROWS)
def test_processor(row, damaged, tiny):
    change, expected = PROCESSOR_ROWS[row]
    folder = damaged(change)
    check(folder, expected)
    if expected is None:  # and what is mended is as it was
        inputs = reference_inputs(load_processor(open_source(str(folder)).folder))
        as_it_was = reference_inputs(load_processor(tiny("llava")))
        assert all(torch.equal(inputs[name], as_it_was[name]) for name in as_it_was)


def test_a_tokenizer_larger_than_the_embeddings(damaged):
    def cut(content: dict[str, torch.Tensor]) -> None:
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            content[name] = content[name][:180]

    folder = damaged(both(tensors(cut), config(text_config__vocab_size=180)))
    check(folder, r"its tokenizer has \d+ tokens beyond the 180 embeddings")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"num_return_sequences": 2}, r"transformers refuses generation_config\.json \(.*num_return_sequences"),
        ({"max_new_tokens": "5"}, r"transformers refuses generation_config\.json \(.*not supported between"),
        ({"cache_implementation": "x"}, r"transformers refuses generation_config\.json \(.*cache_implementation"),
        ({"compile_config": {"a": 1}}, r"transformers refuses generation_config\.json \(.*compile_config"),
        ({"eos_token_id": [2, "</s>"]}, r"eos_token_id=\[2, '</s>'\], which is no token id"),
        ({"num_return_sequences": 2, "num_beams": 4, "do_sample": True, "pad_token_id": -1}, None),
    ],
)
def test_generation_configs_with_which_no_model_loads(entries, expected, damaged):
    check(damaged(edit("generation_config.json", **entries)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_checkpoints_are_left_alone(family, tiny):
    source = open_source(str(tiny(family)))
    assert source.folder == source.original == tiny(family)
