"""Show that lm-eval measures what `evaluate` measures, to the last question, in an environment of its own.

    python examples/lm_eval/ask_lm_eval.py            (or: make lm-eval-test)

It makes a virtual environment in build/lm-eval/venv, on top of the one that it is run in, and installs lm-eval and this
package there without touching that one; compresses the reference model, trains a router for it, asks both by
`lm-eval --model hf-multimodal`, which is lm-eval's own, and by `lvlm-exporter evaluate`, and compares every answer.
Exit code 1: they differ.
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

HERE, BUILD = ROOT / "examples" / "lm_eval", ROOT / "build" / "lm-eval"


def by_lm_eval(python: Path, folder: Path, budget: str, name: str) -> tuple[float, list[str]]:
    """Return accuracy and answers, in the order of the questions."""
    out = BUILD / "results" / name
    routed = ",trust_remote_code=True" if budget else ""
    asked = ("--gen_kwargs", budget) if budget else ()
    call(
        python, "-m", "lm_eval", "--model", "hf-multimodal", "--model_args", f"pretrained={folder}{routed}",
        "--tasks", "exporter_digits", "--include_path", HERE, "--apply_chat_template", "--batch_size", "16",
        "--device", "cpu", "--log_samples", "--output_path", out, *asked,
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    return written_results(out, "results_*.json", "samples_*.jsonl")


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
            theirs = by_lm_eval(python, folders[kind], budget, name)
            ours = by_evaluate(python, folders[kind], budget, questions, name)
            rows.append(compared("lm-eval", kind, budget, theirs, ours))
    print("\n".join(line for line, _ in rows))
    return 0 if all(same for _, same in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
