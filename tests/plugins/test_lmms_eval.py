"""The model that lmms-eval is given: the same answers as `evaluate`'s, under the budget that was asked for.

Where lmms-eval is not installed, its few names are stood in for; `make lmms-eval-test` runs the real one.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate
from exporter.routing.requests import BudgetGrid

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Result:
    text: str
    token_counts: object = None


class Base:
    def __init__(self):
        self.task_dict = {}


@pytest.fixture
def model_class(monkeypatch):
    """Return the class of the plug-in."""
    if not list(importlib.metadata.distributions(name="lmms_eval")):  # a folder of that name can be a namespace package
        modules: dict[str, Any] = {
            name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")
        }
        modules |= {f"lmms_eval.{name}": types.ModuleType(name) for name in ("api.instance", "api.model")}
        modules["lmms_eval.models.registry_v2"] = types.ModuleType("registry")
        registry: Any = modules["lmms_eval.models.registry_v2"]
        instance, model = modules["lmms_eval.api.instance"], modules["lmms_eval.api.model"]
        instance.GenerationResult, instance.TokenCounts, model.lmms = Result, lambda **counts: counts, Base
        registry.ModelManifest = lambda **parts: types.SimpleNamespace(**parts)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "exporter.plugins.lmms_eval_model", raising=False)
    yield importlib.import_module("exporter.plugins.lmms_eval_model").LvlmExporter
    sys.modules.pop("exporter.plugins.lmms_eval_model", None)


@pytest.fixture
def requests(task):
    """Return a function that hands a model the task as lmms-eval does, with its requests."""

    def ask(model, **settings):
        docs = [json.loads(line) for line in task.read_text().splitlines()]
        model.task_dict = {"task": {"test": docs}}

        def messages(doc):
            image = {"type": "image", "url": Image.open(doc["image"]).convert("RGB")}
            return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

        settings = {"max_new_tokens": 4} | settings
        return [types.SimpleNamespace(args=("", messages, settings, n, "task", "test")) for n in range(len(docs))]

    return ask


@pytest.mark.slow
def test_answers_are_those_of_evaluate(model_class, requests, routed_folder, task, caplog):
    for given, budgets in (
        ({"preset": "fast"}, BudgetGrid(presets=("fast",))),
        ({"keep_visual_tokens": 6, "keep_layers": 5}, BudgetGrid((6,), (5,))),
        ({"keep_visual_tokens": 0.5, "rule": "fastv"}, BudgetGrid((0.5,), rule="fastv")),
        ({}, BudgetGrid()),
    ):
        with caplog.at_level(logging.WARNING, "lmms_eval"):
            model = model_class(str(routed_folder), batch_size="5", device="cpu", **given)
        wanted = evaluate([routed_folder], task, budgets=budgets, max_new_tokens=4, update_cards=False).models[0]
        assert tuple(one.text for one in model.generate_until(requests(model))) == wanted.answers
        assert ("under no budget" in caplog.messages[-1]) is (not given)
    assert any("under fast: 0.25 of the visual tokens, 5 layers" in message for message in caplog.messages)


def test_a_share_of_the_cost_is_handed_on(model_class, routed_folder):
    with pytest.raises(InputError, match=r"flops=0\.5 is computed from what was measured after training"):
        model_class(str(routed_folder), device="cpu", flops=0.5)


def test_answers_end_where_a_task_says(model_class, requests, routed_folder, task):
    model = model_class(str(routed_folder), device="cpu")
    whole = model.generate_until(requests(model)[:2])
    stop = whole[0].text[2:3]
    assert model.generate_until(requests(model, until=[stop])[:1])[0].text == whole[0].text.split(stop)[0].strip()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "fast", "keep_layers": 5}, "runs under one budget, and 2 are named"),
        ({"presets": "fast"}, "lvlm_exporter has no argument 'presets'"),
        ({"batch_size": "auto"}, "--batch_size auto: a whole number from 1 up is needed"),
        ({"preset": "turbo"}, "preset 'turbo' is not known"),
    ],
)
def test_arguments_that_can_not_be(model_class, routed_folder, given, message):
    with pytest.raises(InputError, match=message):
        model_class(str(routed_folder), **given)


def test_a_plain_folder_has_no_budget(model_class, tiny):
    with pytest.raises(InputError, match="has no router"):
        model_class(str(tiny("llava")), preset="fast")


def test_only_greedy_answers_are_had(model_class, requests, routed_folder):
    model = model_class(str(routed_folder), device="cpu")
    with pytest.raises(InputError, match="answers greedily"):
        model.generate_until(requests(model, temperature=0.7)[:1])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])


def test_the_entry_point_names_the_class(model_class):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, function = points["lvlm_exporter"].partition(":")
    (manifest,) = getattr(importlib.import_module(module), function)()
    assert manifest.model_id == "lvlm_exporter"
    assert manifest.chat_class_path == f"{model_class.__module__}.{model_class.__name__}"
    assert model_class.is_simple is False
