"""The plug-in for vLLM, as far as it goes without vLLM: the entry point, requests, settings and what is refused.

Where vLLM is not installed, the few names that `register` needs are stood in for; `make serve-test` runs the real one.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from exporter.modeling.served_router import SERVING_ROUTER_FILE, TYPES, ServingRouter, ServingSettings
from exporter.plugins import vllm as plugin
from exporter.plugins.vllm.folder import load_into, serving_settings
from exporter.plugins.vllm.known import MODELS, SERVED, is_known
from exporter.plugins.vllm.refusals import refuse_budgets
from exporter.plugins.vllm.requests import ServedRequest, settings_of

ROOT = Path(__file__).parents[2]
ENTRY = {"bottleneck": 16, "num_heads": 2, "question_aware": True}
SETTINGS = ServingSettings(**ENTRY)
VOCABULARY = 100


def model_config(folder: Path | str = "DIR", entry: Any = None, arguments: Any = None, **settings: Any) -> Any:
    """Return what the plug-in reads of vLLM's ModelConfig."""
    config = SimpleNamespace(architectures=["Gemma3ForConditionalGeneration"], hidden_size=24, **settings)
    if entry is not None:
        config.serving_router = entry
    config.get_text_config = lambda: config
    return SimpleNamespace(
        model=str(folder),
        revision=None,
        hf_config_path=None,
        hf_config=config,
        multimodal_config=SimpleNamespace(mm_processor_kwargs=arguments),
    )


# --- the entry point --------------------------------------------------------------------------------------------------


def test_the_entry_point_names_the_function():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = points["lvlm_exporter"].partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register


@pytest.mark.clean_process
def test_the_entry_point_imports_nothing_heavy():
    code = "import sys, exporter.plugins.vllm; print({'torch', 'transformers', 'vllm'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture
def stand_in(monkeypatch):
    """Return a vLLM of the names that `register` needs."""
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in ("vllm", "vllm.multimodal")}
    modules["vllm"].__version__ = "0.32.0+cpu"
    modules["vllm"].models = {}
    modules["vllm"].ModelRegistry = SimpleNamespace(register_model=modules["vllm"].models.__setitem__)
    processor = SimpleNamespace(apply=lambda inputs, timing: "answered")
    modules["vllm.multimodal"].MULTIMODAL_REGISTRY = SimpleNamespace(create_processor=lambda config: processor)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["vllm"]


def test_every_type_of_the_router_has_a_class(stand_in):
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    plugin.register()
    assert set(stand_in.models) == {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] for name in TYPES}
    text = (ROOT / "exporter" / "plugins" / "vllm" / "models.py").read_text()
    for place in stand_in.models.values():
        module, _, name = place.partition(":")
        assert module == MODELS and f"class {name}(" in text


def test_registering_twice_is_registering_once(stand_in):
    plugin.register()
    registry = sys.modules["vllm.multimodal"].MULTIMODAL_REGISTRY
    watched = registry.create_processor
    plugin.register()
    assert registry.create_processor is watched
    assert len(stand_in.models) == len(SERVED)


def test_an_unknown_vllm_is_left_alone_and_takes_no_budget(stand_in):
    stand_in.__version__ = "0.41.0"
    plugin.register()
    assert not stand_in.models
    make = sys.modules["vllm.multimodal"].MULTIMODAL_REGISTRY.create_processor
    processor = make(model_config(entry=ENTRY))
    assert processor.apply(SimpleNamespace(hf_processor_mm_kwargs={}), None) == "answered"
    with pytest.raises(ValueError, match=r"names preset, and vLLM 0\.41\.0 is not among the releases that serve"):
        processor.apply(SimpleNamespace(hf_processor_mm_kwargs={"preset": "serve-fast"}), None)


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.33.1+cpu", True), ("0.3.2", False), ("1.32.0", False), ("0.34.0", False)],
)
def test_known_versions(version, known):
    assert is_known(version) is known


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({}, {}),
        ({"preset": "off", "question_ids": [1]}, {}),
        ({"preset": "serve-fast"}, {"keep_visual_tokens": 0.25}),
        ({"keep_visual_tokens": 0.25}, {"keep_visual_tokens": 0.25}),
        ({"keep_visual_tokens": 7, "question_ids": []}, {"keep_visual_tokens": 7}),
        ({"keep_visual_tokens": 1.0, "do_resize": False}, {"keep_visual_tokens": 1.0, "do_resize": False}),
        ({"preset": "serve-balanced", "question_ids": [3, 4]}, {"keep_visual_tokens": 0.5, "question_ids": [3, 4]}),
    ],
)
def test_a_request_is_put_one_way(given, normal):
    assert ServedRequest.of(given, SETTINGS, VOCABULARY).normalised() == normal


