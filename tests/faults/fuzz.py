"""The fuzzer: damages copies of every kind of file that is read, and looks at what the command line makes of it.

    python -m faults.fuzz --cases 5000 --seed 1 --workers 2 --write docs/faults.md
    python -m faults.fuzz --kind "config.json" --cases 200
    python -m faults.fuzz --replay 1234            # one case again, its output shown and its folder kept

Case N of a seed is always the same. Every case is a fork of a process that has everything imported, and is classed by
what it does within 20 seconds of processor time. Results are kept in a file in --work, each with the tree of the
package that it is of: the same command goes on where it was broken off, and with --repeat it runs the faults that were
found in other trees again.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import damages, material
from .damages import RECORDS
from .kinds import CHECKS, KINDS, Command, Kind, cheap

ROOT = Path(__file__).parents[2]
LIMIT_S = 20.0  # of processor time: what else the machine does makes no hang
WAIT_S = 120.0  # of clock time: whoever waits for something that never comes uses no processor
MEMORY = 4 << 30  # bytes beyond what the process holds
GOOD = ("right", "refused", "found", "said", "other input")
FAULTS = ("traceback", "hang", "exit code", "no sentence", "temporary name", "half-written", "silent")
MEANING = {
    "right": "the same result as from the undamaged file",
    "refused": "one sentence, exit code 2",
    "found": "a check says what does not hold, exit code 1",
    "said": "another result, and a sentence that says what was ignored or mended",
    "other input": "another result of a file that is well-formed: another value of the same type, a line less",
    "traceback": "an exception that nobody caught",
    "hang": f"not done after {LIMIT_S:.0f} s of processor time or {WAIT_S:.0f} s of clock time, or ended by a signal",
    "exit code": "another exit code than 0, 1 of a check, 2",
    "no sentence": "nothing is said, or more than a sentence",
    "temporary name": "a message names a temporary folder",
    "half-written": "something is left beside the target or in the temporary folder",
    "silent": "another result without a word",
}
VOLATILE = re.compile(
    r"seconds|_ms$|date|path|out$|peak|per_s$|versions|interval|achieved|memory|total_ms|ratio|fingerprint"
)
TEMPORARY = re.compile(r"lvlm-exporter-(?:source|push|view|modules|offload|images)-|\.partial-|/tmp/lvlm")
MODULES = ".modules"  # where a case that is not run as root keeps what transformers copies
PASSES = re.compile(r"Warning|warn\(")  # lines of other packages that are no message of ours


@dataclass(frozen=True)
class Case:
    """A damaged file and the command that reads it."""

    number: int
    kind: str
    file: str
    damage: str
    command: str


@dataclass(frozen=True)
class Outcome:
    """What came of a command."""

    code: int | None  # None: it did not end in time, or by a signal
    said: str  # stderr
    result: str  # a digest of what it printed, wrote and made, without times
    left: tuple[str, ...]  # names that should not be there
    seconds: float


def case_of(options: argparse.Namespace, number: int, home: Path, source: Path) -> tuple[Case, Kind, Command, bytes]:
    """Lay out case `number` in the folder `home`: copy what it needs, and damage one file."""
    generator = random.Random(f"{options.seed}:{number}")
    kinds = kinds_of(options)
    kind = generator.choices(kinds, [kind.share for kind in kinds])[0]
    command = generator.choice(list(kind.commands))
    material.copied(source, kind.needs, home)
    path = material.chosen(generator, home, kind.files)
    before = path.read_bytes()
    damage = generator.choice(list(kind.damages))
    with contextlib.chdir(home):
        said = damage(generator, path)
    shown = f"{damage.__name__}: {said}".encode(errors="backslashreplace").decode()
    return Case(number, kind.name, str(path.relative_to(home)), shown, " ".join(command)), kind, command, before


def kinds_of(options: argparse.Namespace) -> list[Kind]:
    """The kinds that are asked for."""
    return [kind for kind in (cheap() if options.cheap else KINDS) if options.kind in (None, kind.name)]


# --- one run ----------------------------------------------------------------------------------------------------------


def outcome_of(home: Path, command: Command, may_read_all: bool = True) -> Outcome:
    """Run a command in a fork of this process, in the folder `home`."""
    begin = time.monotonic()
    temporary, before = home / "tmp", {path.name for path in home.iterdir()}
    temporary.mkdir()
    child = os.fork()
    if child == 0:
        _child(home, command, temporary, may_read_all)
    code = _ended(child)
    seconds = time.monotonic() - begin
    said = (home / "stderr").read_text(errors="replace") if (home / "stderr").exists() else ""
    printed = (home / "stdout").read_text(errors="replace") if (home / "stdout").exists() else ""
    expected = {"tmp", "stdout", "stderr", "result.json", "said.jsonl", MODULES, *before}
    left = [path.name for path in temporary.iterdir() if path.name != ".ses"]  # ONNX Runtime's
    left += [path.name for path in home.rglob("*.partial*") if not path.is_symlink()]
    if code != 0:
        made = {path.name for path in home.iterdir()} - expected
        if (command[0], code) == ("reproduce", 1):
            made -= {"out"}  # whole, and verified: it differs from what the record says
        left += [name for name in made if not _resumable(home / name)]
    return Outcome(code, said, result_of(home, command, printed), tuple(sorted(left)), seconds)


def _resumable(path: Path) -> bool:
    """Tell whether what is left is meant to be: a broken-off comparison or training goes on from it."""
    return (
        path.name.endswith(".training") or (path.is_dir() and any(path.rglob("cells.jsonl"))) or "compare" in path.name
    )


def _child(home: Path, command: Command, temporary: Path, may_read_all: bool) -> None:
    """Run the command and end the process, whatever happens."""
    code = 70
    try:
        os.setsid()
        os.chdir(home)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None  # read anew from the environment
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not may_read_all and os.geteuid() == 0:
            _as_nobody(home)
        sys.argv = ["lvlm-exporter", *command]
        code = material.run(*command)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _as_nobody(home: Path) -> None:
    """Give up the rights of root, for whom every file is readable, and root's cache of modules."""
    from transformers import dynamic_module_utils

    sys.path = [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE]
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # of the baseline's run
    dynamic_module_utils.HF_MODULES_CACHE = str(home / MODULES)
    for path in [home, *home.rglob("*")]:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    os.setgid(65534)
    os.setuid(65534)


