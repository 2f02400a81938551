"""The compatibility matrix: what this package does under the oldest, the pinned and the newest releases it stands on.

    make matrix                                   # or: python tests/matrix.py --out docs/compatibility.md
    python tests/matrix.py --rows pinned,newest   # some rows

Every row is a virtual environment of its own that lies over the one whose interpreter runs this file: only what differs
is installed, torch never (no index has CPU builds of all releases). In it `matrix_cells.py` compresses, routes,
verifies, evaluates, exports and pushes tiny random models, and loads folders that earlier releases and the row `pinned`
made. A cell that fails makes the exit code 1; one that is refused with a sentence, where a refusal is right, does not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
FULL = ("compress", "route", "verify", "evaluate", "onnx", "push", "today", "published", "own_file", "updated")
FIRST = (*FULL[: FULL.index("today")], "expect", *FULL[FULL.index("today") :])  # writes down what the others compare
OLD = ("old_plain", "old_processor", "old_published_processor", "old_routed")
NO_ONNX = frozenset({"onnx"})  # the extra `onnx` asks for a newer transformers than the package
OLDER = ("transformers==4.57.6",)  # the last release of transformers 4; pip brings the releases that it needs
BETWEEN = "5.23.0"  # the release before `past_key_values` became `cache`, and the first with ONNX Runtime's operators
NOT_MOVED = "torch"  # the build that is there stays
MARKS = {"ok": "yes", "refused": "refused", "known": "known", "failed": "**FAILED**"}


@dataclass(frozen=True)
class Row:
    """An environment, what is run in it, and which cells may be refused."""

    name: str
    title: str
    requirements: tuple[str, ...]  # as pip takes them
    cells: tuple[str, ...] = FULL
    may_refuse: frozenset[str] = frozenset()


# --- what is required, pinned and newest ------------------------------------------------------------------------------


def requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """Return what the package and its extra `onnx` require."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["onnx"])]


def floors(required: Iterable[Requirement]) -> dict[str, str]:
    """Return the oldest release of each requirement that its `>=` allows."""
    found: dict[str, str] = {}
    for requirement in required:
        oldest = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(oldest) != 1:
            raise ValueError(f"pyproject.toml: {requirement} states no floor (>=), which the matrix tests.")
        found.setdefault(canonicalize_name(requirement.name), oldest[0])  # the package's own before an extra's
    return found


def pins(constraints: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Return what constraints.txt pins."""
    lines = [line.partition("#")[0].strip() for line in constraints.read_text().splitlines()]
    return {canonicalize_name(name): release for name, _, release in (line.partition("==") for line in lines if line)}


def newest(required: Sequence[Requirement], pip: Sequence[str]) -> dict[str, str]:
    """Ask the package index for the newest release of each requirement that pyproject.toml allows."""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-"]
    ran = subprocess.run([*pip, *command, *map(str, required)], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"the package index could not be asked: {ran.stderr.strip()}")
    found = [item["metadata"] for item in json.loads(ran.stdout)["install"]]
    return {canonicalize_name(item["name"]): item["version"] for item in found}


def rows(required: Sequence[Requirement], pinned: Mapping[str, str], latest: Mapping[str, str]) -> list[Row]:
    """Return the rows of the matrix; `pinned` comes first, because the others load what it made."""
    oldest = floors(required)
    of_ours = [canonicalize_name(requirement.name) for requirement in required]
    here = {name: release for name, release in pinned.items() if name in of_ours}
    return [
        Row("pinned", "pinned (constraints.txt)", exact(here), FIRST),
        Row("floor", "oldest transformers", exact(here | {"transformers": oldest["transformers"]}), FULL, NO_ONNX),
        Row("between", "transformers before the rename", exact(here | {"transformers": BETWEEN})),
        Row("newest", "newest transformers", exact(here | {"transformers": latest["transformers"]})),
        Row("all-floors", "oldest of everything", exact(oldest), FULL, NO_ONNX),
        Row("all-newest", "newest of everything", exact(latest)),
        Row("older", "transformers 4", OLDER, OLD, frozenset({"old_published_processor", "old_routed"})),
    ]


def exact(releases: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}=={release}" for name, release in sorted(releases.items()) if name != NOT_MOVED)


# --- environments -----------------------------------------------------------------------------------------------------


def environment(row: Row, folder: Path, pip: Sequence[str]) -> Path:
    """Make a row's virtual environment over this one and return its interpreter; one that fits is used again."""
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    if marker.exists() and marker.read_text().split() == list(row.requirements):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    below = [place for place in sys.path if place.endswith("site-packages")]
    (site / "below.pth").write_text("\n".join([*below, str(ROOT)]) + "\n")
    command = [*pip, "--python", str(python), "install", "--quiet", *row.requirements]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"pip can't set it up: {first_error(ran.stderr)}")
    marker.write_text("\n".join(row.requirements) + "\n")
    return python


