"""A chat template that is missing, fails or places no image is one sentence, said before the model is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
from fixtures.checkpoints import FAMILIES

from exporter.checkpoints.config_file import load_config
from exporter.checkpoints.json_file import read_json
from exporter.clean_room import PromptError, load_processor, render
from exporter.cli.entry import main
from exporter.data.batches import check_prompt, make_batch
from exporter.data.calibration import load_calibration
from exporter.errors import InputError
from exporter.evaluation.evaluate import evaluate

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    {"role": "user", "content": [{"type": "text", "text": "why?"}]},
]


def without_template(tiny, family, folder):
    shutil.copytree(tiny(family), folder)
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_template_may_not_be_missing(family, tiny, questions, tmp_path):
    folder = without_template(tiny, family, tmp_path / "model")
    processor, config = load_processor(folder), load_config(folder, read_json(folder / "config.json"))
    samples = load_calibration(str(questions), samples=1).samples
    if family == "paligemma":  # has none, on the hub either
        assert make_batch(samples, processor, config).is_visual.any()
        with pytest.raises(PromptError, match=r"takes one question: .* tell 3 turns apart"):
            render(processor, TURNS)
        return
    message = r"line \d+: .* has no chat template.*copy chat_template.jinja .* from the model.*, for one\)"
    for check in (check_prompt, make_batch):
        with pytest.raises(InputError, match=message):
            check(samples, processor, config)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{", "the chat template fails (TemplateSyntaxError"),
        ("{{ 1/0 }}", "the chat template fails (ZeroDivisionError"),
        ("{{ messages[9].content[0] }}", "the chat template fails (UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(10**9) %}{% endfor %}", "the chat template fails (OverflowError"),
        ("{{ messages[0].content[-1].text }}", "the prompt has 0 places for 1 images"),
        ("<image><image>{{ messages[0].content[-1].text }}", "the prompt has 2 places for 1 images"),
    ],
)
def test_a_template_that_will_not_do(template, message, tiny, questions, tmp_path, capsys):
    folder = without_template(tiny, "llava", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    assert main(["score", str(folder), "--calibration", str(questions), "--samples", "2", "--localizer", "last"]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told


def test_evaluation_refuses_before_it_loads(tiny, questions, tmp_path, monkeypatch):
    folder = without_template(tiny, "qwen2_vl", tmp_path / "model")
    line = json.loads(questions.read_text().splitlines()[0])
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(line | {"image": str(questions.parent / line["image"]), "answer": "red"}))
    monkeypatch.setattr("exporter.evaluation.loaded.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="has no chat template"):
        evaluate([folder], task)


def test_the_tokenizer_s_template_will_do(tiny, questions, tmp_path):
    folder = without_template(tiny, "llava", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    template = "USER: {% for p in messages[0].content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    processor = load_processor(folder)
    assert render(processor, TURNS[:1]) == "USER: <image>what?"
