"""Killed runs: what they leave, and whether the next run cleans up and succeeds.

    python -m faults.kills --runs 50 --write docs/kills.md
    python -m faults.kills --subcommand push --runs 10

compress, route, onnx, push (to a hub on loopback) and heal run in forks of this process and are ended by SIGKILL, some
by SIGTERM and SIGINT: half of them after a random part of the processor time that a run takes, half at a random one of
its file operations. A run that had ended before its signal came says nothing: another moment is drawn for it. Then the
same command is run again. Everything is seeded but the moments in time.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopback_hub import LoopbackHub

from . import material

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
DRAWS = 8  # moments that are drawn for a kill, at most, until one comes before the run's end
POLL_S = 0.02
SIGNALS = (signal.SIGKILL,) * 8 + (signal.SIGTERM, signal.SIGINT)
GONE_ON_FROM = (".training", ".healing", ".compressing")  # what the next run needs
OTHERS = (".ses", f"torchinductor_{getpass.getuser()}")  # ONNX Runtime's and torch's own, which they keep there
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.link", "shutil.rmtree", "subprocess.Popen")
QUESTIONS = ("--calibration", "task/all.jsonl")
COMMANDS: dict[str, tuple[str, ...]] = {
    "compress": ("compress", "source", "--out", "made", "--layers", "1", "--fold", "none", *QUESTIONS),
    "route": (*material.ROUTE, "--out", "made"),
    "onnx": ("onnx", "ours", "--out", "made"),
    "push": ("push", "ours", "user/{name}"),
    "heal": ("heal", "ours", "--teacher", "source", "--out", "made", "--steps", "2", *QUESTIONS),
}
NEEDS = {
    "compress": ("source", "task"),
    "route": ("ours", "task"),
    "onnx": ("ours",),
    "push": ("ours",),
    "heal": ("ours", "source", "task"),
}


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int  # negative: by this signal
    seconds: float  # of processor time, of the run and all that it started
    operations: int  # on files, counted where the run was not disturbed
    said: str


def run(
    home: Path,
    command: tuple[str, ...],
    *,
    number: int = 0,
    after_cpu_s: float | None = None,
    at_operation: int | None = None,
    clean: bool = True,
) -> Ended:
    """Run a command in a fork, in the folder `home`, and send it a signal after some processor time or at a file
    operation.

    Args:
        clean: whether checkpoints are verified in a process of their own; else in the fork.
    """
    child = os.fork()
    if child == 0:
        _child(home, command, number, at_operation, clean)
    handle = os.pidfd_open(child)
    until, used = time.monotonic() + LIMIT_S, 0.0
    while not select.select([handle], [], [], POLL_S)[0]:
        used = max(used, _processor_seconds(child))
        if after_cpu_s is not None and used >= after_cpu_s:
            signal.pidfd_send_signal(handle, number)
            after_cpu_s = None
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
    os.close(handle)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _none_left(child)
    counted = home / "operations"
    operations = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    return Ended(code, used, operations, (home / "stderr").read_text(errors="replace"))


def _child(home: Path, command: tuple[str, ...], number: int, at_operation: int | None, clean: bool) -> None:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(home)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ["TMPDIR"] = str(home / "tmp")
        tempfile.tempdir = None  # read anew from the environment
        if not clean:
            material.verify_here()
        done = 0

        def count(event: str, arguments: Any) -> None:
            nonlocal done
            if event in FILE_EVENTS:
                done += 1
                if done == at_operation:
                    os.kill(os.getpid(), number)

        sys.addaudithook(count)
        code = material.run(*command)
        Path("operations").write_text(str(done))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            __import__("atexit")._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _stat(process: Path) -> list[str]:
    """Return the fields of a process in /proc behind its name, from its state on; none for one that has ended."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields and fields[0] != "Z" else []


