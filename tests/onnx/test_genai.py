"""The layout of onnxruntime-genai: the library itself against torch, graphs, the files that it reads, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
import yaml
from fixtures.byte_pairs import build_with_byte_pairs
from fixtures.hub import NAME, pushed
from fixtures.onnx_folders import here as compared_here
from tiny_models import build, inputs, random_image

import exporter
from exporter import InputError
from exporter.benchmark.figures import BenchOptions
from exporter.clean_room import encode, generate, load_processor
from exporter.clean_room.processing import render
from exporter.cli.entry import main
from exporter.onnx import ExportOptions
from exporter.onnx.layouts import genai, genai_files
from exporter.onnx.manifest import read_manifest
from exporter.onnx.pipeline import export
from exporter.onnx.rows import SUPPORTED
from exporter.onnx.verification import verify

pytestmark = pytest.mark.onnx_export
LAYOUT = ExportOptions(layout="genai")
NEW_TOKENS = 6
FAMILIES = (
    "qwen2_5_vl",
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.long_tail) for name in ("mistral3", "qwen3_vl")),
)
# Pictures that the library's own processor makes the same pixels of: resized ones, where it resizes by the same rule.
SIZES = {
    "qwen2_5_vl": [(61, 90), (50, 60)],
    "gemma3": [(90, 61), (64, 64)],
    "mistral3": [(60, 40), (50, 60)],
    "qwen3_vl": [(61, 90), (50, 60)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders('gemma3') is (checkpoint, folder for the library), compared with torch in this process."""
    made = {}

    def folder(family):
        if family not in made:
            place = tmp_path_factory.mktemp(f"genai-{family}")
            source = build_with_byte_pairs(family, place / "model")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(genai, "validate", compared_here)
                made[family] = source, export(source, place / "folder", LAYOUT)
        return made[family]

    return folder


def torch_model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def with_graphs_of(folder, patch):
    """Exports take the float32 graphs of `folder`, made from the same checkpoint before."""

    def copied(model, support, stage, opset):
        for path in (*folder.glob("*.onnx"), *folder.glob("*.data")):
            shutil.copy(path, stage)

    patch.setattr(genai, "write_graphs", copied)
    patch.setattr(genai, "validate", compared_here)


# --- the library ------------------------------------------------------------------------------------------------------


def chat(count, question="What color is the Big circle?"):
    images = [{"type": "image"}] * count
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def given(batch, image_token_id):
    """What the library is given where transformers' processor has prepared a question."""
    tensors = og.NamedTensors()
    for name in ("pixel_values", "image_grid_thw", "image_sizes"):
        if name in batch:
            tensors[name] = np.ascontiguousarray(batch[name].numpy())
    tensors["num_image_tokens"] = np.array([int((batch["input_ids"] == image_token_id).sum())])
    tensors["input_ids"] = batch["input_ids"].numpy().astype(np.int32)
    return tensors


def answered(model, tensors, length):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length + NEW_TOKENS, min_length=length + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    generator.set_inputs(tensors)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_says_what_torch_says(family, folders, tmp_path):
    """By its own tokenizer, template and image processor, and with what transformers' processor made; without image."""
    source, folder = folders(family)
    model, processor = torch_model(source), load_processor(source)
    library = og.Model(str(folder))
    own, tokenizer = library.create_multimodal_processor(), og.Tokenizer(library)
    random = np.random.default_rng(0)
    for number, count in enumerate((1, 1, 0, 2)):
        images = [random_image(random, SIZES[family][number % 2]) for _ in range(count)]  # of one size, see below
        paths = [tmp_path / f"{i}.png" for i in range(count)]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        batch = encode(processor, [chat(count)], [images])
        ids, length = batch["input_ids"][0].tolist(), batch["input_ids"].shape[1]
        expected = generate(model, batch, new_tokens=NEW_TOKENS).sequences[0, length:].tolist()
        assert answered(library, given(batch, model.config.image_token_id), length) == expected
        text = tokenizer.apply_chat_template(json.dumps(chat(count)), add_generation_prompt=True)
        assert text == render(processor, chat(count))
        if family == "gemma3" and count == 2:  # the library counts one picture's tokens, however many there are
            continue
        mine = own(text, images=og.Images.open(*map(str, paths))) if count else own(text)
        assert mine["input_ids"].as_numpy()[0].tolist() == ids
        if count:
            assert np.abs(mine["pixel_values"].as_numpy() - batch["pixel_values"].numpy()).max() < 0.01
        assert answered(library, mine, length) == expected


