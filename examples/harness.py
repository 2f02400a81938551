"""What the scripts of examples/lmms_eval and examples/lm_eval share: an environment, checkpoints, questions."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits"
BUDGETS = {"plain": [""], "routed": ["preset=fast", "keep_visual_tokens=0.5,keep_layers=5"]}
Answers = tuple[float, list[str]]  # accuracy, and the answers in the order of the questions


def compare_with(harness: str, here: Path, ask: Callable[[Path, Path, str, Path], Answers], purpose: str) -> int:
    """Ask every checkpoint under every budget by a harness and by `evaluate`; print a line of each.

    Args:
        harness: its name, and that of its folder in build/.
        here: the folder of its requirements.
        ask: (Python of its environment, checkpoint, budget, folder for what it writes) -> what the harness says.
    Returns: the exit code, 1 where an answer differs.
    """
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--questions", type=int, default=400, metavar="N", help="of the test task (400)")
    options = parser.parse_args()
    build = ROOT / "build" / harness
    python = make_environment(build, here / "requirements.txt")
    folders, questions = make_checkpoints(python, build), make_questions(build, options.questions)
    rows = []
    for kind, budgets in BUDGETS.items():
        for budget in budgets:
            name = f"{kind}-{budget or 'all'}".replace("=", "-").replace(",", "-")
            theirs = ask(python, folders[kind], budget, build / "results" / name)
            ours = by_evaluate(python, folders[kind], budget, questions=questions, name=name)
            rows.append(compared(harness, kind, budget, theirs=theirs, ours=ours))
    print("\n".join(line for line, _ in rows))
    return 0 if all(same for _, same in rows) else 1


def call(*command: str | Path, **environment: str) -> None:
    print("$", *(str(part) for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=os.environ | environment)


def make_environment(build: Path, requirements: Path) -> Path:
    """Return the Python of an environment that has a harness, and everything else from the one that runs this."""
    venv = build / "venv"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        build.mkdir(parents=True, exist_ok=True)
        call(sys.executable, "-m", "venv", "--clear", venv)
        site = next(venv.glob("lib/python*/site-packages"))
        parents = dict.fromkeys(
            [sysconfig.get_path("purelib"), *(path for path in sys.path if "site-packages" in path)]
        )
        (site / "parent.pth").write_text("\n".join(parents) + "\n")
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        call(*install, "-r", requirements)
        call(*install, "-e", ROOT)
        (venv / "ready").touch()
    return python


def make_checkpoints(python: Path, build: Path) -> dict[str, Path]:
    """Return a plain and a routed compressed checkpoint of the reference model."""
    plain, routed = build / "plain", build / "routed"
    questions = ("--calibration", DIGITS / "data" / "calibration.jsonl", "--quiet")
    cli = (python, "-m", "exporter")
    if not plain.exists():
        small = ("--drop-layers", "2", "--samples", "64", "--localizer", "block_influence", "--fold", "scp")
        call(*cli, "compress", DIGITS / "model", "--out", plain, *small, *questions)
    if not routed.exists():
        call(*cli, "route", plain, "--out", routed, "--samples", "128", "--steps", "40", *questions)
    return {"plain": plain, "routed": routed}


def make_questions(build: Path, number: int) -> Path:
    """Write the first questions of the test task, with whole paths of images."""
    file = build / "questions.jsonl"
    lines = [json.loads(line) for line in (DIGITS / "data" / "test.jsonl").read_text().splitlines()[:number]]
    kept = [{key: line[key] for key in ("question", "answer", "type")} for line in lines]
    for line, full in zip(kept, lines, strict=True):
        line["image"] = str(DIGITS / "data" / full["image"])
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return file


def written_results(out: Path, results: str, samples: str) -> Answers:
    """Read the accuracy and the answers, in the order of the questions, that a harness has written.

    Args:
        results, samples: patterns of the names of its files.
    """
    found = json.loads(max(out.rglob(results)).read_text())
    answers = [json.loads(line) for line in max(out.rglob(samples)).read_text().splitlines()]
    answers.sort(key=lambda sample: sample["doc_id"])
    said = [_text(sample["filtered_resps"]) for sample in answers]
    return found["results"]["exporter_digits"]["exact_match,none"], said


def _text(response: Any) -> str:
    while isinstance(response, list):
        response = response[0]
    return str(response).strip()


def by_evaluate(python: Path, folder: Path, budget: str, questions: Path, name: str) -> Answers:
    """Return the same by `lvlm-exporter evaluate`."""
    out = questions.parent / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = [part for pair in filter(None, budget.split(",")) for part in _flag(*pair.split("="))]
    call(
        python, "-m", "exporter", "evaluate", folder, "--task", questions, "--metric", "exact",
        "--max-new-tokens", "16",
        "--device", "cpu", "--batch-size", "16", "--no-card", "--quiet", "--json", out, *flags,
    )  # fmt: skip
    (model,) = json.loads(out.read_text())["models"]
    return model["accuracy"], [answer.strip() for answer in model["answers"]]


def _flag(name: str, value: str) -> tuple[str, str]:
    return f"--{name.replace('_', '-')}", value


def compared(harness: str, kind: str, budget: str, theirs: Answers, ours: Answers) -> tuple[str, bool]:
    """Return a line of both accuracies and of the answers that are alike, and whether all are."""
    same = sum(a == b for a, b in zip(theirs[1], ours[1], strict=True))
    line = (
        f"{kind:7} {budget or 'all of it':36} {harness} {100 * theirs[0]:.2f} %  evaluate {100 * ours[0]:.2f} %  "
        f"same answers {same} of {len(ours[1])}"
    )
    return line, same == len(ours[1]) and abs(theirs[0] - ours[0]) < 1e-9