def _of_session(session: int) -> list[list[str]]:
    """Return the fields of all processes of a session."""
    running = (_stat(path) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [fields for fields in running if fields and int(fields[3]) == session]


def _processor_seconds(session: int) -> float:
    """Return the processor time of a session's processes and of their ended children."""
    ticks = sum(int(ticks) for fields in _of_session(session) for ticks in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def _none_left(session: int) -> None:
    """Wait until no process of a run is there any more. Raises AssertionError where one stays."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not _of_session(session):
            return
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    raise AssertionError("a process that the run had started is still there after 20 s")


# --- one kill ---------------------------------------------------------------------------------------------------------


def killed(
    name: str, index: int, seed: int, source: Path, work: Path, hub: LoopbackHub, whole: Ended
) -> dict[str, Any]:
    """Kill a run, look at what it leaves, and run it again."""
    generator = random.Random(f"{seed}:{name}:{index}")
    number = generator.choice(SIGNALS)
    home, needs = work / f"{name}-{index}", NEEDS[name]
    row: dict[str, Any] = {"subcommand": name, "index": index, "signal": number.name}
    try:
        for draw in range(DRAWS):
            repository = f"name-{index}-{draw}"
            command = tuple(part.format(name=repository) for part in COMMANDS[name])
            shutil.rmtree(home, ignore_errors=True)
            (home / "tmp").mkdir(parents=True)
            material.copied(source, needs, home)
            if generator.random() < 0.5:
                when: dict[str, Any] = {"after_cpu_s": generator.uniform(0, whole.seconds)}
            else:
                when = {"at_operation": generator.randint(1, whole.operations)}
            first = run(home, command, number=number, **when)
            row |= {**when, "draws": draw + 1}
            if first.code != 0:
                break
        row |= {"code": first.code, "left": sorted(_left(home, needs))}
        wanted = {-number, 0, 130} if number != signal.SIGKILL else {-number, 0}
        assert first.code in wanted, f"exit code {first.code}: {first.said[-300:]}"
        if number != signal.SIGKILL and first.code == 130:
            temporary = [entry for entry in row["left"] if not entry.endswith(GONE_ON_FROM)]
            assert not temporary, f"{number.name} leaves {temporary}"
        _whole_or_not_at_all(name, home, hub, repository)
        shutil.rmtree(home / "made", ignore_errors=True)
        again = run(home, command, clean=index % 10 == 0)
        assert again.code == 0, f"the next run ends with {again.code}: {again.said[-300:]}"
        left = _left(home, (*needs, "made"))
        assert not left, f"after the next run there is {sorted(left)}"
        if name == "push":
            assert _published(hub, repository) == _publishable(home), "the next run has not published everything"
        else:
            _whole_or_not_at_all(name, home, hub, repository)
        row["fault"] = None
    except AssertionError as fault:
        row["fault"] = str(fault)
    shutil.rmtree(home, ignore_errors=True)
    return row


def _left(home: Path, expected: tuple[str, ...]) -> set[str]:
    """What lies about beside what was there before, in the folder of the target and in that for temporary files."""
    known = {*expected, "stdout", "stderr", "tmp", "made"}
    found = {path.name for path in home.iterdir() if path.name not in known}
    found |= {
        f"tmp/{path.name}" for path in (home / "tmp").iterdir() if path.name not in OTHERS and not _is_trial(path)
    }
    return found | {str(path.relative_to(home)) for path in (home / "ours").rglob(".*.partial")}


def _is_trial(path: Path) -> bool:
    """Tell whether a file is what `tempfile` writes and removes at once, to find a folder that it may write to."""
    return re.fullmatch(r"[a-z0-9_]{8}", path.name) is not None and path.read_bytes() in (b"", b"blat")


def _whole_or_not_at_all(name: str, home: Path, hub: LoopbackHub, repository: str) -> None:
    """Raise AssertionError for a target that is there, but not whole."""
    if name == "push":
        there = _published(hub, repository)
        assert there in (set(), _publishable(home)), f"half of it was published: {sorted(there)}"
        return
    if not (home / "made").exists():
        return
    from exporter.publishing.folder_kinds import verify

    with contextlib.chdir(home):
        result = verify("made")
    assert result.holds, f"what stands under the target's name does not verify: {result.problems}"


def _published(hub: LoopbackHub, repository: str) -> set[str]:
    repo = hub.repos.get(f"user/{repository}")
    return set(repo.files("main")) - {".gitattributes"} if repo is not None and "main" in repo.refs else set()


def _publishable(home: Path) -> set[str]:
    from exporter.publishing.folder_kinds import kind_of
    from exporter.publishing.push import published

    return set(published(home / "ours", kind_of(home / "ours")))


# --- all of them ------------------------------------------------------------------------------------------------------


def kills(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all kills that are not done yet; results are kept in a file."""
    results = options.work / f"kills-{options.seed}.jsonl"
    if options.again:
        results.unlink(missing_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["subcommand"], row["index"]) for row in rows}
    with LoopbackHub() as hub:
        for name, value in hub.environment(options.work / "home").items():
            os.environ[name] = value
        material.prepare(offline=False)
        source = material.make(options.work / "material")
        material.verify_here()
        for name in options.subcommand or COMMANDS:
            todo = [index for index in range(options.runs) if (name, index) not in done]
            if not todo:
                continue
            whole = _undisturbed(name, source, options.work)
            for index in todo:
                row = killed(name, index, options.seed, source, options.work, hub, whole)
                rows.append(row)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if row["fault"]:
                    print(f"{name} {index}, {row['signal']}: {row['fault']}", flush=True)
    return rows


def _undisturbed(name: str, source: Path, work: Path) -> Ended:
    """How long a run takes when nobody ends it, and how many file operations it has."""
    home = work / f"{name}-whole"
    shutil.rmtree(home, ignore_errors=True)
    (home / "tmp").mkdir(parents=True)
    material.copied(source, ("source", "ours", "task"), home)
    command = tuple(part.format(name="whole") for part in COMMANDS[name])
    with contextlib.chdir(home), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        material.run(*command)  # in this process: what is imported late is there in every fork, and takes no time
    shutil.rmtree(home / "made", ignore_errors=True)
    ended = run(home, tuple(part.format(name="whole-again") for part in COMMANDS[name]))
    if ended.code:
        raise SystemExit(f"{' '.join(command)} fails: {ended.said}")
    shutil.rmtree(home)
    return ended


def document(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return docs/kills.md."""
    import transformers

    from exporter.version import __version__

    lines = ["| subcommand | runs | SIGKILL | SIGTERM | SIGINT | left something | broken off | had ended | faults |"]
    lines.append("|---|" + "---:|" * 8)
    for name in COMMANDS:
        of_name = [row for row in rows if row["subcommand"] == name]
        signals = Counter(row["signal"] for row in of_name)
        counts = (
            len(of_name),
            *(signals[number] for number in ("SIGKILL", "SIGTERM", "SIGINT")),
            sum(bool(row.get("left")) for row in of_name),
            sum(row.get("code") not in (0, None) for row in of_name),
            sum(row.get("draws", 1) - (row.get("code") != 0) for row in of_name),
            sum(bool(row["fault"]) for row in of_name),
        )
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    listed = "".join(f"- {r['subcommand']} {r['index']}, {r['signal']}: {r['fault']}\n" for r in rows if r["fault"])
    return (
        "# Killed runs\n\n"
        "`make kills` ends runs of tiny models at random: half after a part of the processor time that a run takes, "
        "half at one of its file operations. What stands under the target's name then is whole or not there, no "
        "process of the run is left, and the same command succeeds and sweeps what was left: nothing lies beside the "
        "target or in the folder for temporary files afterwards. This file is written by tests/faults/kills.py.\n\n"
        f"{time.strftime('%d %B %Y')}; lvlm-exporter {__version__}, transformers {transformers.__version__}, Python "
        f"{sys.version.split()[0]}; seed {options.seed}, one thread.\n\n" + "\n".join(lines) + "\n\n"
        "'Had ended' counts moments that came after the end of a run and say nothing: another one was drawn. "
        "'Left something' counts what was there after the kill and gone after the next run. The runs are forks of one "
        "process that has everything imported; their clean processes are real ones. Nine of ten next runs verify in "
        "their own process, for speed.\n"
    ) + (f"\n## Faults\n\n{listed}" if listed else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50, help="of each subcommand")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--subcommand", action="append", choices=COMMANDS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "kills")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = kills(options)
    print(document(rows, options))
    if options.write:
        options.write.write_text(document(rows, options))
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