def first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR") and "Ignored the following" not in line]
    return (lines or text.strip().splitlines() or ["no output"])[0].removeprefix("ERROR: ")


# --- running ----------------------------------------------------------------------------------------------------------


def run_row(row: Row, work: Path, pip: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a row's cells in its environment: {"versions", "cells": {name: {"status", "detail", "seconds"}}}."""
    print(f"{row.title}: {' '.join(row.requirements)}", flush=True)
    folder = work / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = {"cells": list(row.cells), "sources": str(work / "sources"), "today": str(work / "pinned")}
    (folder / "job.json").write_text(json.dumps(job))
    try:
        python = environment(row, work / "environments" / row.name, pip)
    except RuntimeError as error:
        return settled(row, {"versions": {}, "cells": {}, "warnings": []}, str(error))
    if row.name == "pinned":
        shutil.copytree(work / "sources" / "questions", folder / "questions")
    log = folder / "log.txt"
    with log.open("w") as output:
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        ran = subprocess.run(
            [str(python), str(TESTS / "matrix_cells.py"), str(folder)],
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = log.read_text().splitlines()
    print(
        "\n".join([f"{row.title}:", *(line for line in lines if re.match(r"  \w+: (ok|refused|known|failed)", line))])
    )
    result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
    return settled(row, result, f"the process ended with exit code {ran.returncode}; see {log.relative_to(work)}")


def run_rows(wanted: Sequence[Row], jobs: int, run: Callable[[Row], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the first row and then the others, some at a time; rows of the same releases are run once."""
    firsts: dict[tuple[str, ...], Row] = {}
    for row in wanted:
        firsts.setdefault(row.requirements, row)
    different = list(firsts.values())
    with ThreadPoolExecutor(jobs) as pool:
        done = [run(row) for row in different[:1]] + list(pool.map(run, different[1:]))
    by_releases = dict(zip((row.requirements for row in different), done, strict=True))
    return [{**by_releases[row.requirements], "row": row.name, "title": row.title} for row in wanted]


def settled(row: Row, result: dict[str, Any], otherwise: str) -> dict[str, Any]:
    """Complete a row's result: a cell that never ended has failed, and so has a refusal where none is right."""
    cells = dict(result.get("cells", {}))
    for name in row.cells:
        cell = cells.setdefault(name, {"status": "failed", "detail": otherwise, "seconds": 0.0})
        if cell["status"] == "refused" and name not in row.may_refuse:
            cells[name] = cell | {"status": "failed"}
    kept = {"versions": result.get("versions", {}), "warnings": result.get("warnings", [])}
    return {"row": row.name, "title": row.title, **kept, "cells": cells}


def holds(results: Iterable[Mapping[str, Any]]) -> bool:
    return all(cell["status"] != "failed" for result in results for cell in result["cells"].values())


def make_sources(work: Path) -> None:
    """Write the tiny models that every row starts from, and the questions, once, by the releases that are here."""
    sys.path.insert(0, str(TESTS))
    import numpy as np
    from matrix_cells import FAMILIES
    from tiny_models import QUESTIONS, SIZES, build, random_image

    shutil.rmtree(work / "sources", ignore_errors=True)
    for family in FAMILIES:
        folder = build(family, work / "sources" / family, layers=5, seed=1)
        as_on_the_hub(folder)
    questions = work / "sources" / "questions"
    questions.mkdir()
    random, lines = np.random.default_rng(0), []
    for number in range(8):
        random_image(random, SIZES[number % len(SIZES)]).save(questions / f"{number}.png")
        line = {"image": f"{number}.png", "question": QUESTIONS[number % len(QUESTIONS)], "answer": "red"}
        lines.append(json.dumps(line) + "\n")
    (questions / "calibration.jsonl").write_text("".join(lines))


def as_on_the_hub(folder: Path) -> None:
    """Name the tokenizer's class as repositories on the hub do; transformers 5 would write a name that 4 lacks."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings = {name: value for name, value in settings.items() if name not in ("backend", "is_local")}
    extra = settings.pop("extra_special_tokens", None)
    if extra is not None:
        settings["additional_special_tokens" if isinstance(extra, list) else "extra_special_tokens"] = extra
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


# --- telling ----------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str], day: str) -> str:
    """Return docs/compatibility.md."""
    full = [result for result in results if set(result["cells"]) & set(FULL)]
    old = [result for result in results if not set(result["cells"]) & set(FULL)]
    notes: list[str] = []
    torch = next((r["versions"]["torch"] for r in results if r["versions"]), "?")
    parts = [
        "# Compatibility\n",
        "Written by `make matrix`, which anyone can run. Each row is an environment of its own in which the "
        "commands run on tiny random models, of LLaVA and Qwen2.5-VL, and the greedy answers of folders made "
        "elsewhere are compared token for token. A compressed checkpoint needs transformers alone; a routed one too.\n",
        f"Run on {day} with Python {sys.version.split()[0]} and torch {torch} on the CPU, the same in every row.\n",
        table(full, [name for name in FULL if any(name in r["cells"] for r in full)], titles, notes),
    ]
    if old:
        parts += [
            "## transformers 4\n",
            "lvlm-exporter itself needs transformers 5. What it writes is loaded with transformers alone:\n",
            table(old, list(OLD), titles, notes),
        ]
    if notes:
        parts += ["## Notes\n", "".join(f"{number}. {note}\n" for number, note in enumerate(notes, 1))]
    parts += ["## Releases\n", releases(results)]
    warned = {text for result in results if "newest" in result["row"] for text in result["warnings"]}
    if warned:
        parts += ["## Deprecations that were announced meanwhile\n", "".join(f"- {text}\n" for text in sorted(warned))]
    return "\n".join(parts)


def table(
    results: Sequence[Mapping[str, Any]], columns: Sequence[str], titles: Mapping[str, str], notes: list[str]
) -> str:
    """Return a Markdown table; what a cell has to say goes to `notes`, by number."""
    lines = [
        "| | transformers | " + " | ".join(titles[name] for name in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for result in results:
        cells = [shown(result["cells"].get(name), notes) for name in columns]
        release = result["versions"].get("transformers", "?")
        lines.append(f"| {result['title']} | {release} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(cell: Mapping[str, Any] | None, notes: list[str]) -> str:
    if cell is None:
        return "–"
    detail = cell["detail"].strip()
    if not detail:
        return MARKS[cell["status"]]
    if detail not in notes:
        notes.append(detail)
    return f"{MARKS[cell['status']]} ({notes.index(detail) + 1})"


def releases(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["versions"]))
    lines = ["| | " + " | ".join(result["title"] for result in results) + " |", "|---|" + "---|" * len(results)]
    lines += [
        f"| {name} | " + " | ".join(result["versions"].get(name, "–") for result in results) + " |" for name in names
    ]
    return "\n".join(lines) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work: Path = options.work.resolve()
    required, pip = requirements(), options.pip.split()
    wanted = select(rows(required, pins(), newest(required, pip)), options.rows)
    make_sources(work)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    results = run_rows(wanted, options.jobs, lambda row: run_row(row, work, pip, threads))
    sys.path.insert(0, str(TESTS))
    from matrix_cells import CELLS

    text = markdown(results, {name: title for name, (title, _) in CELLS.items()}, date.today().isoformat())
    print("\n" + text)
    data = {"date": date.today().isoformat(), "holds": holds(results), "rows": results}
    (options.json or work / "matrix.json").write_text(json.dumps(data, indent=1) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0 if holds(results) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the compatibility matrix.")
    parser.add_argument(
        "--rows", help="only these, by comma: pinned, floor, between, newest, all-floors, all-newest, older"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table there")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="(WORK/matrix.json)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "matrix", help="environments and folders go there"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="rows that run at a time, after the first (2)")
    parser.add_argument("--pip", default=f"{sys.executable} -m pip", help="the pip that installs")
    return parser.parse_args(arguments)


def select(all_rows: Sequence[Row], names: str | None) -> list[Row]:
    """Return the rows that are named; `pinned` always, as the others load what it makes."""
    if names is None:
        return list(all_rows)
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in {row.name for row in all_rows}]:
        raise SystemExit(f"--rows {unknown[0]}: rows are {', '.join(row.name for row in all_rows)}.")
    return [row for row in all_rows if row.name in chosen or row.name == "pinned"]


if __name__ == "__main__":
    sys.exit(main())
