"""Folders with a serving router in the layouts of clients: graphs of one budget against torch's; refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from fixtures.client_graphs import answered_as_the_client_does
from fixtures.onnx_folders import here as compared_here
from tiny_models import build, inputs, random_image
from transformers import AutoConfig

import exporter
from exporter import InputError
from exporter.checkpoints.source import open_source
from exporter.clean_room import generate, load_processor
from exporter.clean_room.onnx_served import with_placeholders
from exporter.cli.entry import main
from exporter.modeling.served_places import picture_coordinates
from exporter.modeling.served_router import ServingRouter, ServingSettings, select
from exporter.onnx import ExportOptions
from exporter.onnx.graphs.serving import FewerRows
from exporter.onnx.layouts import genai, transformers_js
from exporter.onnx.manifest import read_manifest
from exporter.onnx.pipeline import export
from exporter.onnx.verification import verify
from exporter.routing.serving.folder import add_serving_router, load_served
from exporter.routing.serving.settings import serving_settings

pytestmark = pytest.mark.onnx_export
NEW_TOKENS = 6
FAST = {"layout": "transformers.js", "preset": "serve-fast"}


def with_router(source, **settings):
    """Give a folder a serving router of random weights, each of which counts in what it makes."""
    config = AutoConfig.from_pretrained(source)
    entry = serving_settings(config, question_aware=True) | settings
    config.serving_router = entry
    router = ServingRouter(config.get_text_config().hidden_size, ServingSettings.of(config))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in router.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    add_serving_router(source, entry, router.state_dict())
    return source


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """served('llava') is a tiny checkpoint with a serving router."""
    made = {}

    def folder(family):
        if family not in made:
            source = build(family, tmp_path_factory.mktemp(f"served-{family}") / "model", layers=2)
            if family == "llava_next":
                for path in (source / "config.json", source / "preprocessor_config.json"):
                    grids = {"image_grid_pinpoints": [[24, 24], [24, 48]]}
                    path.write_text(json.dumps(json.loads(path.read_text()) | grids))
            made[family] = with_router(source)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    """client('llava') is (checkpoint, folder for transformers.js under serve-fast), compared with torch here."""
    made = {}

    def folders(family):
        if family not in made:
            place = tmp_path_factory.mktemp(f"client-{family}")
            random_image(np.random.default_rng(0), (90, 30)).save(place / "wide.png")
            questions = place / "questions.jsonl"
            questions.write_text(json.dumps({"image": "wide.png", "question": "what is this?"}))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transformers_js, "validate", compared_here)
                options = ExportOptions(**FAST, calibration=str(questions))
                made[family] = served(family), export(served(family), place / "client", options)
        return made[family]

    return folders


def shorter_prompts(source, budget, batch):
    """Return torch's model with its router under a budget, and the ids that its decoder is given for a batch."""
    model = load_served(open_source(str(source)), "cpu", torch.float32)
    model.set_budget(keep_visual_tokens=budget)
    return model, model._compacted(dict(batch), budget, None)[0]["input_ids"]


