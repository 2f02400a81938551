"""Show that lmms-eval measures what `evaluate` measures, to the last question, in an environment of its own.

    python examples/lmms_eval/run.py            (or: make lmms-eval-test)

It makes a virtual environment in build/lmms-eval/venv, on top of the one that it is run in, and installs lmms-eval
and this package there without touching that one; compresses the reference model, trains a router for it, asks both by
`lmms-eval --model lvlm_exporter` and by `lvlm-exporter evaluate`, and compares every answer. Exit code 1: they differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import Answers, call, compare_with, written_results

HERE = Path(__file__).resolve().parent


def by_lmms_eval(python: Path, folder: Path, budget: str, out: Path) -> Answers:
    """Return accuracy and answers, in the order of the questions."""
    arguments = ",".join(filter(None, [f"pretrained={folder}", budget, "device=cpu"]))
    call(
        python, "-m", "lmms_eval", "--model", "lvlm_exporter", "--model_args", arguments, "--tasks", "exporter_digits",
        "--include_path", HERE, "--batch_size", "16", "--log_samples", "--output_path", out, "--verbosity", "WARNING",
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    return written_results(out, "*_results.json", "*_samples_*.jsonl")


if __name__ == "__main__":
    sys.exit(compare_with("lmms-eval", HERE, by_lmms_eval, (__doc__ or "").partition("\n")[0]))