def _ended(child: int) -> int | None:
    """Wait for a child; kill it and all that it started after LIMIT_S of processor time or WAIT_S of the clock."""
    handle = os.pidfd_open(child)
    until = time.monotonic() + WAIT_S
    in_time = False
    try:
        while not in_time and time.monotonic() < until and _processor_seconds(child) < LIMIT_S:
            in_time = bool(select.select([handle], [], [], 0.5)[0])
    finally:
        os.close(handle)
    if not in_time:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if in_time and os.WIFEXITED(status) else None


def _processor_seconds(process: int) -> float:
    """Return the processor time that a process and its ended children have used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime


def result_of(home: Path, command: Command, printed: str) -> str:
    """Return a digest of everything that a command gives."""
    parts: list[Any] = []
    if (home / "result.json").is_file():
        told = json.loads((home / "result.json").read_text())
        if command[0] == "push":  # the damaged file's own size is in both
            del told["bytes"]
            told["files"] = {name: size for name, size in told["files"].items() if name not in RECORDS}
        if command[0] == "compress":  # what is copied is as damaged as it was; what is made of it is compared below
            told.get("measured", {}).pop("files", None)
        parts.append(without_times(told))
    else:
        parts.append(printed)
    if (home / "said.jsonl").is_file():
        lines = [json.loads(line) for line in (home / "said.jsonl").read_text().splitlines()]
        parts.append([{key: value for key, value in line.items() if key != "run"} for line in lines])
    for path in sorted((home / "out").glob("*")):
        if path.suffix in (".safetensors", ".jinja") or path.name in ("config.json", "tokenizer.json"):
            parts.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
    if command[0] == "card" and (home / command[1] / "README.md").is_file():
        parts.append((home / command[1] / "README.md").read_text(errors="replace"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def without_times(data: Any) -> Any:
    """Leave out what differs from run to run."""
    if isinstance(data, dict):
        return {key: without_times(value) for key, value in data.items() if not VOLATILE.search(key)}
    return [without_times(item) for item in data] if isinstance(data, list) else data


# --- classes ----------------------------------------------------------------------------------------------------------


def class_of(got: Outcome, wanted: Outcome, kind: Kind, command: Command, form: str) -> str:
    """Return the class of an outcome.

    Args:
        wanted: the outcome with the undamaged file.
        form: 'unchanged', 'same form' or 'damaged': what the file is now.
    """
    lines = [line for line in got.said.strip().splitlines() if not PASSES.search(line)]
    if "Traceback (most recent call last)" in got.said or got.code == 70:
        return "traceback"
    if got.code is None:
        return "hang"
    if got.code not in (0, 1, 2) or (got.code == 1 and command[0] not in CHECKS):
        return "exit code"
    if TEMPORARY.search(got.said):
        return "temporary name"
    if got.left:
        return "half-written"
    if got.code:
        ours = [line for line in lines if line.startswith("lvlm-exporter: ")]
        if len(ours) != 1 or lines[-1] != ours[0] or len(lines) > 3 or len(ours[0]) > 1500:
            return "no sentence"
        return "refused" if got.code == 2 else "found"
    if kind.hashed and form != "unchanged":
        return "silent"
    if got.result == wanted.result:
        return "right"
    new = set(lines) - set(wanted.said.strip().splitlines())
    if new:
        return "said"
    return "other input" if form != "damaged" else "silent"


def run_case(
    options: argparse.Namespace, number: int, source: Path, baselines: dict[Command, Outcome], home: Path
) -> dict[str, Any]:
    """Run one case and return its line of the results."""
    home.mkdir(parents=True)
    case, kind, command, before = case_of(options, number, home, source)
    form = form_of(home / case.file, before)
    may_read_all = not case.damage.startswith("unreadable")
    got = outcome_of(home, command, may_read_all)
    wanted = baselines[command]
    return asdict(case) | {
        "class": class_of(got, wanted, kind, command, form),
        "form": form,
        "code": got.code,
        "said": got.said[-1500:],
        "left": list(got.left),
        "seconds": round(got.seconds, 2),
    }


def form_of(path: Path, before: bytes) -> str:
    """Tell what a damage has left: a file as before, one of the same form, or neither."""
    if path.is_symlink() or not path.is_file() or path.stat().st_mode & 0o777 == 0:
        same_bytes = path.is_symlink() and path.is_file() and path.resolve().name == "outside"
        return "unchanged" if same_bytes else "damaged"
    after = path.read_bytes()
    if after == before:
        return "unchanged"
    return "same form" if damages.same_form(before, after, path.name) else "damaged"


def baselines_for(kinds: list[Kind], source: Path, work: Path) -> dict[Command, Outcome]:
    """The outcome of every command with undamaged files. The first of each subcommand also runs in this process: what
    it imports, the forks then have.
    """
    found: dict[Command, Outcome] = {}
    imported: set[str] = set()
    for kind in kinds:
        for command in dict.fromkeys(kind.commands):
            if command in found:
                continue
            home = work / "baseline"
            if command[0] not in imported:
                imported.add(command[0])
                _laid_out(kind, source, home)
                with contextlib.chdir(home), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    material.run(*command)
            _laid_out(kind, source, home)
            found[command] = outcome_of(home, command)
            if found[command].code != 0:
                raise SystemExit(f"{' '.join(command)} fails with undamaged files: {found[command].said}")
    return found


def _laid_out(kind: Kind, source: Path, home: Path) -> None:
    damages.clear(home)
    home.mkdir(parents=True)
    material.copied(source, kind.needs, home)


# --- all of them ------------------------------------------------------------------------------------------------------


def worker(
    numbers: list[int], options: argparse.Namespace, source: Path, baselines: dict[Command, Outcome], queue: Any
) -> None:
    """Run cases one after the other, each in a fork of this process."""
    for number in numbers:
        home = options.work / f"case-{number}"
        try:
            queue.put(run_case(options, number, source, baselines, home))
        except Exception:
            queue.put(
                {"number": number, "class": "fuzzer", "said": traceback.format_exc(), "kind": "?", "damage": "?"}
            )  # a bug of this file
        finally:
            damages.clear(home)
    queue.put(None)


def fuzz(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cases that are not done yet, and return the results of all of them."""
    material.prepare()
    material.verify_here()
    source = material.make(options.work / "material", options.keep_material, whole=not options.cheap)
    results = Results(
        options.work / f"results-{options.seed}-{(options.kind or 'all').replace(' ', '_')}.jsonl", options.again
    )
    tree = tree_here()
    if options.repeat:
        results.forget(lambda row: row["class"] not in GOOD and row.get("tree") != tree)
    todo = [number for number in range(options.cases) if number not in results.done]
    if todo:
        baselines = baselines_for(kinds_of(options), source, options.work)
        context = multiprocessing.get_context("fork")
        queue: Any = context.Queue()
        parts = [todo[index :: options.workers] for index in range(options.workers)]
        running = [context.Process(target=worker, args=(part, options, source, baselines, queue)) for part in parts]
        for process in running:
            process.start()
        ended = 0
        while ended < len(running):
            row = queue.get()
            if row is None:
                ended += 1
                continue
            results.add(row | {"tree": tree})
            if row["class"] not in GOOD:
                print(f"case {row['number']}: {row['class']}: {row.get('file')} {row['damage']}", flush=True)
        for process in running:
            process.join()
    return [row for number, row in sorted(results.done.items()) if number < options.cases]