def test_pictures_of_two_sizes_are_given_to_the_library(folders, tmp_path):
    """Its own processor for Qwen fills patches up to those of the largest picture, and then cuts them elsewhere."""
    source, folder = folders("qwen2_5_vl")
    model, library = torch_model(source), og.Model(str(folder))
    images = [random_image(np.random.default_rng(0), size) for size in SIZES["qwen2_5_vl"]]
    batch = encode(load_processor(source), [chat(2)], [images])
    length, patches = batch["input_ids"].shape[1], batch["pixel_values"].shape[0]
    expected = generate(model, batch, new_tokens=NEW_TOKENS).sequences[0, length:].tolist()
    assert answered(library, given(batch, model.config.image_token_id), length) == expected
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    text = render(load_processor(source), chat(2))
    made = library.create_multimodal_processor()(text, images=og.Images.open(*paths))
    assert made["pixel_values"].as_numpy().shape[0] > patches  # once it is mended, the card need not say so


def test_the_library_masks_what_it_is_told_is_padding(folders):
    """Therefore it is told of a token that no prompt has; a checkpoint may pad with one that prompts do have."""
    source, folder = folders("qwen2_5_vl")
    model, library = torch_model(source), og.Model(str(folder))
    batch = encode(load_processor(source), [chat(0)], [[]])
    padding = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    length = batch["input_ids"].shape[1]
    batch["input_ids"][0, 3:8] = padding
    expected = generate(model, batch, new_tokens=NEW_TOKENS).sequences[0, length:].tolist()
    assert answered(library, given(batch, model.config.image_token_id), length) != expected
    processor = load_processor(source)
    assert genai_files.padding_id(processor) == padding
    processor.tokenizer.pad_token = "<|im_end|>"  # which ends every turn
    assert genai_files.padding_id(processor) != processor.tokenizer.pad_token_id


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_runner_says_what_torch_says(family, folders):
    source, folder = folders(family)
    batch = inputs(load_processor(source), batch=2, seed=3)
    expected = generate(torch_model(source), batch, new_tokens=NEW_TOKENS).sequences
    runner = exporter.onnx.load(folder)
    assert np.array_equal(runner.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=()), expected)
    report = read_manifest(folder).validation
    assert report.equal_tokens == report.tokens >= 32


@pytest.mark.parametrize("name", ["fp16", "q4"])
def test_a_folder_has_one_precision(name, folders, tmp_path, monkeypatch):
    source, plain = folders("qwen2_5_vl")
    with_graphs_of(plain, monkeypatch)
    folder = export(source, tmp_path / "folder", ExportOptions(layout="genai", quantize=name))
    manifest = read_manifest(folder)
    assert list(manifest.precisions) == [name] and manifest.validation.tokens > 0
    assert set(manifest.files) == set(read_manifest(plain).files)  # none of float32 is left
    assert sum(manifest.files.values()) < 0.8 * sum(read_manifest(plain).files.values())
    assert f"onnxruntime-genai runs: {name}," in (folder / "README.md").read_text()
    assert verify(folder).holds
    processor, model, library = load_processor(source), torch_model(source), og.Model(str(folder))
    batch = encode(processor, [chat(1)], [[random_image(np.random.default_rng(1), (50, 60))]])
    length = batch["input_ids"].shape[1]
    ran = exporter.onnx.load(folder).generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=())[0, length:].tolist()
    assert answered(library, given(batch, model.config.image_token_id), length) == ran
    with pytest.raises(InputError, match=rf"has no precision 'fp32': {name}\."):
        exporter.onnx.load(folder, precision="fp32")


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_those_that_the_library_reads(folders):
    source, folder = folders("qwen2_5_vl")
    assert verify(folder).holds
    settings = json.loads((folder / "genai_config.json").read_text())
    model, config = settings["model"], torch_model(source).config
    assert model["type"] == "qwen2_5_vl" and model["vocab_size"] == config.text_config.vocab_size
    assert model["image_token_id"] == config.image_token_id
    assert model["vision_start_token_id"] == config.vision_start_token_id
    assert (model["vision"]["patch_size"], model["vision"]["spatial_merge_size"]) == (5, 2)
    assert model["eos_token_id"] == [config.text_config.eos_token_id] and settings["search"]["do_sample"] is False
    for part in ("vision", "embedding", "decoder"):
        graph = onnx.load(folder / model[part]["filename"], load_external_data=False).graph
        assert set(model[part]["inputs"].values()) & {value.name for value in graph.input}
    decoder = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    names = {value.name for value in decoder.input}
    assert {"inputs_embeds", "attention_mask", "position_ids", "past_key_values.1.value"} <= names
    steps = json.loads((folder / model["vision"]["config_filename"]).read_text())["processor"]["transforms"]
    kinds = {step["operation"]["type"]: step["operation"].get("attrs") for step in steps}
    assert list(kinds) == ["DecodeImage", "Resize", "Rescale", "Normalize", "PatchImage"]
    assert (kinds["Resize"]["min_pixels"], kinds["Resize"]["max_pixels"]) == (1600, 4096)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == load_processor(source).chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folders_processor_prepares_what_the_checkpoints_does(family, folders):
    source, folder = folders(family)
    own, carried = (inputs(load_processor(place), batch=2, seed=1) for place in (source, folder))
    assert own.keys() == carried.keys()
    assert all(torch.equal(own[name], carried[name]) for name in own)


