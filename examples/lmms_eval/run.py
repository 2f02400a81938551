"""Show that lmms-eval measures what `evaluate` measures, to the last question, in an environment of its own.

    python examples/lmms_eval/run.py            (or: make lmms-eval-test)

It makes a virtual environment in build/lmms-eval/venv, on top of the one that it is run in, and installs lmms-eval
and this package there without touching that one; compresses the reference model, trains a router for it, asks both by
`lmms-eval --model lvlm_exporter` and by `lvlm-exporter evaluate`, and compares every answer. Exit code 1: they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE, BUILD = ROOT / "examples" / "lmms_eval", ROOT / "build" / "lmms-eval"
DIGITS = ROOT / "examples" / "digits"
BUDGETS = {"plain": [""], "routed": ["preset=fast", "keep_visual_tokens=0.5,keep_layers=5"]}


def call(*command: str | Path, **environment: str) -> None:
    print("$", *(str(part) for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=os.environ | environment)


def make_environment() -> Path:
    """Return the Python of an environment that has lmms-eval, and everything else from the one that runs this."""
    venv = BUILD / "venv"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        call(sys.executable, "-m", "venv", "--clear", venv)
        site = next(venv.glob("lib/python*/site-packages"))
        parents = dict.fromkeys(
            [sysconfig.get_path("purelib"), *(path for path in sys.path if "site-packages" in path)]
        )
        (site / "parent.pth").write_text("\n".join(parents) + "\n")
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        call(*install, "-r", HERE / "requirements.txt")
        call(*install, "-e", ROOT)
        (venv / "ready").touch()
    return python


def make_checkpoints(python: Path) -> dict[str, Path]:
    """Return a plain and a routed compressed checkpoint of the reference model."""
    plain, routed = BUILD / "plain", BUILD / "routed"
    questions = ("--calibration", DIGITS / "data" / "calibration.jsonl", "--quiet")
    cli = (python, "-m", "exporter")
    if not plain.exists():
        small = ("--drop-layers", "2", "--samples", "64", "--localizer", "block_influence", "--fold", "scp")
        call(*cli, "compress", DIGITS / "model", "--out", plain, *small, *questions)
    if not routed.exists():
        call(*cli, "route", plain, "--out", routed, "--samples", "128", "--steps", "40", *questions)
    return {"plain": plain, "routed": routed}


def make_questions(number: int) -> Path:
    """Write the first questions of the test task, with whole paths of images."""
    file = BUILD / "questions.jsonl"
    lines = [json.loads(line) for line in (DIGITS / "data" / "test.jsonl").read_text().splitlines()[:number]]
    kept = [{key: line[key] for key in ("question", "answer", "type")} for line in lines]
    for line, full in zip(kept, lines, strict=True):
        line["image"] = str(DIGITS / "data" / full["image"])
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return file


def by_lmms_eval(python: Path, folder: Path, budget: str, name: str) -> tuple[float, list[str]]:
    """Return accuracy and answers, in the order of the questions."""
    out = BUILD / "results" / name
    arguments = ",".join(filter(None, [f"pretrained={folder}", budget, "device=cpu"]))
    call(
        python, "-m", "lmms_eval", "--model", "lvlm_exporter", "--model_args", arguments, "--tasks", "exporter_digits",
        "--include_path", HERE, "--batch_size", "16", "--log_samples", "--output_path", out, "--verbosity", "WARNING",
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    results = json.loads(max(out.rglob("*_results.json")).read_text())
    samples = [json.loads(line) for line in max(out.rglob("*_samples_*.jsonl")).read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    said = [_text(sample["filtered_resps"]) for sample in samples]
    return results["results"]["exporter_digits"]["exact_match,none"], said


def _text(response: Any) -> str:
    while isinstance(response, list):
        response = response[0]
    return str(response).strip()


def by_evaluate(python: Path, folder: Path, budget: str, questions: Path, name: str) -> tuple[float, list[str]]:
    """Return the same by `lvlm-exporter evaluate`."""
    out = BUILD / "results" / f"{name}.json"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", type=int, default=400, metavar="N", help="of the test task (400)")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    python = make_environment()
    folders, questions = make_checkpoints(python), make_questions(options.questions)
    rows, agree = [], True
    for kind, budgets in BUDGETS.items():
        for budget in budgets:
            name = f"{kind}-{budget or 'all'}".replace("=", "-").replace(",", "-")
            theirs = by_lmms_eval(python, folders[kind], budget, name)
            ours = by_evaluate(python, folders[kind], budget, questions, name)
            same = sum(a == b for a, b in zip(theirs[1], ours[1], strict=True))
            agree &= same == len(ours[1]) and abs(theirs[0] - ours[0]) < 1e-9
            rows.append(f"{kind:7} {budget or 'all of it':36} lmms-eval {100 * theirs[0]:.2f} %  evaluate "
                        f"{100 * ours[0]:.2f} %  same answers {same} of {len(ours[1])}")  # fmt: skip
    print("\n".join(rows))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
