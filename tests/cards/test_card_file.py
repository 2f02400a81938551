"""A card that is written again keeps what a person wrote, wherever it stands, and is up to date everywhere else."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from exporter.cards.card_file import carry_card, front_matter, merge, paragraphs, write_card
from exporter.errors import InputError

METADATA = "library_name: transformers\nmodel_name: small\ntags:\n- compressed\n- tis\n"
BODY = """# small

It keeps 9 of 12 layers.

## What it costs

| | base |
|---|---|
| layers | 12 |

Nothing has been measured.

## How to load it

```python
model = load("small")

print(model)
```

## Limits

- Every limit of its base model.
"""
MEASURED = BODY.replace("Nothing has been measured.", "| task | 96.2 % |\n\nKept is a share.").replace(
    "## How to load", "## How fast it is\n\nTwice.\n\n## How to load"
)


def written(metadata: str = METADATA, body: str = BODY) -> str:
    return merge(None, metadata, body).text


def test_a_card_that_nobody_touched_is_what_is_rendered():
    assert merge(written(), METADATA, BODY).text == written()
    for before, after in ((BODY, MEASURED), (MEASURED, BODY)):
        merged = merge(written(body=before), METADATA, after)
        assert merged.text == written(body=after) and not merged.unmerged


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# small\n", "# small\n\nMade with care by me.\n"),
        ("| layers | 12 |\n", "| layers | 12 |\n\nThe table is mine to explain.\n"),
        ("- Every limit of its base model.\n", "- Every limit of its base model.\n\n## Thanks\n\nTo all.\n"),
        ("It keeps 9 of 12 layers.", "It keeps nine layers, which is plenty."),
        ("Every limit of its base model.", "Every limit of its base model.\n- And one more."),
        ('print(model)\n```\n', 'print(model)\n```\n\n```sh\nls\n\nls\n```\n'),
        ("## How to load it\n", "## How to use it\n"),
        ("---\n\n# small", "---\n\n<!-- a note\n\nto myself -->\n\n# small"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_what_a_person_writes_stays_and_figures_still_arrive(old, new, line_end, tmp_path):
    text = written()
    text = text.replace(old, new, 1) if old in text else text.replace(" -->\n\n# small", f" -->\n\n{new[5:]}", 1)
    path = tmp_path / "README.md"
    path.write_bytes(text.replace("\n", line_end).encode())
    for body in (MEASURED, MEASURED, BODY):
        write_card(tmp_path, METADATA, body)
        content = path.read_bytes().decode()
        assert (line_end == "\r\n") == ("\r\n" in content)
        content = content.replace("\r\n", "\n")
        own = new.removeprefix("---\n\n").strip()
        assert own in content
        expected = [p.strip() for p in paragraphs(body)]
        edited = [p.strip() for p in paragraphs(old)]
        assert [p for p in expected if p not in edited and p not in content] == []
    assert content == text.replace(line_end, "\n")  # back to what it was before the figures came


def test_what_a_person_deletes_stays_deleted():
    text = written().replace("Nothing has been measured.\n\n", "").replace("- Every limit of its base model.\n", "")
    merged = merge(text, METADATA, BODY.replace("# small", "# large"))
    assert "# large" in merged.text and not merged.unmerged
    assert "Nothing has been measured" not in merged.text and "Every limit" not in merged.text


def test_an_edit_where_new_figures_belong_stays_and_is_said(tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_text(written().replace("Nothing has been measured.", "I measured 97 %."))
    write_card(tmp_path, METADATA, MEASURED)
    text = path.read_text()
    assert "I measured 97 %." in text and "96.2 %" not in text and "## How fast it is" in text
    (message,) = caplog.messages
    assert "edited by hand where new text belongs ('What it costs'): your text stays" in message
    assert f"move the file away and run `lvlm-exporter card {tmp_path}`" in message
    caplog.clear()
    write_card(tmp_path, METADATA, MEASURED)  # nothing new: nothing to say
    assert path.read_text() == text and not caplog.messages


def test_a_card_without_our_mark_keeps_its_text_and_gets_the_metadata(tmp_path, caplog):
    own = "---\nlicense: mit  # mine\n---\n# My own\n\n\n\nWords.\n"
    (tmp_path / "README.md").write_text(own)
    write_card(tmp_path, METADATA, BODY)
    text = (tmp_path / "README.md").read_text()
    assert text.endswith("# My own\n\n\n\nWords.\n") and "license: mit  # mine\n" in text
    assert front_matter(text)["tags"] == ["compressed", "tis"]
    assert "the text, which has no mark of ours" in caplog.text


@pytest.mark.slow
def test_any_edit_of_any_paragraph_survives_any_number_of_writings():
    draw = random.Random(0)
    for _ in range(200):
        parts = paragraphs(written())
        head, parts = parts[:2], parts[2:]
        own = []
        for number in range(draw.randint(1, 4)):
            place = draw.randrange(len(parts) + 1)
            own.append(f"Own words, number {number}.")
            if draw.random() < 0.5 and place < len(parts):
                parts[place] = own[-1] + "\n\n"
            else:
                parts.insert(place, own[-1] + "\n\n")
        text = "".join([*head, *parts])
        alive = [words for words in own if words in text]
        for body in draw.choices([BODY, MEASURED], k=3):
            text = merge(text, METADATA, body).text
            assert all(text.count(words) == 1 for words in alive)


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_keys_of_a_person_stay_and_ours_are_brought_up_to_date():
    text = written().replace(
        "tags:\n- compressed\n",
        "# I chose this\nlanguage: [en, 'de']   # two\nlicense: mit\ntags:\n- mine\n- compressed\n",
    )
    new = (
        METADATA.replace("small", "large").replace("- tis\n", "- tis\n- routed\n")
        + "pipeline_tag: image-text-to-text\n"
    )
    merged = merge(text, new, BODY).text
    assert "# I chose this\nlanguage: [en, 'de']   # two\nlicense: mit\n" in merged
    assert front_matter(merged) == {
        "library_name": "transformers",
        "model_name": "large",
        "language": ["en", "de"],
        "license": "mit",
        "tags": ["mine", "compressed", "tis", "routed"],
        "pipeline_tag": "image-text-to-text",
    }  # fmt: skip


def test_a_key_that_a_person_changed_or_took_out_stays_so():
    text = written().replace("model_name: small", "model_name: mine").replace("library_name: transformers\n", "")
    merged = merge(text, METADATA, BODY)
    assert front_matter(merged.text) == {"model_name": "mine", "tags": ["compressed", "tis"]} and not merged.unmerged
    assert merge(text, METADATA.replace("small", "large"), BODY).unmerged == ("'model_name'",)
    gone = merge(written(METADATA + "license: mit\n"), METADATA, BODY).text
    assert "license" not in front_matter(gone)  # it was ours


def index(*results: tuple[str, float, str]) -> str:
    data = ModelCardData(
        model_name="small",
        eval_results=[
            EvalResult("image-text-to-text", task, task, "exact_match", value, metric_name=name)
            for task, value, name in results
        ],
    )
    return data.to_yaml() + "\n"


def test_results_of_a_person_stay_beside_ours():
    ours = "exact match, n=12, 95% CI 0.1-0.9"
    text = written(index(("a", 0.5, ours))).replace(
        "  results:\n",
        "  results:\n  - task: {type: image-text-to-text}\n    dataset: {type: pope, name: POPE}\n"
        "    metrics: [{type: f1, value: 0.8, name: F1}]\n",
    )
    merged = merge(text, index(("a", 0.6, ours), ("b", 0.7, ours)), BODY).text
    found = cast(Any, ModelCard(merged).data).eval_results
    assert {(r.dataset_type, r.metric_value) for r in found} == {("a", 0.6), ("b", 0.7), ("pope", 0.8)}
    gone = cast(Any, ModelCard(merge(merged, METADATA, BODY).text).data).eval_results
    assert [r.dataset_type for r in gone] == ["pope"]


@pytest.mark.parametrize(
    "front",
    [
        "\ufeff---\nlicense: mit\n---\n",
        "---\r\nlicense: mit\r\n---\r\n",
        "\n\n---\nlicense: mit\n---\n",
        "<!-- a comment -->\n---\nlicense: mit\n---\n",
        "---\n# a comment\nlicense: mit # --- another\n---\n",
        "---\n{license: mit}\n---\n",
        "---\nlicense: &x mit\nother: *x\n---\n",
        "--- \n'license': mit\n--- \n",
    ],
)
def test_odd_front_matter_is_read(front, tmp_path):
    (tmp_path / "README.md").write_bytes((front + "Mine.\n").encode())
    write_card(tmp_path, METADATA, BODY)
    text = (tmp_path / "README.md").read_bytes().decode()
    data = ModelCard(text.replace("\r\n", "\n")).data.to_dict()  # as the hub reads it
    assert data["license"] == "mit" and data["library_name"] == "transformers"
    assert "Mine." in text and "\ufeff" not in text and ("<!-- a comment -->" in front) == ("<!-- a comment" in text)


@pytest.mark.parametrize(
    "front",
    [
        "---\na: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nwords\n---\n",
        "---\na: 2026-99-99\n---\n",
        "---\na: !!python/object:os.system x\n---\n",
        "---\n" + "[" * 3000 + "\n---\n",
    ],
)
def test_front_matter_that_is_no_yaml_stays_as_it_is(front, tmp_path, caplog):
    (tmp_path / "README.md").write_text(front + "Mine.\n")
    write_card(tmp_path, METADATA, BODY)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(front) and text.endswith("Mine.\n")
    assert "the metadata, which is no YAML mapping" in caplog.text


@pytest.mark.parametrize("front", ["", "---\n---\n", "---\nno end of it\n", "---\n\n---\n\n"])
def test_missing_front_matter_is_added(front, tmp_path):
    (tmp_path / "README.md").write_text(front + "Mine.\n")
    write_card(tmp_path, METADATA, BODY)
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text) == yaml.safe_load(METADATA) and "Mine." in text


def test_bytes_that_are_no_text_survive(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\nGr\xfc\xdfe\n")
    write_card(tmp_path, METADATA, BODY)
    assert b"Gr\xfc\xdfe" in (tmp_path / "README.md").read_bytes()


def test_what_is_no_card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("words", encoding="utf-16")
    with pytest.raises(InputError, match=r"README\.md is UTF-16 text: save it as UTF-8"):
        write_card(tmp_path, METADATA, BODY)
    path.unlink()
    (tmp_path / "elsewhere").write_text("words")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"README\.md is a link, which is not followed"):
        write_card(tmp_path, METADATA, BODY)
    assert (tmp_path / "elsewhere").read_text() == "words"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"README\.md is not a file, and the card has to be written"):
        write_card(tmp_path, METADATA, BODY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "elsewhere"]


def test_a_card_is_carried_to_a_checkpoint_that_is_made_from_it_if_it_can_be_brought_up_to_date(tmp_path):
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "README.md").write_text(written() + "\nThanks.\n")
    carry_card(tmp_path / "from", tmp_path / "to")
    write_card(tmp_path / "to", METADATA, MEASURED)
    assert (tmp_path / "to" / "README.md").read_text() == written(body=MEASURED) + "\nThanks.\n"
    (tmp_path / "to" / "README.md").unlink()
    (tmp_path / "from" / "README.md").write_text("All my own.\n")
    carry_card(tmp_path / "from", tmp_path / "to")
    assert not (tmp_path / "to" / "README.md").exists()
