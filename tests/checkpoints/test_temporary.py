"""What a killed run leaves is swept by the next one, and what a living run holds is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from exporter.checkpoints.clean_process import run_watched
from exporter.checkpoints.files import replace_text
from exporter.checkpoints.staging import staging_directory
from exporter.checkpoints.temporary import LOCK, WITHOUT_LOCK_S, file_beside, folder_of_process, temporary_folder
from exporter.errors import CheckFailed, InputError

HOLDING = (
    "import sys, time\nfrom pathlib import Path\n"
    "from exporter.checkpoints import temporary, staging\n"
    "with temporary.temporary_folder('push', 'x') as a, staging.staging_directory(Path(sys.argv[1])) as b:\n"
    "    with temporary.file_beside(Path(sys.argv[2])) as c:\n"
    "        print(a, b, c.name if isinstance(c.name, str) else '', flush=True)\n"
    "        time.sleep(600)\n"
)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A place for temporary files of the test's own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def holding(target: Path, beside: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A process that holds a temporary folder, a staging directory and a file in the making, and these."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(target), str(beside)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folders = [Path(name) for name in process.stdout.readline().split()]
    assert len(folders) == 2
    return process, [*folders, *beside.parent.glob(f".{beside.name}.*.partial")]


@pytest.mark.clean_process
def test_a_living_run_keeps_what_it_holds_and_a_killed_one_does_not(place, tmp_path):
    beside = tmp_path / "README.md"
    process, held = holding(tmp_path / "out", beside)
    assert len(held) == 3 and all(path.exists() for path in held)

    def next_run() -> None:
        with temporary_folder("modules", "x"), staging_directory(tmp_path / "out"):
            replace_text(beside, "new")

    next_run()  # beside the living one
    assert all(path.exists() for path in held)
    process.kill()
    process.wait()
    assert all(path.exists() for path in held)  # SIGKILL sweeps nothing
    next_run()
    assert not any(path.exists() for path in held)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("tmp", "README.md")] == []
    assert list(place.iterdir()) == []
    assert beside.read_text() == "new"


def test_folders_without_a_lock_go_when_they_are_empty_or_old(place):
    empty, young, old, foreign = (place / f"lvlm-exporter-{name}" for name in ("a", "b", "c", "d"))
    for folder in (empty, young, old):
        folder.mkdir()
    for folder in (young, old):
        (folder / "x").write_text("x")
    os.utime(old, (time.time() - 2 * WITHOUT_LOCK_S,) * 2)
    foreign.symlink_to(young)
    with temporary_folder("push", "x") as made:
        assert (made / LOCK).exists()
    assert sorted(path.name for path in place.iterdir()) == [young.name, foreign.name]


def test_a_name_with_brackets_is_no_pattern(place, tmp_path):
    other = tmp_path / ".a.partial-x"
    other.mkdir()
    (other / LOCK).touch()
    with staging_directory(tmp_path / "[a]"):
        assert other.exists()
    with staging_directory(tmp_path / "a"):
        assert not other.exists()


def test_a_file_in_the_making_is_seen_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(TypeError), file_beside(path) as file:
        file.writelines([b"half", "of it is no bytes"])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_messages_name_what_a_temporary_folder_stands_for(place, tmp_path):
    with temporary_folder("push", "small") as made:
        assert str(InputError(f"{made}/config.json is damaged.")) == "small/config.json is damaged."
    with staging_directory(tmp_path / "out") as stage:
        assert str(CheckFailed(f"{stage} does not verify.")) == f"{tmp_path / 'out'} does not verify."
    view = folder_of_process("source", "model")
    assert str(InputError(f"{view / 'x'}: no.")) == "model/x: no."


@pytest.mark.clean_process
def test_a_watched_script_gives_its_output(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ['X']); raise ValueError('no such thing')")
    ran = run_watched(script, "a", "b", X="y")
    assert ran.returncode == 1
    assert ran.stdout == "['a', 'b'] y\n"
    assert ran.stderr.endswith("ValueError: no such thing\n")


@pytest.mark.clean_process
def test_a_clean_process_ends_with_the_one_that_started_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time; open('" + str(tmp_path / "pid") + "', 'w').write(f'{os.getpid()} ')\ntime.sleep(600)"
    )
    code = "import sys\nfrom exporter.checkpoints.clean_process import run_watched\nrun_watched(sys.argv[1])\n"
    parent = subprocess.Popen([sys.executable, "-c", code, str(script)])
    pid = _soon(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith(" "), tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _soon(lambda: not _runs(pid), tmp_path)


def _soon(holds, tmp_path: Path) -> int:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
    return int((tmp_path / "pid").read_text())


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
