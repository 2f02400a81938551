"""Compare what two checkouts make of the same tiny model: python docs/compare_outputs.py OTHER [--work DIR].

Each checkout compresses the model (by its defaults, and by a named localizer and fold), trains a router for the result,
and exports both as ONNX graphs. Every file of these folders is then compared byte for byte; JSON is compared value by
value, and what says when and by which version a folder was made is left out. OTHER is a checkout of another commit, as
`git worktree add OTHER COMMIT` makes one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PASSING = ("seconds", "date", "versions")  # of a record: what differs from run to run
COMPRESS = ["compress", "{model}", "--drop-layers", "2", "--calibration", "{questions}", "--samples", "10"]
STEPS = (
    ("default", COMPRESS),
    ("named", [*COMPRESS, "--localizer", "tis", "--fold", "scp"]),
    ("routed", ["route", "{out}/named", "--calibration", "{questions}", "--steps", "3", "--batch-size", "4"]),
    ("onnx", ["onnx", "{out}/named"]),
    ("onnx-routed", ["onnx", "{out}/routed"]),
)


def make_inputs(work: Path) -> None:
    """Make the tiny model and the questions that both checkouts read."""
    sys.path.insert(0, str(HERE / "tests"))
    import numpy as np
    from tiny_models import SIZES, build, random_image

    build("llava", work / "model")
    random = np.random.default_rng(0)
    (work / "data").mkdir()
    lines = []
    for index in range(12):
        random_image(random, SIZES[index % len(SIZES)]).save(work / "data" / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": ("what is this?", "where is it?")[index % 2]})
    (work / "data" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_steps(checkout: Path, work: Path) -> None:
    """Run every step with one checkout's code; the folders lie in `work`/out, so that records name equal paths."""
    out = work / "out"
    names = {"model": work / "model", "questions": work / "data" / "questions.jsonl", "out": out}
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out.mkdir()
    for name, arguments in STEPS:
        command = [argument.format(**names) for argument in arguments]
        command = [sys.executable, "-m", "exporter", *command, "--out", str(out / name), "--quiet"]
        subprocess.run(command, check=True, cwd=work, env=environment, stdout=subprocess.DEVNULL)


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of JSON data with its path; what differs from run to run is left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield where, value
        return
    for key, inner in items:
        if key not in PASSING:
            yield from leaves(inner, f"{where}.{key}" if where else str(key))


def differences(before: Path, after: Path) -> list[str]:
    """Return how the files of two folders differ, a line each."""
    names = sorted(
        {str(path.relative_to(folder)) for folder in (before, after) for path in folder.rglob("*") if path.is_file()}
    )
    found = []
    for name in names:
        old, new = before / name, after / name
        if not (old.exists() and new.exists()):
            found.append(f"{name}: only {'before' if old.exists() else 'now'}")
        elif old.read_bytes() != new.read_bytes():
            if name.endswith(".json"):
                a, b = (dict(leaves(json.loads(path.read_text()))) for path in (old, new))
                found += [
                    f"{name}: {key}: {str(a.get(key, '(none)'))[:60]} -> {str(b.get(key, '(none)'))[:60]}"
                    for key in a.keys() | b.keys()
                    if a.get(key, "(none)") != b.get(key, "(none)")
                ]
            else:
                found.append(f"{name}: {old.stat().st_size} bytes -> {new.stat().st_size} bytes, other contents")
    print(f"{len(names)} files compared")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--work", type=Path, help="an empty folder, which is kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(exist_ok=True, parents=True)
        make_inputs(work)
        for checkout, name in ((options.other.resolve(), "before"), (HERE, "now")):
            run_steps(checkout, work)
            (work / "out").rename(work / name)
        found = differences(work / "before", work / "now")
    print("\n".join(found) if found else "no file differs")


if __name__ == "__main__":
    main()
