"""The layout of transformers.js: graphs fed as the client feeds them, the files that it reads, and every refusal.

The client itself answers in `make js-test`.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from fixtures.client_graphs import answered_as_the_client_does
from fixtures.hub import NAME, pushed
from fixtures.onnx_folders import here as compared_here
from tiny_models import build, inputs, random_image

import exporter
from exporter import InputError
from exporter.benchmark.figures import BenchOptions
from exporter.clean_room import generate, load_processor
from exporter.cli.entry import main
from exporter.onnx import ExportOptions
from exporter.onnx.layouts import precisions, transformers_js
from exporter.onnx.layouts.client_files import GENERATION, PROCESSORS, readable_vocabulary
from exporter.onnx.manifest import read_manifest
from exporter.onnx.pipeline import export
from exporter.onnx.rows import SUPPORTED
from exporter.onnx.verification import verify

pytestmark = pytest.mark.onnx_export
LAYOUT = ExportOptions(layout="transformers.js")
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """client('llava', 'q4') is (checkpoint, folder for the client), compared with torch in this process."""
    made = {}

    def folders(family, quantize=None):
        if (family, quantize) not in made:
            place = tmp_path_factory.mktemp(f"client-{family}")
            source = build(family, place / "model", layers=3 if family == "gemma3" else 2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transformers_js, "validate", compared_here)
                made[family, quantize] = (
                    source,
                    export(source, place / "client", ExportOptions(layout="transformers.js", quantize=quantize)),
                )
        return made[family, quantize]

    return folders


def torch_model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # one whose features are marked
def test_graphs_fed_as_the_client_feeds_them_say_what_torch_says(family, client):
    source, folder = client(family)
    batch = inputs(load_processor(source), batch=2, seed=3)
    expected = generate(torch_model(source), batch, new_tokens=NEW_TOKENS).sequences[:, -NEW_TOKENS:]
    assert np.array_equal(answered_as_the_client_does(folder, batch, NEW_TOKENS), expected)


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_vl", "mistral3"])  # a kind of images each
def test_the_runner_says_what_torch_says(family, client):
    source, folder = client(family)
    batch = inputs(load_processor(source), batch=2, seed=3)
    expected = generate(torch_model(source), batch, new_tokens=NEW_TOKENS).sequences
    assert np.array_equal(
        exporter.onnx.load(folder).generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=()), expected
    )
    report = read_manifest(folder).validation
    assert report.equal_tokens == report.tokens >= 32


def test_qwen_calls_its_grid_as_the_client_does(client):
    """The client reads the layers of the first Qwen2-VL from the top of config.json, and feeds it another name."""
    _, folder = client("qwen2_vl")
    vision = onnxruntime.InferenceSession(folder / "onnx" / "vision_encoder.onnx")
    assert [value.name for value in vision.get_inputs()] == ["pixel_values", "grid_thw"]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == config["text_config"]["num_hidden_layers"] == 2


# --- pictures made square ---------------------------------------------------------------------------------------------

SIDE = 24  # of a tile of the tiny models


def test_a_square_picture_is_its_overview_and_its_one_tile(client):
    """What torch makes of a square picture is what the client shows; a picture of any shape is made square first."""
    source, folder = client("llava_onevision")
    own, mine = (inputs(load_processor(place), batch=2, sizes=[(SIDE, SIDE)]) for place in (source, folder))
    assert torch.equal(own["input_ids"], mine["input_ids"])
    assert own["pixel_values"].shape[1] == 2 and mine["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert all(torch.equal(own["pixel_values"][:, tile], mine["pixel_values"]) for tile in (0, 1))
    expected = generate(torch_model(source), own, new_tokens=NEW_TOKENS).sequences
    assert np.array_equal(answered_as_the_client_does(folder, mine, NEW_TOKENS), expected[:, -NEW_TOKENS:])
    runner = exporter.onnx.load(folder)
    for batch in (own, mine):
        assert np.array_equal(runner.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=()), expected)
    wide = inputs(load_processor(folder), sizes=[(2 * SIDE, SIDE)])
    assert wide["pixel_values"].shape == (1, 3, SIDE, SIDE) and wide["input_ids"].shape[1] == own["input_ids"].shape[1]
    card = (folder / "README.md").read_text()
    assert f"Every picture is made a square of {SIDE} x {SIDE} pixels" in card


def test_a_picture_in_tiles_has_no_place_in_these_graphs(client):
    source, folder = client("llava_onevision")
    tiles = inputs(load_processor(source), sizes=[(2 * SIDE, SIDE)])
    with pytest.raises(InputError, match=r"pixel_values \(1, 3, 3, 24, 24\).*folder's own processor, or resize it to"):
        exporter.onnx.load(folder).generate(**tiles, max_new_tokens=1)


def test_the_client_is_told_of_llava_next_by_a_name_that_it_knows(tmp_path, monkeypatch):
    """Questions that it is compared on are about square pictures, too, whatever their shape."""
    monkeypatch.setattr(transformers_js, "validate", compared_here)
    source = build("llava_next", tmp_path / "model", layers=2)
    for path in (source / "config.json", source / "preprocessor_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_grid_pinpoints": [[24, 24], [24, 48]]}))
    random_image(np.random.default_rng(0), (90, 30)).save(tmp_path / "wide.png")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": "wide.png", "question": "what is this?"}))
    options = ExportOptions(layout="transformers.js", calibration=str(questions))
    folder = export(source, tmp_path / "client", options)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["checkpoint_type"]) == ("llava", "llava_next")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    manifest = read_manifest(folder)
    assert manifest.model_type == "llava_next" and manifest.validation.tokens == 8 * (1 + 3 + 2 + 1)
    assert verify(folder).holds


# --- precisions -------------------------------------------------------------------------------------------------------


def test_every_precision_is_written_and_compared(client):
    source, folder = client("llava", "all")
    names = {path.name for path in (folder / "onnx").iterdir()}
    suffixes = ("", "_fp16", "_quantized", "_q4", "_q4f16")
    graphs = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    assert names == {f"{graph}{suffix}.onnx" for graph in graphs for suffix in suffixes}
    manifest = read_manifest(folder)
    assert list(manifest.precisions) == ["fp16", "q8", "q4", "q4f16"]
    assert manifest.precisions["fp16"].equal_tokens >= 0.9 * manifest.precisions["fp16"].tokens >= 0.9 * 32
    sizes = {suffix: (folder / "onnx" / f"decoder_model_merged{suffix}.onnx").stat().st_size for suffix in suffixes}
    assert sizes[""] > sizes["_fp16"] > sizes["_q4"] > sizes["_q4f16"]
    decoder = onnxruntime.InferenceSession(folder / "onnx" / "decoder_model_merged_q4f16.onnx")
    types = {value.name: value.type for value in decoder.get_inputs()}
    assert types["inputs_embeds"] == "tensor(float)" and types["past_key_values.0.key"] == "tensor(float16)"
    assert decoder.get_outputs()[0].type == "tensor(float)"
    batch = inputs(load_processor(source), batch=1)
    assert exporter.onnx.load(folder, precision="q4f16").generate(**batch, max_new_tokens=3).shape[1] > 3
    card = (folder / "README.md").read_text()
    assert "library_name: transformers.js" in card and 'dtype: "q4f16"' in card and "processor(image, text" in card


def test_half_precision_knows_positions_that_it_has_no_numbers_for(client):
    """3001 is not among the numbers of float16: angles made of it there turn keys by tenths of a radian."""
    _, folder = client("llava", "all")
    keys = []
    for suffix, dtype in (("", np.float32), ("_fp16", np.float16)):
        decoder = onnxruntime.InferenceSession(folder / "onnx" / f"decoder_model_merged{suffix}.onnx")
        shapes = {value.name: value.shape for value in decoder.get_inputs()}
        feed = {
            name: np.zeros((1, shape[1], 0, shape[3]), dtype) for name, shape in shapes.items() if name[:4] == "past"
        }
        embeds = np.random.default_rng(0).standard_normal((1, 4, shapes["inputs_embeds"][-1])).astype(np.float32)
        positions = np.arange(2999, 3003)[None]
        feed |= {"inputs_embeds": embeds, "attention_mask": np.ones((1, 4), np.int64), "position_ids": positions}
        keys.append(decoder.run(["present.1.key"], feed)[0].astype(np.float32))
    assert np.abs(keys[0] - keys[1]).max() < 0.01 * np.abs(keys[0]).max()


def test_a_precision_that_is_not_there(client):
    _, folder = client("llava")
    with pytest.raises(InputError, match=r"has no precision 'q4': fp32\."):
        exporter.onnx.load(folder, precision="q4")
    assert json.loads((folder / "config.json").read_text())["transformers.js_config"]["dtype"] == "fp32"


def test_large_weights_stand_in_files_that_the_client_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_js, "validate", compared_here)
    monkeypatch.setattr(precisions, "EXTERNAL_FROM", 50_000)
    monkeypatch.setattr(precisions, "CHUNK", 150_000)
    folder = export(build("llava", tmp_path / "model", layers=2), tmp_path / "client", LAYOUT)
    files = {path.name for path in (folder / "onnx").iterdir()}
    told = json.loads((folder / "config.json").read_text())["transformers.js_config"]["use_external_data_format"]
    assert told["decoder_model_merged.onnx"] > 1 and "embed_tokens.onnx" not in told
    chunks = {f"{name}_data" + (f"_{i}" if i else "") for name, count in told.items() for i in range(count)}
    assert files - chunks == {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    assert chunks <= files
    assert set(read_manifest(folder).files) == {f"onnx/{name}" for name in files}
    assert verify(folder).holds
    (folder / "onnx" / "decoder_model_merged.onnx_data_1").unlink()
    assert not verify(folder).holds
    with pytest.raises(InputError, match=r"decoder_model_merged\.onnx_data_1 is not there instead of \d+ bytes"):
        exporter.onnx.load(folder)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_those_that_the_client_reads(client):
    source, folder = client("llava")
    assert verify(folder).holds
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert (images["image_processor_type"], images["processor_class"]) == ("CLIPImageProcessor", "LlavaProcessor")
    assert images["size"] == {"shortest_edge": 40} and "image_processor" not in images
    settings = json.loads((folder / "processor_config.json").read_text())
    # It counts 5 x 5 patches and this: the class token is not taken off there.
    assert (settings["patch_size"], settings["num_additional_image_tokens"]) == (8, 0)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == load_processor(source).chat_template
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "WordPiece"
    assert (folder / "generation_config.json").is_file()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_vl", "mistral3", "gemma3"])
def test_the_folders_processor_prepares_what_the_checkpoints_does(family, client):
    source, folder = client(family)
    own, carried = (inputs(load_processor(place), batch=2, seed=1) for place in (source, folder))
    assert own.keys() == carried.keys()
    assert all(torch.equal(own[name], carried[name]) for name in own)


def test_words_are_word_pieces_that_split_no_word():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "dig": 1, "digit": 2, "it": 3, "is": 4}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    data = json.loads(plain.to_str())
    data["model"] = readable_vocabulary(data["model"])
    pieces = Tokenizer.from_str(json.dumps(data))
    for text in ("dig it", "digit is digits", "digit" * 40, "digis"):
        assert plain.encode(text).ids == pieces.encode(text).ids


def test_marks_of_training_leave_the_template():
    assert GENERATION.sub("", "a{% generation %}b{%- endgeneration -%}c") == "abc"


# --- on the hub -------------------------------------------------------------------------------------------------------


def test_the_hub_shows_it_as_a_model_for_transformers_js(client, here, capsys):
    _, folder = client("llava", "all")
    assert NAME in pushed(capsys, folder, NAME)
    published = here.repos[NAME].files()
    assert {"onnx/decoder_model_merged_q4.onnx", "preprocessor_config.json", "tokenizer.json"} <= set(published)
    card = published["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers.js" and metadata["pipeline_tag"] == "image-text-to-text"
    assert "onnx" in metadata["tags"]
    assert f'AutoProcessor.from_pretrained("{NAME}")' in card
    assert exporter.verify(NAME).holds


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name not in PROCESSORS])
def test_types_that_the_client_can_not_open_are_refused(family, tiny, tmp_path):
    with pytest.raises(InputError, match=rf"can't be exported for transformers\.js: .* know its type '{family}'\. T"):
        export(tiny(family), tmp_path / "out", LAYOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "web"}, r"layout 'web' is not known: transformers\.js, genai"),
        ({"quantize": "q3"}, r"quantize 'q3' is not known in the layout transformers\.js: fp32, fp16, q8, q4, q4f16"),
        ({"dtype": "float16"}, r"name precisions with --quantize, as in --quantize fp16,q4"),
    ],
)
def test_options_that_the_layout_has_not(options, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        export(tiny("llava"), tmp_path / "out", ExportOptions(**{"layout": "transformers.js", **options}))
    assert not list(tmp_path.iterdir())


def test_the_command_line_ends_with_2(tiny, tmp_path, capsys):
    source = str(tiny("llava_next"))
    assert main(["onnx", source, "--out", str(tmp_path / "out"), "--layout", "transformers.js"]) == 2
    message = "shows a picture as one, and its image_grid_pinpoints have none of 24 x 24 pixels ([24, 48], [48, 24])"
    error = capsys.readouterr().err
    assert "this LLaVA-NeXT can't be exported for transformers.js" in error and message in error
    assert main(["onnx", source, "--out", str(tmp_path / "out"), "--layout", "web"]) == 2
    assert "layout 'web' is not known" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_the_client_has_not(tiny, tmp_path):
    source = shutil.copytree(tiny("llava"), tmp_path / "model")
    path = source / "tokenizer.json"
    path.write_text(path.read_text().replace('"cup"', '"##cup"'))
    with pytest.raises(InputError, match=r"tokenizer is of the type WordLevel, which transformers\.js does not read"):
        export(source, tmp_path / "out", LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_text_model_that_the_client_has_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_js, "TEXT_MODELS", ("qwen2",))
    with pytest.raises(
        InputError, match=r"not known to count the layers of a text model 'llama'\. Types that are: qwen2"
    ):
        export(tiny("llava"), tmp_path / "out", LAYOUT)
    assert not list(tmp_path.iterdir())


def test_a_router_is_refused(routed, tmp_path):
    with pytest.raises(InputError, match=r"has a router, which runs in our own runner only"):
        export(routed("llava").folder, tmp_path / "out", LAYOUT)
    assert not (tmp_path / "out").exists()


def test_precisions_by_name():
    assert precisions.chosen_precisions(None) == []
    assert precisions.chosen_precisions("int4, fp32,fp16") == ["fp16", "q4"]
    assert precisions.chosen_precisions("all") == ["fp16", "q8", "q4", "q4f16"]


def test_its_speed_is_not_that_of_our_runner(client):
    source, folder = client("llava")
    with pytest.raises(InputError, match=r"in the layout transformers\.js, whose speed is that of its client"):
        exporter.bench([folder], reference=source, options=BenchOptions(new_tokens=2, rounds=2))
