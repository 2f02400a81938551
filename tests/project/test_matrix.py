"""The compatibility matrix's own logic: which releases, which environments, what its table says. Installs nothing."""

from __future__ import annotations

import json

import matrix
import matrix_cells
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIRED = [Requirement("transformers>=5.20"), Requirement("numpy>=2.0,<3"), Requirement("torch>=2.8")]
PINNED = {"transformers": "5.24.0", "numpy": "2.4.6", "torch": "2.13.0", "ruff": "0.17.6"}
NEWEST = {"transformers": "5.25.0", "numpy": "2.5.0", "torch": "2.15.0"}


def test_every_requirement_states_a_floor_and_no_pin_is_below_it():
    oldest, pinned = matrix.floors(matrix.requirements()), matrix.pins()
    assert {"transformers", "huggingface-hub", "onnxruntime", "torch"} <= set(oldest)
    for requirement in matrix.requirements():
        assert pinned.get(requirement.name.lower().replace("_", "-"), oldest[canonicalize_name(requirement.name)])
        name = canonicalize_name(requirement.name)
        assert name not in pinned or requirement.specifier.contains(pinned[name])


def test_a_requirement_without_a_floor_is_an_error():
    with pytest.raises(ValueError, match="numpy<3 states no floor"):
        matrix.floors([Requirement("numpy<3")])


def test_rows_install_what_they_are_called_after_and_never_torch():
    rows = {row.name: row for row in matrix.rows(REQUIRED, PINNED, NEWEST)}
    assert list(rows) == ["pinned", "floor", "between", "newest", "all-floors", "all-newest", "older"]
    assert rows["pinned"].requirements == ("numpy==2.4.6", "transformers==5.24.0")
    assert rows["floor"].requirements == ("numpy==2.4.6", "transformers==5.20")
    assert rows["between"].requirements == ("numpy==2.4.6", "transformers==5.23.0")
    assert rows["newest"].requirements == ("numpy==2.4.6", "transformers==5.25.0")
    assert rows["all-floors"].requirements == ("numpy==2.0", "transformers==5.20")
    assert rows["all-newest"].requirements == ("numpy==2.5.0", "transformers==5.25.0")
    assert rows["pinned"].cells.index("expect") > rows["pinned"].cells.index("onnx")


def test_every_cell_of_every_row_is_there_and_has_a_title():
    for row in matrix.rows(REQUIRED, PINNED, NEWEST):
        assert set(row.cells) | row.may_refuse <= set(matrix_cells.CELLS)
    assert all(title for name, (title, _) in matrix_cells.CELLS.items() if name != "expect")


def test_rows_are_chosen_by_name_and_the_one_that_others_need_comes_along():
    rows = matrix.rows(REQUIRED, PINNED, NEWEST)
    assert [row.name for row in matrix.select(rows, "older")] == ["pinned", "older"]
    with pytest.raises(SystemExit, match="--rows newst: rows are pinned, floor"):
        matrix.select(rows, "newst")


def test_rows_of_the_same_releases_are_run_once_and_the_first_one_first():
    latest = {name: release for name, release in PINNED.items() if name != "ruff"}
    rows = matrix.rows(REQUIRED, PINNED, latest)  # the newest are those that are pinned
    ran = []

    def run(row):
        ran.append(row.name)
        return {"row": row.name, "title": row.title, "versions": {}, "warnings": [], "cells": {}}

    results = matrix.run_rows(rows, 1, run)
    assert ran == ["pinned", "floor", "between", "all-floors", "older"]
    assert [result["row"] for result in results] == [row.name for row in rows]


def test_what_never_ended_has_failed_and_a_refusal_is_one_only_where_it_may_be():
    row = matrix.Row("r", "r", (), ("compress", "old_routed", "push"), frozenset({"old_routed"}))
    refused = {"status": "refused", "detail": "No.", "seconds": 1.0}
    result = matrix.settled(row, {"cells": {"compress": refused, "old_routed": refused}}, "it died")
    assert [result["cells"][name]["status"] for name in row.cells] == ["failed", "refused", "failed"]
    assert result["cells"]["push"]["detail"] == "it died"
    assert not matrix.holds([result])
    assert matrix.holds([{"cells": {"old_routed": refused}}])


def test_the_table_numbers_what_cells_have_to_say():
    def result(title: str, **cells: tuple[str, str]) -> dict[str, object]:
        told = {name: {"status": status, "detail": detail, "seconds": 1.0} for name, (status, detail) in cells.items()}
        versions = {"torch": "2.13.0", "transformers": "5.24.0"}
        return {"row": title, "title": title, "versions": versions, "warnings": ["FutureWarning: old"], "cells": told}

    results = [
        result("newest", compress=("ok", ""), own_file=("known", "renamed")),
        result("odd", compress=("failed", "broken"), own_file=("known", "renamed")),
        result("old", old_routed=("refused", "needs 5")),
    ]
    text = matrix.markdown(results, {name: title for name, (title, _) in matrix_cells.CELLS.items()}, "2026-11-28")
    assert "| newest | 5.24.0 | yes | known (1) |" in text
    assert "| odd | 5.24.0 | **FAILED** (2) | known (1) |" in text
    assert "refused (3)" in text and "3. needs 5\n" in text
    assert "- FutureWarning: old" in text


def test_pip_s_reason_is_what_it_could_not_find():
    said = "ERROR: Ignored the following versions that ...\nERROR: No matching distribution found for numpy==0\n"
    assert matrix.first_error(said) == "No matching distribution found for numpy==0"


def test_a_cell_tells_a_refusal_from_a_failure(capsys):
    def refuses(_):
        raise matrix_cells.Refused("it needs transformers 5.")

    def fails(_):
        raise ValueError("first line\nsecond")

    assert matrix_cells.outcome(lambda _: None, None) == ("ok", "")
    assert matrix_cells.outcome(refuses, None) == ("refused", "it needs transformers 5.")
    assert matrix_cells.outcome(fails, None) == ("failed", "ValueError: first line")
    assert "second" in capsys.readouterr().err


def test_sources_name_the_tokenizer_s_class_as_on_the_hub(tiny, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes((tiny("llava") / path.name).read_bytes())
    matrix.as_on_the_hub(tmp_path)
    settings = json.loads(path.read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
