"""The source's licence reaches the card as the hub reads it, and is never called unstated where it is stated."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from exporter.cards.card_file import merge
from exporter.cards.licence import inherited_licence, licence_sentence
from exporter.cards.model_card import hub_metadata

NC = {"license": "cc-by-nc-4.0"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: cc-by-nc-4.0\n---\n", NC),
        ("\ufeff---\nlicense: cc-by-nc-4.0\n---\n", NC),
        ("---\r\nlicense: cc-by-nc-4.0\r\n---\r\n# Model\r\n", NC),
        ("<!-- a comment -->\n---\nlicense: cc-by-nc-4.0\n---\n", NC),
        ("\n---\n# about --- the model\nlicense: CC-BY-NC-4.0\n---\n", NC),
        ("---\nLicense: 'cc-by-nc-4.0'\n---\n", NC),
        ("---\nlicense: [cc-by-nc-4.0]\n---\n", NC),
        ("---\nlicense:\n- cc-by-nc-4.0\n- apache-2.0\n---\n", {"license": ["cc-by-nc-4.0", "apache-2.0"]}),
        ("---\ntags: [a --- b]\nlicense: cc-by-nc-4.0\n---\n", NC),
        (
            "---\nlicense: other\nlicense_name: own-terms\nlicense_link: https://example.com/terms\n---\n",
            {"license": "other", "license_name": "own-terms", "license_link": "https://example.com/terms"},
        ),
        ("---\nlicense_name: own-terms\n---\n", {"license": "other", "license_name": "own-terms"}),
        ("---\nlicense: other\n---\n", {"license": "other"}),
        ("---\nlicense: unknown\n---\n", {"license": "unknown"}),
        ("---\nlicense:\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("no front matter\n", {}),
        ("", {}),
    ],
)
def test_what_a_card_states(card, expected, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert inherited_licence(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("LICENSE", "Attribution-NonCommercial 4.0 International\n\n…", "attribution-noncommercial-4.0-international"),
        ("LICENSE.txt", "\ufeff\n   ====\n   Own   Terms of (Use)\n", "own-terms-of-use"),
        ("LICENCE.md", "# Gemma Terms\n", "gemma-terms"),
        ("LICENSE", "", "license"),
        ("COPYING", "\xff\xfe\n", "copying"),
    ],
)
@pytest.mark.parametrize("card", [None, "# A model\n", "---\nlicense: other\n---\n"])
def test_a_licence_file_is_named_where_the_card_names_no_licence(name, text, expected, card, tmp_path):
    (tmp_path / name).write_text(text)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert inherited_licence(tmp_path) == {"license": "other", "license_name": expected, "license_link": name}


def test_the_card_of_the_base_model_is_read_where_the_source_is_silent(tmp_path, monkeypatch):
    asked = []

    def card(repo: str) -> str:
        asked.append(repo)
        return "---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\n---\n"

    monkeypatch.setattr("exporter.cards.licence._card_on_hub", card)
    link = "https://huggingface.co/lab/base/blob/main/LICENSE"
    expected = {"license": "other", "license_name": "terms", "license_link": link}
    assert inherited_licence(tmp_path, "lab/base") == expected
    for named in ("lab/base", "[lab/base, lab/two]"):
        (tmp_path / "README.md").write_text(f"---\nbase_model: {named}\n---\n")
        assert inherited_licence(tmp_path) == expected
    assert asked == ["lab/base"] * 3
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert inherited_licence(tmp_path, "lab/base") == {"license": "mit"} and len(asked) == 3


def test_a_base_model_that_can_not_be_asked(tmp_path):
    assert inherited_licence(tmp_path, "lab/base") == {}  # the hub is offline here
    assert inherited_licence(tmp_path, "no name at all") == {}


@pytest.mark.parametrize(
    ("licence", "sentence"),
    [
        (NC, "Licence: cc-by-nc-4.0, inherited."),
        ({"license": ["a", "b"]}, "Licence: a, b, inherited."),
        (
            {"license": "other", "license_name": "terms", "license_link": "LICENSE"},
            "Licence: [terms](LICENSE), inherited.",
        ),
        ({"license": "mit", "license_link": "https://a.b/c"}, "Licence: [mit](https://a.b/c), inherited."),
        ({}, "The base model's folder states no licence: ask its authors."),
    ],
)
def test_the_card_tells_people_and_the_hub(licence, sentence):
    source = {"base_model": None, "license": licence}
    assert licence_sentence(source) == sentence
    text = merge(None, hub_metadata(source, "small", "transformers", [], "finetune"), "# small\n").text
    data = ModelCard(text).data.to_dict()
    assert {key: data[key] for key in data if key.startswith("license")} == licence
    assert yaml.safe_load(text.split("---")[1])["model_name"] == "small"


def test_a_relative_link_to_a_file_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: t\nlicense_link: LICENSE\n---\n")
    Path(tmp_path / "LICENSE").write_text("Terms\n")
    assert inherited_licence(tmp_path, "lab/base")["license_link"] == "LICENSE"