def tree_here() -> str:
    """Return git's short name of the package's files, which no other change touches, with a + where they differ."""

    def git(*words: str) -> str:
        return subprocess.run(("git", "-C", str(ROOT), *words), capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=10", "HEAD:exporter").strip() + "+" * bool(git("status", "-s", "exporter"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Results:
    """Results on disk, a line each."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        if again:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        self.done: dict[int, dict[str, Any]] = {row["number"]: row for row in map(json.loads, lines)}

    def forget(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Have some cases run again; their new lines follow the old ones and replace them."""
        self.done = {number: row for number, row in self.done.items() if not which(row)}

    def add(self, row: dict[str, Any]) -> None:
        self.done[row["number"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


# --- telling ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Kinds of files by classes of outcomes, as Markdown."""
    counted = {kind.name: Counter(row["class"] for row in rows if row["kind"] == kind.name) for kind in KINDS}
    classes = [name for name in (*GOOD, *FAULTS) if name in GOOD or any(count[name] for count in counted.values())]
    lines = ["| file | cases | " + " | ".join(classes) + " |", "|---|---:|" + "---:|" * len(classes)]
    total = Counter(row["class"] for row in rows)
    for name, count in [*counted.items(), ("**all**", total)]:
        if count:
            cells = [str(count[each] or "") for each in classes]
            lines.append(f"| {name} | {sum(count.values())} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def other_runs(options: argparse.Namespace) -> str:
    """Return a sentence for each other seed that the folder of results has."""
    told = ""
    for path in sorted(options.work.glob("results-*-all.jsonl")):
        seed = path.name.split("-")[1]
        rows = Results(path, again=False).done.values()
        if seed != str(options.seed) and rows:
            faults, trees = sum(row["class"] not in GOOD for row in rows), {row.get("tree", "unknown") for row in rows}
            at = ", ".join(sorted(trees))
            told += f"Another run, of seed {seed}: {len(rows):,} cases at {at}, {faults} faults.\n"
    return told and f"{told}\n"


def document(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """docs/faults.md."""
    import transformers

    from exporter.version import __version__

    faults = [row for row in rows if row["class"] not in GOOD]
    trees = Counter(row.get("tree", "unknown") for row in rows)
    of_trees = ", ".join(f"{count:,} at {tree}" for tree, count in trees.most_common())
    meanings = "".join(f"- **{name}**: {meaning}\n" for name, meaning in MEANING.items())
    listed = "".join(
        f"- case {row['number']}: {row['class']}, {row.get('file')}, {row['damage'][:120]}\n" for row in faults
    )
    command = f"make fuzz CASES={options.cases} SEED={options.seed}"
    return (
        "# Damaged files\n\n"
        f"`{command}` damages copies of every kind of file that is read, each in its own way, and runs a subcommand "
        "that reads it. A case is classed by what comes of it. This file is written by that command.\n\n"
        f"{time.strftime('%d %B %Y')}; lvlm-exporter {__version__}, transformers {transformers.__version__}, Python "
        f"{sys.version.split()[0]}. Seed {options.seed}, {len(rows):,} cases, of which **{len(faults)}** are faults. "
        f"Cases by the tree of the package that they were run at (`git rev-parse HEAD:exporter`): {of_trees}.\n\n"
        f"{other_runs(options)}{table(rows)}\n{meanings}\n"
        "The clean process that verifies a checkpoint is run in the case's own process here, for speed. What a "
        "flipped bit makes of the weights or pictures of a source can't be told from other weights or another "
        "picture; a folder that lvlm-exporter wrote has the SHA-256 of every file, and there no change may pass.\n"
    ) + (f"\n## Faults\n\n{listed}" if faults else "")


def replay(options: argparse.Namespace) -> int:
    """Run one case again, show what it says, and keep its folder."""
    material.prepare()
    material.verify_here()
    source = material.make(options.work / "material", options.keep_material, whole=not options.cheap)
    home = options.work / f"replay-{options.replay}"
    damages.clear(home)
    home.mkdir(parents=True)
    case, kind, command, before = case_of(options, options.replay, home, source)
    form = form_of(home / case.file, before)
    alone = [dataclasses.replace(kind, commands=(command,))]
    wanted = baselines_for(alone, source, options.work)[command]
    got = outcome_of(home, command, may_read_all=not case.damage.startswith("unreadable"))
    print(f"{case.file}: {case.damage} ({form})\n$ cd {home}; lvlm-exporter {case.command}\n{got.said}")
    print(
        f"exit code {got.code} after {got.seconds:.1f} s, left {got.left}: {class_of(got, wanted, kind, command, form)}"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS])
    parser.add_argument("--cheap", action="store_true", help="only what a dry run on a source reads")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "faults", help="material, cases, results")
    parser.add_argument("--keep-material", action="store_true", help="made by an earlier version of this package")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--repeat", action="store_true", help="run the faults that other trees gave again")
    parser.add_argument("--replay", type=int, metavar="N", help="this case only")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="document with the figures")
    options = parser.parse_args()
    options.work = options.work.absolute()
    if options.replay is not None:
        return replay(options)
    rows = fuzz(options)
    print(table(rows))
    if options.write:
        options.write.write_text(document(rows, options))
    return int(any(row["class"] not in GOOD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