@pytest.mark.parametrize(("number", "stays"), [(25, 6), (36, 9), (25, 24), (26, 7), (16, 1)])
def test_rows_of_many_pictures_are_those_of_one_after_the_other(number, stays):
    """Cells of equal sizes and of different ones, rows in a square and in a line."""
    torch.manual_seed(0)
    router = ServingRouter(32, ServingSettings(bottleneck=16, num_heads=2, pooled=True))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    features, coordinates = torch.randn(3, number, 32), picture_coordinates({}, number)
    expected = torch.stack([select(router, picture, stays, coordinates)[0] for picture in features])
    assert torch.allclose(FewerRows(router, coordinates, stays)(features), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_client_says_what_torch_says_in_the_served_form(family, client):
    source, folder = client(family)
    size = {"llava": (40, 40), "llava_next": (24, 24)}[family]
    own, mine = (inputs(load_processor(place), batch=2, seed=3, sizes=[size] * 2) for place in (source, folder))
    model, ids = shorter_prompts(source, 0.25, own)
    assert torch.equal(mine["input_ids"], ids) and ids.shape[1] < own["input_ids"].shape[1]
    expected = generate(model, own, new_tokens=NEW_TOKENS).sequences[:, -NEW_TOKENS:]
    assert np.array_equal(answered_as_the_client_does(folder, mine, NEW_TOKENS), expected)
    ran = exporter.onnx.load(folder).generate(**mine, max_new_tokens=NEW_TOKENS, eos_token_id=())
    assert np.array_equal(ran[:, -NEW_TOKENS:], expected)
    model.set_budget("off")
    assert not np.array_equal(generate(model, own, new_tokens=NEW_TOKENS).sequences[:, -NEW_TOKENS:], expected)


def test_the_record_the_card_and_the_clients_files_say_which_budget_it_is(client):
    source, folder = client("llava")
    manifest = read_manifest(folder)
    assert (manifest.serving.preset, manifest.serving.keep_visual_tokens) == ("serve-fast", 0.25)
    assert (manifest.serving.rows, manifest.serving.stays) == (25, 6)
    assert manifest.validation.equal_tokens == manifest.validation.tokens == 8 * (1 + 3 + 2 + 1)
    settings = json.loads((folder / "processor_config.json").read_text())
    assert (settings["patch_size"], settings["num_additional_image_tokens"]) == (40, 5)
    assert "serving_router" not in json.loads((folder / "config.json").read_text())
    assert not (folder / "serving_router").exists() and not list(folder.glob("*.py"))
    assert "under serve-fast: 6 of 25 tokens of each picture" in (folder / "README.md").read_text()
    assert verify(folder).holds
    with pytest.raises(InputError, match=r"25 image tokens, its images make 6 features"):
        exporter.onnx.load(folder).generate(**inputs(load_processor(source)), max_new_tokens=1)


def test_a_comparison_finds_a_router_of_other_weights(served, tmp_path, monkeypatch):
    from exporter.onnx import serving

    def other(source, settings):
        router = ServingRouter(source.config.get_text_config().hidden_size, settings)
        return router.eval().requires_grad_(False)

    monkeypatch.setattr(transformers_js, "validate", compared_here)
    monkeypatch.setattr(serving, "loaded", other)
    with pytest.raises(exporter.errors.CheckFailed, match="vision: image_features differs from torch"):
        export(served("llava"), tmp_path / "out", ExportOptions(**FAST))
    assert not list(tmp_path.iterdir())


def test_without_a_budget_it_is_the_plain_model_and_says_so(served, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(transformers_js, "validate", compared_here)
    command = ["onnx", str(served("llava")), "--layout", "transformers.js", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = "The graphs are the plain model, with all visual tokens: the checkpoint's serving router stays behind."
    assert said in capsys.readouterr().out
    assert "has a serving router and no default budget" in caplog.text
    assert json.loads((tmp_path / "out" / "onnx.json").read_text())["serving"] == {"preset": "off"}
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["patch_size"] == 8


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preset": "serve-fast", "layout": None},
            "our own runner's layout has no graphs of one: export it",
        ),
        ({"preset": "fastest"}, "preset 'fastest' is not known: this serving router has off, serve-accurate"),
        ({"keep_visual_tokens": 1.5}, r"keep_visual_tokens=1\.5 is no share"),
        ({"preset": "serve-fast", "keep_visual_tokens": 4}, "not both"),
    ],
)
def test_budgets_that_there_are_not(options, message, served, tmp_path):
    with pytest.raises(InputError, match=message):
        export(served("llava"), tmp_path / "out", ExportOptions(**{"layout": "transformers.js", **options}))
    assert not list(tmp_path.iterdir())


def test_a_budget_of_a_checkpoint_without_a_serving_router(tiny, routed, tmp_path, capsys):
    command = ["onnx", "--layout", "transformers.js", "--out", str(tmp_path / "out"), "--keep-visual-tokens", "0.5"]
    assert main([*command, str(tiny("llava"))]) == 2
    assert "has no serving router, and --keep-visual-tokens 0.5 is a budget of one" in capsys.readouterr().err
    assert main([*command, str(tiny("llava")), "--keep-visual-tokens", "much"]) == 2
    assert "'much' is no count or share like 144 or 0.25" in capsys.readouterr().err
    with pytest.raises(InputError, match="has a router inside the decoder, which is given its budget when it runs"):
        export(routed("llava").folder, tmp_path / "out", ExportOptions(preset="serve-fast"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "layout", "message"),
    [
        (
            "qwen2_5_vl",
            "transformers.js",
            r"Qwen2\.5-VL can't be exported for transformers\.js with a serving router's ",
        ),
        ("qwen2_5_vl", "genai", r"Qwen2\.5-VL can't be exported for genai with a serving router's budget: onnxruntime"),
        ("internvl", "transformers.js", r"does not know its type 'internvl'"),
        ("llava", "genai", r"has no model of the type 'llava'"),
    ],
)
def test_clients_that_count_tokens_by_themselves(family, layout, message, served, tmp_path):
    with pytest.raises(InputError, match=message):
        export(served(family), tmp_path / "out", ExportOptions(layout=layout, preset="serve-fast"))
    assert not list(tmp_path.iterdir())


def test_genai_exports_the_plain_model_and_says_so(served, tmp_path, monkeypatch):
    monkeypatch.setattr(genai, "validate", compared_here)
    folder = export(served("qwen2_5_vl"), tmp_path / "out", ExportOptions(layout="genai", preset="off"))
    assert read_manifest(folder).serving.preset == "off"
    assert "serving_router" not in json.loads((folder / "config.json").read_text())
    assert "The graphs are the plain model" in (folder / "README.md").read_text()


def test_routers_of_older_folders_and_damaged_ones(served, tmp_path):
    older = shutil.copytree(served("llava"), tmp_path / "older")
    with_router(older, pooled=False)
    with pytest.raises(InputError, match="of an older form, which lets single rows stay"):
        export(older, tmp_path / "out", ExportOptions(**FAST))
    damaged = shutil.copytree(served("llava"), tmp_path / "damaged")
    (damaged / "serving_router" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged: "):
        export(damaged, tmp_path / "out", ExportOptions(**FAST))
    assert not (tmp_path / "out").exists()


def test_placeholders_of_half_a_picture():
    batch = {"input_ids": torch.tensor([[7, 7, 7, 1]]), "attention_mask": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="3 placeholders are no whole number of pictures with 2 each"):
        with_placeholders(batch, 7, 2, 6)
