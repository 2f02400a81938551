"""Show that lmms-eval measures what `evaluate` measures, to the last question, in an environment of its own.

    python examples/lmms_eval/run.py            (or: make lmms-eval-test)

It makes a virtual environment in build/lmms-eval/venv, on top of the one that it is run in, and installs lmms-eval
and this package there without touching that one; compresses the reference model, trains a router for it, asks both by
`lmms-eval --model lvlm_exporter` and by `lvlm-exporter evaluate`, and compares every answer. Exit code 1: they differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import (
    BUDGETS,
    ROOT,
    by_evaluate,
    call,
    compared,
    make_checkpoints,
    make_environment,
    make_questions,
    written_results,
)

HERE, BUILD = ROOT / "examples" / "lmms_eval", ROOT / "build" / "lmms-eval"


def by_lmms_eval(python: Path, folder: Path, budget: str, name: str) -> tuple[float, list[str]]:
    """Return accuracy and answers, in the order of the questions."""
    out = BUILD / "results" / name
    arguments = ",".join(filter(None, [f"pretrained={folder}", budget, "device=cpu"]))
    call(
        python, "-m", "lmms_eval", "--model", "lvlm_exporter", "--model_args", arguments, "--tasks", "exporter_digits",
        "--include_path", HERE, "--batch_size", "16", "--log_samples", "--output_path", out, "--verbosity", "WARNING",
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    return written_results(out, "*_results.json", "*_samples_*.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", type=int, default=400, metavar="N", help="of the test task (400)")
    options = parser.parse_args()
    python = make_environment(BUILD, HERE / "requirements.txt")
    folders, questions = make_checkpoints(python, BUILD), make_questions(BUILD, options.questions)
    rows = []
    for kind, budgets in BUDGETS.items():
        for budget in budgets:
            name = f"{kind}-{budget or 'all'}".replace("=", "-").replace(",", "-")
            theirs = by_lmms_eval(python, folders[kind], budget, name)
            ours = by_evaluate(python, folders[kind], budget, questions, name)
            rows.append(compared("lmms-eval", kind, budget, theirs, ours))
    print("\n".join(line for line, _ in rows))
    return 0 if all(same for _, same in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