def test_what_the_librarys_processor_can_not_do_is_said(folders, tmp_path, monkeypatch):
    """A tokenizer of whole words, and 16 tokens a picture: the card prepares questions with transformers' processor."""
    _, plain = folders("gemma3")
    assert read_manifest(plain).client.limits == ()
    assert "create_multimodal_processor" in (plain / "README.md").read_text()
    source = build("gemma3", tmp_path / "model", layers=3)
    monkeypatch.setattr(genai, "validate", lambda *_: read_manifest(plain).to_data()["validation"])
    monkeypatch.setattr(genai, "installed_version", lambda: "9.9.0")
    monkeypatch.setattr(genai, "write_graphs", lambda *_: None)
    folder = export(source, tmp_path / "folder", LAYOUT)
    words, tokens = read_manifest(folder).client.limits
    assert words == "its tokenizer is of the type WordLevel, and the library reads BPE and Unigram"
    assert tokens == "a picture is 16 tokens, and the library writes 256 for each"
    card = (folder / "README.md").read_text()
    assert words in card and "NamedTensors" in card and "create_multimodal_processor" not in card
    assert f"The layout is that of onnxruntime-genai {genai.CLIENT}; this folder was made where 9.9.0" in card


def test_the_version_that_ran_the_layout_is_the_one_that_is_tested():
    assert og.__version__ == genai.CLIENT


def test_the_hub_shows_it_as_onnx(folders, here, capsys):
    _, folder = folders("qwen2_5_vl")
    assert NAME in pushed(capsys, folder, NAME)
    assert {"genai_config.json", "decoder.onnx", "tokenizer.json"} <= set(here.repos[NAME].files())
    metadata = yaml.safe_load(here.repos[NAME].files()["README.md"].decode().split("---")[1])
    assert metadata["library_name"] == "onnx" and "onnxruntime-genai" in metadata["tags"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name not in genai_files.TYPES])
def test_types_that_the_library_has_not_are_refused(family, tiny, tmp_path):
    message = (
        rf"genai: onnxruntime-genai 0\.18\.0 has no model of the type '{family}'\. Types that can: qwen2_vl, qwen2_5"
    )
    with pytest.raises(InputError, match=message):
        export(tiny(family), tmp_path / "out", LAYOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "fp16,q4"}, r"quantize 'fp16,q4' is not known in the layout genai: .*A folder has one of them"),
        ({"dtype": "float16"}, r"names its precision with --quantize, as in --quantize fp16"),
    ],
)
def test_options_that_the_layout_has_not(options, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        export(tiny("qwen2_5_vl"), tmp_path / "out", ExportOptions(**{"layout": "genai", **options}))
    assert not list(tmp_path.iterdir())


def test_the_command_line_ends_with_2(tiny, tmp_path, capsys):
    assert main(["onnx", str(tiny("llava")), "--out", str(tmp_path / "out"), "--layout", "genai"]) == 2
    assert "has no model of the type 'llava'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_template_that_places_no_picture(tiny):
    processor = load_processor(tiny("qwen2_5_vl"))
    processor.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(
        InputError, match=r"no question can be put to this model by onnxruntime-genai: the prompt has 0"
    ):
        genai_files.padding_id(processor)


def test_no_token_is_left_for_padding(tiny, monkeypatch):
    processor = load_processor(tiny("qwen2_5_vl"))
    used = torch.tensor([processor.tokenizer.all_special_ids])
    monkeypatch.setattr(genai_files, "encode", lambda *_: {"input_ids": used})
    with pytest.raises(InputError, match=r"every special token of this model's tokenizer stands in its prompts"):
        genai_files.padding_id(processor)


def test_a_router_is_refused(routed, tmp_path):
    with pytest.raises(InputError, match=r"has a router, which runs in our own runner only: leave --layout out"):
        export(routed("qwen2_5_vl").folder, tmp_path / "out", LAYOUT)
    assert not (tmp_path / "out").exists()


def test_its_speed_is_not_that_of_our_runner(folders):
    source, folder = folders("qwen2_5_vl")
    with pytest.raises(InputError, match=r"in the layout genai, whose speed is that of its client"):
        exporter.bench([folder], reference=source, options=BenchOptions(new_tokens=2, rounds=2))
