"""The list of modeling files that releases have shipped."""

from __future__ import annotations

import shutil

import pytest

from exporter.checkpoints.own_types import OWN_TYPES
from exporter.modeling import released
from exporter.modeling.released import COMING, HERE, RELEASED, is_released, sha256_of, shipped_files, with_present_files
from exporter.routing.folder import MODELING_FILES
from exporter.routing.serving.folder import SERVING_FILES


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.name)
def test_each_shipped_file_is_listed(path):
    assert RELEASED.get(sha256_of(path), ("", ""))[0] == path.name, (
        f"{path.name} has changed: python -m exporter.modeling.released --add"
    )


def test_the_file_of_the_first_release_is_listed():
    first = "9e5b585a0f37774a3f703e3421a1c6d4e8653eb3aae3d67a657fe29a29844cd1"
    assert RELEASED[first] == ("modeling_routed.py", "0.1.0")


def test_a_file_is_released_under_its_own_name_only_and_as_it_was(tmp_path):
    original = shipped_files()[0]
    same, renamed = tmp_path / original.name, tmp_path / "modeling_other.py"
    shutil.copy(original, same)
    shutil.copy(original, renamed)
    assert is_released(same) and not is_released(renamed) and not is_released(tmp_path / "missing.py")
    same.write_bytes(same.read_bytes() + b"\n")
    assert not is_released(same)


def test_adding_replaces_earlier_states_of_the_coming_release_only():
    old = {"aa": ("modeling_routed.py", "0.1.0"), "bb": ("modeling_routed.py", COMING)}
    listed = with_present_files(old)
    assert listed["aa"] == old["aa"] and "bb" not in listed
    assert {sha256_of(path) for path in shipped_files()} == set(listed) - {"aa"}


def test_the_command_records_and_names_the_release(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "LIST", tmp_path / "released.json")
    monkeypatch.setattr(released, "RELEASED", {"bb": ("modeling_routed.py", COMING)})
    released.main(["--release", "0.2.0"])
    text = (tmp_path / "released.json").read_text()
    assert "0.2.0" in text and COMING not in text and '"bb"' not in text


def test_the_main_file_names_all_its_siblings():
    """transformers 4 copies only what the main file itself imports, and then fails at a file that is not there."""
    main = (HERE / MODELING_FILES[0]).read_text()
    own = {f"{module}.py" for own in OWN_TYPES.values() for module in (own.module, *own.siblings, own.routed_module)}
    assert {path.name for path in shipped_files()} == {*MODELING_FILES, *SERVING_FILES, *own}
    for own_type in OWN_TYPES.values():
        text = (HERE / f"{own_type.module}.py").read_text()
        assert all(f"\nfrom .{module} import" in text for module in own_type.siblings)
        routed = (HERE / f"{own_type.routed_module}.py").read_text()
        assert all(f"\nfrom .{module} import" in routed for module in (own_type.module, "modeling_routed"))
    assert all(f"\nfrom .{name.removesuffix('.py')} import" in main for name in MODELING_FILES[1:])
    served = (HERE / SERVING_FILES[0]).read_text()
    assert all(f"\nfrom .{name.removesuffix('.py')} import" in served for name in SERVING_FILES[1:])
