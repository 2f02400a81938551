"""An environment with real vLLM for the CPU, this package's plug-in in it, and jobs that are run there.

    python examples/serving/environment.py [VENV]      make it (build/serving/venv) and say which versions it has

It stands alone: vLLM takes an older transformers than this package runs with, so that the plug-in is installed without
its dependencies. The rest of requirements.txt is what vLLM runs with. torchaudio and torchcodec, which vLLM for the CPU
names and pictures need not, are taken out; and where torchvision's build is for another torch than the one installed,
the two operators that it then lacks are no longer described, which its import stumbles over and no picture needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "serving"
ENGINE = {  # vLLM in one process, on the threads that it is given, with 1 GB for keys and values
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
UNDESCRIBED = ('@torch.library.register_fake("torchvision::nms")', '@torch.library.register_fake("torchvision::qnms")')


def call(*command: str | Path, **environment: str) -> None:
    print("$", *(str(part) for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=os.environ | environment)


def make_environment(venv: Path = BUILD / "venv") -> Path:
    """Return the Python of an environment with vLLM and this package's plug-in; made the first time."""
    python = venv / "bin" / "python"
    requirements = (HERE / "requirements.txt").read_text()
    ready = venv / "ready"
    if ready.is_file() and ready.read_text() == requirements:
        return python
    venv.parent.mkdir(parents=True, exist_ok=True)
    call(sys.executable, "-m", "venv", "--clear", venv)
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    torch = next(line for line in requirements.splitlines() if line.startswith("torch=="))
    call(*pip, "install", torch)
    call(*pip, "install", "-r", HERE / "requirements.txt")
    call(*pip, "uninstall", "--yes", "torchaudio", "torchcodec")
    mend_torchvision(python)
    call(*pip, "install", "--no-deps", "-e", ROOT)
    ready.write_text(requirements)
    return python


def mend_torchvision(python: Path) -> None:
    """Have torchvision import where its compiled operators are for another build of torch."""
    if subprocess.run([str(python), "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    (file,) = python.parents[1].glob("lib/python*/site-packages/torchvision/_meta_registrations.py")
    text = file.read_text()
    for line in UNDESCRIBED:
        text = text.replace(f"\n{line}", f"\n# {line}")
    file.write_text(text)
    call(python, "-c", "import torchvision")


def run_in(python: Path, script: str, job: Any, folder: Path, **environment: str) -> Any:
    """Run a script of this folder in the environment on a job, through files, and return what it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / "job.json", folder / "answers.json"
    asked.write_text(json.dumps(job))
    answered.unlink(missing_ok=True)
    call(python, HERE / script, asked, answered, **(ENGINE | {"VLLM_CACHE_ROOT": str(BUILD / "cache")} | environment))
    return json.loads(answered.read_text())


if __name__ == "__main__":
    made = make_environment(*(Path(argument).resolve() for argument in sys.argv[1:2]))
    call(
        made,
        "-c",
        "import torch, transformers, vllm; print(torch.__version__, transformers.__version__, vllm.__version__)",
    )
