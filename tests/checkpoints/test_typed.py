"""Records as types: the annotations of a class are the shape of its JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from exporter.checkpoints.record import CheckpointRecord
from exporter.checkpoints.shapes import Misfit
from exporter.checkpoints.typed import OR_MISSING, Count, Length, Number, Text, from_data, named
from exporter.onnx.manifest import OnnxRecord

PUBLISHED = Path(__file__).parent.parent / "fixtures" / "published"


@dataclass(frozen=True)
class Inner:
    count: Count


@dataclass(frozen=True)
class Outer:
    inner: Inner
    pair: Annotated[tuple[Number, ...], Length(2)]
    by_name: dict[Text, Inner]
    note: Text | None
    anything: Any
    other_name: Text = field(metadata=named("other-name"))
    extra: Annotated[Inner | None, OR_MISSING] = None
    list: tuple[Inner, ...] = ()


GOOD = {
    "inner": {"count": 1, "more": "is allowed"},
    "pair": [1, 2.5],
    "by_name": {"a": {"count": 2}},
    "note": None,
    "anything": [None],
    "other-name": "x",
}


def test_data_is_read_as_its_annotations_say():
    read = from_data(Outer, GOOD)
    assert read == Outer(Inner(1), (1, 2.5), {"a": Inner(2)}, None, [None], other_name="x")
    assert from_data(Outer, GOOD | {"extra": {"count": 3}, "list": [{"count": 4}]}).list == (Inner(4),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {}}, "'inner' has no 'count'"),
        ({"inner": {"count": -1}}, "'inner.count' is not a whole number from 0 up"),
        ({"pair": [1]}, "'pair' is not a list of 2"),
        ({"by_name": {"a": {"count": True}}}, "'by_name.a.count' is not a whole number from 0 up"),
        ({"note": 1}, "'note' is not a text"),
        ({"other-name": 1}, "'other-name' is not a text"),
        ({"extra": None}, "'extra' is no JSON object"),
        ({"list": [{}]}, r"'list\[0\]' has no 'count'"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change, message):
    with pytest.raises(Misfit, match=message):
        from_data(Outer, GOOD | change)


def test_published_records_are_read_and_written_as_they_were():
    for name, kind in (("compression.json", CheckpointRecord), ("onnx.json", OnnxRecord)):
        paths = list(PUBLISHED.glob(f"*/*/{name}"))
        assert paths
        for path in paths:
            data = json.loads(path.read_text())
            assert kind.from_data(data).to_data() == data
