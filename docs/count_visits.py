"""Count the files of the package that a calibration batch and a question visit: python docs/count_visits.py [CHECKOUT].

A file is visited where one of its functions runs; what runs because a module is imported does not count. Two walks are
counted on a tiny model: one question through `compress`, which is a calibration batch, and one question through
`generate` on a routed checkpoint, in the files that lie beside its weights. CHECKOUT is another commit's (`git worktree
add`), so that both can be compared; default: this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent.parent
OPTIMIZED = 0x1  # a flag of functions; bodies of modules and classes lack it


def visited(package: Path, work: Callable[[], Any]) -> list[Path]:
    """Run `work` and return the files of the package whose functions ran, in order of their first visit.

    The files of a routed checkpoint are copies of those in `modeling/`, and count as these.
    """
    shipped = {path.name: path for path in (package / "modeling").glob("*.py")}
    files: dict[Path, None] = {}
    known: dict[str, Path | None] = {}

    def path_of(name: str) -> Path | None:
        path = Path(name)
        if package in path.parents:
            return path
        return shipped.get(path.name) if "transformers_modules" in path.parts else None

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_flags & OPTIMIZED:
            return
        name = frame.f_code.co_filename
        if name not in known:
            known[name] = path_of(name)
        path = known[name]
        if path is None or path in files:
            return
        caller = frame.f_back
        while caller is not None:  # an import runs it
            if caller.f_code.co_name == "<module>" and path_of(caller.f_code.co_filename):
                return
            caller = caller.f_back
        files[path] = None

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return list(files)


def walks(checkout: Path, work: Path) -> dict[str, list[Path]]:
    """Take both walks with one checkout's code."""
    import numpy as np
    import torch
    from tiny_models import SIZES, build, inputs, random_image
    from transformers import AutoModelForImageTextToText

    import exporter.cli
    from exporter.clean_room import load_processor

    model = build("llava", work / "model")
    random = np.random.default_rng(0)
    lines = []
    for index in range(8):
        random_image(random, SIZES[index % len(SIZES)]).save(work / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": "what is this?"}) + "\n")
    (work / "one.jsonl").write_text(lines[0])
    (work / "questions.jsonl").write_text("".join(lines))
    plain = ["compress", str(model), "--drop-layers", "1", "--localizer", "tis", "--fold", "scp", "--quiet"]
    plain += ["--calibration", str(work / "one.jsonl"), "--out", str(work / "small")]
    batch = visited(checkout / "exporter", lambda: exporter.cli.main(plain))
    routed = ["route", str(work / "small"), "--steps", "1", "--batch-size", "1", "--quiet"]
    routed += ["--calibration", str(work / "questions.jsonl"), "--out", str(work / "routed")]
    assert exporter.cli.main(routed) == 0
    loaded = AutoModelForImageTextToText.from_pretrained(work / "routed", trust_remote_code=True).eval()
    given = inputs(load_processor(work / "routed"), batch=1)
    with torch.inference_mode():
        question = visited(checkout / "exporter", lambda: loaded.generate(**given, preset="fast", max_new_tokens=3))
    return {"a calibration batch (compress)": batch, "a question (generate, routed)": question}


def main() -> None:
    checkout = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE
    if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(checkout):
        path = os.pathsep.join([str(checkout), str(HERE / "tests")])
        with tempfile.TemporaryDirectory() as modules:
            environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
            raise SystemExit(subprocess.run([sys.executable, __file__, str(checkout)], env=environment).returncode)
    with tempfile.TemporaryDirectory() as work:
        for walk, files in walks(checkout, Path(work)).items():
            sizes = [len(path.read_text().splitlines()) for path in files]
            print(f"{walk}: {len(files)} files, {sum(sizes):,} lines, the largest {max(sizes):,}")
            print("  " + ", ".join(str(path.relative_to(checkout / "exporter")) for path in files))


if __name__ == "__main__":
    main()