def test_the_default_is_the_budget_of_a_request_that_names_none():
    settings = ServingSettings(**ENTRY, default="serve-fast")
    assert ServedRequest.of({}, settings, VOCABULARY).budget == 0.25
    assert ServedRequest.of({"preset": "off"}, settings, VOCABULARY).budget is None
    assert ServedRequest.of({"keep_visual_tokens": 9}, settings, VOCABULARY).budget == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "fastest"}, "preset 'fastest' is not known: this serving router has off, serve-accurate"),
        ({"keep_visual_tokens": 0}, "keeps nothing of the picture"),
        ({"keep_visual_tokens": 1.5}, "is no share"),
        ({"keep_visual_tokens": True}, "neither a count"),
        ({"keep_visual_tokens": 5, "preset": "serve-fast"}, "not both"),
        ({"question_ids": "what"}, "no list of token ids"),
        ({"question_ids": [1, 2.0]}, "no list of token ids"),
        ({"question_ids": [1, 100]}, "question_ids has 100: this model's token ids go from 0 to 99"),
    ],
)
def test_requests_that_can_not_be(given, message):
    with pytest.raises(ValueError, match=message):
        ServedRequest.of(given, SETTINGS, VOCABULARY)


def test_a_router_without_questions_takes_none():
    settings = ServingSettings(bottleneck=16, num_heads=2)
    with pytest.raises(ValueError, match="was trained without questions"):
        ServedRequest.of({"preset": "serve-fast", "question_ids": [1]}, settings, VOCABULARY)


# --- settings of a folder ---------------------------------------------------------------------------------------------


def folder_with(folder: Path, entry: Any) -> Path:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava"} | ({"serving_router": entry} if entry else {}))
    )
    return folder


def test_overrides_leave_the_rest_of_the_entry_as_it_is(tmp_path):
    settings = serving_settings(model_config(folder_with(tmp_path, ENTRY), {"default": "serve-fast"}))
    assert settings is not None
    assert settings.default == "serve-fast" and settings.bottleneck == 16


def test_a_folder_without_a_router_has_no_settings(tmp_path):
    assert serving_settings(model_config(folder_with(tmp_path, None))) is None


def test_an_override_for_a_folder_without_a_router(tmp_path):
    with pytest.raises(ValueError, match=r"--hf-overrides names serving_router, and .* has no serving router: train"):
        serving_settings(model_config(folder_with(tmp_path, None), {"default": "serve-fast"}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "format": 2}, "is of format 2"),
        ({**ENTRY, "default": "fast"}, "the default preset 'fast' is not among"),
        ({**ENTRY, "trained_for": {"hidden_size": 4096}}, "trained for another base model: hidden_size 4096, here"),
        ("fast", "is no table of settings"),
    ],
)
def test_settings_that_can_not_be(entry, message):
    with pytest.raises(ValueError, match=message):
        settings_of(model_config(entry=entry).hf_config, {"serving_router": entry}, "DIR")


def test_a_router_without_weights_and_one_of_another_shape(tmp_path):
    router = ServingRouter(24, SETTINGS)
    with pytest.raises(ValueError, match="fetch the serving router's folder too"):
        load_into(router, model_config(tmp_path))
    (tmp_path / SERVING_ROUTER_FILE).parent.mkdir()
    save_file(ServingRouter(32, SETTINGS).state_dict(), tmp_path / SERVING_ROUTER_FILE)
    with pytest.raises(ValueError, match="is not the serving router that"):
        load_into(router, model_config(tmp_path))
    save_file({n: t + 1 for n, t in router.state_dict().items()}, tmp_path / SERVING_ROUTER_FILE)
    load_into(router, model_config(tmp_path))
    assert bool((router.up.bias == 1).all())


# --- the plain model in place of the routed one -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model_config(), "DIR has no serving router, so that it would answer as the plain model: train one"),
        (model_config(entry=ENTRY), r"serving routers run in vLLM's own classes of .*, not here \(Gemma3"),
    ],
)
def test_the_plain_model_refuses_a_budget(config, message):
    processor = SimpleNamespace(apply=lambda inputs: inputs.hf_processor_mm_kwargs)
    refuse_budgets(processor, config, "0.32.0")
    assert processor.apply(SimpleNamespace(hf_processor_mm_kwargs={"do_resize": False})) == {"do_resize": False}
    off = SimpleNamespace(hf_processor_mm_kwargs={"preset": "off", "question_ids": [1], "do_resize": False})
    assert processor.apply(off) == {"do_resize": False}
    for given in ({"keep_visual_tokens": 0.5}, {"preset": "serve-fast"}, {"question_ids": [1]}):
        with pytest.raises(ValueError, match=f"mm_processor_kwargs names {next(iter(given))}, and {message}"):
            processor.apply(SimpleNamespace(hf_processor_mm_kwargs=given))


def test_the_plain_model_does_not_start_with_a_budget():
    with pytest.raises(ValueError, match=r"the preset 'serve-fast' is the default of DIR, and serving routers run in"):
        refuse_budgets(SimpleNamespace(), model_config(entry={**ENTRY, "default": "serve-fast"}), "0.32.0")
    with pytest.raises(ValueError, match="--mm-processor-kwargs names preset, and DIR has no serving router"):
        refuse_budgets(SimpleNamespace(), model_config(arguments={"preset": "serve-fast"}), "0.32.0")
