"""Show that lm-eval measures what `evaluate` measures, to the last question, in an environment of its own.

    python examples/lm_eval/ask_lm_eval.py            (or: make lm-eval-test)

It makes a virtual environment in build/lm-eval/venv, on top of the one that it is run in, and installs lm-eval and this
package there without touching that one; compresses the reference model, trains a router for it, asks both by
`lm-eval --model hf-multimodal`, which is lm-eval's own, and by `lvlm-exporter evaluate`, and compares every answer.
Exit code 1: they differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import Answers, call, compare_with, written_results

HERE = Path(__file__).resolve().parent


def by_lm_eval(python: Path, folder: Path, budget: str, out: Path) -> Answers:
    """Return accuracy and answers, in the order of the questions."""
    routed = ",trust_remote_code=True" if budget else ""
    asked = ("--gen_kwargs", budget) if budget else ()
    call(
        python, "-m", "lm_eval", "--model", "hf-multimodal", "--model_args", f"pretrained={folder}{routed}",
        "--tasks", "exporter_digits", "--include_path", HERE, "--apply_chat_template", "--batch_size", "16",
        "--device", "cpu", "--log_samples", "--output_path", out, *asked,
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    return written_results(out, "results_*.json", "samples_*.jsonl")


if __name__ == "__main__":
    sys.exit(compare_with("lm-eval", HERE, by_lm_eval, (__doc__ or "").partition("\n")[0]))
