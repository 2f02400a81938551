"""Rehearse what a checkpoint too large for this machine takes, on one of its shape that is made here.

    python examples/benchmarks/rehearsal.py [--model llava-1.5-7b] [--layers 4] [--questions 8] [--memory 5GB]
    python examples/benchmarks/rehearsal.py --model-free [--model qwen3-vl-235b-a22b] [--drop-layers 23]

The first makes a checkpoint with random weights, in bfloat16, tensor by tensor; compresses it with `--memory`, with
fold, verification and card, in a process of its own; and tells for each stage the time, the processor time, the weights
that were read and the peak memory, beside what `--dry-run` says with the rates that this machine has at that moment.
What is random knows no answer: answers are cut off behind a few tokens. `--checkpoint DIR` keeps the checkpoint for the
next run.

`--model-free` drops layers by stored scores without a fold, as a second budget does: no model is loaded. The checkpoint
has the real headers (`examples/recipes/hollow.py`) and lies as in the hub's cache, where a file is named after its
SHA-256; the names are made up here. The scores are made up too. The result is as hollow as the source, since holes are
copied as holes: so it needs no disk, and the check for free space is left out. So is the SHA-256 of shards that are
holes, for which each byte would be read once more; how many that are is told.

Told are the time, the peak memory of the process and of the one that verifies, what was copied, and the bytes that
were read by system calls. Time is that of holes, and no disk's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import exporter
from exporter.checkpoints import files, safetensors_ranges
from exporter.checkpoints.record_types import CalibrationPart, ScoresPart
from exporter.checkpoints.source import file_hashes, open_source
from exporter.localize.stored import FORMAT, ScoredSource, StoredScores
from exporter.plan import LayerBudget
from exporter.recipe import NO_QUESTIONS, Method, Recipe, RunOptions

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))
from hollow import published, write_hollow
from rehearsal_weights import with_weights

LEAST = "2GB"  # less than any of these takes, so that what is verified is laid out and not loaded
Told = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-free", action="store_true", help="drop layers by scores, with holes as weights")
    parser.add_argument("--model", metavar="NAME", help="of examples/recipes/models (llava-1.5-7b; qwen3-vl-235b-a22b)")
    parser.add_argument("--drop-layers", type=int, metavar="N", help="how many layers go (8; 23)")
    with_weights_only = parser.add_argument_group("with weights")
    with_weights_only.add_argument("--layers", type=int, metavar="N", help="decoder layers (as many as the model has)")
    with_weights_only.add_argument("--questions", type=int, default=8, metavar="N", help="calibration questions (8)")
    with_weights_only.add_argument("--answer-tokens", type=int, default=4, metavar="N", help="of each answer (4)")
    with_weights_only.add_argument("--memory", default="5GB", metavar="SIZE", help="that --memory allows (5GB)")
    with_weights_only.add_argument("--dtype", default="bfloat16", help="of the weights and of computing (bfloat16)")
    with_weights_only.add_argument("--batch-size", type=int, default=4, metavar="N", help="questions at a time (4)")
    with_weights_only.add_argument("--localizer", default="best_of", metavar="NAME", help="(best_of)")
    with_weights_only.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="take it from there, or keep it there"
    )
    with_weights_only.add_argument("--json", type=Path, metavar="FILE", help="keep there all that was measured")
    parser.add_argument("--in-this-process", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process is not None:
        print(json.dumps(model_free(options.in_this_process, options.drop_layers)))
        return
    options.model = options.model or ("qwen3-vl-235b-a22b" if options.model_free else "llava-1.5-7b")
    options.drop_layers = options.drop_layers or (23 if options.model_free else 8)
    with tempfile.TemporaryDirectory() as work:
        if not options.model_free:
            print(with_weights(options, Path(work)))
            return
        folder = as_in_the_cache(write_hollow(published(options.model), Path(work) / "plain"), Path(work) / "hub")
        command = [sys.executable, __file__, *sys.argv[1:], "--in-this-process", str(folder)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(row(options.model, json.loads(said.splitlines()[-1])))


def as_in_the_cache(plain: Path, hub: Path) -> Path:
    """Lay a folder out as the hub's cache has it: shards are links to files that are named after their SHA-256."""
    repository = hub / "models--rehearsal--model"
    snapshot, blobs = repository / "snapshots" / f"{1:040x}", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        if path.suffix != ".safetensors":
            path.rename(snapshot / path.name)
            continue
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def model_free(folder: Path, drop_layers: int) -> Told:
    """Drop layers by made-up scores; return what that took. The result is removed."""
    source = open_source(str(folder))
    hashed: list[int] = []
    copied: list[int] = []
    sha256, copy_range = files.sha256, safetensors_ranges.copy_range

    def counting_sha256(path: Path) -> str:
        state = path.stat()
        if 512 * state.st_blocks >= state.st_size // 2:
            return sha256(path)
        hashed.append(state.st_size)
        return hashlib.sha256(f"{path.name} {state.st_size}".encode()).hexdigest()

    def counting_copy(source: int, target: int, begin: int, count: int, advance: Any) -> None:
        copied.append(count)
        copy_range(source, target, begin, count, advance)

    with tempfile.TemporaryDirectory() as work:
        scores = Path(work) / "scores.json"
        made_up(source).save(scores)
        recipe = Recipe(str(folder), NO_QUESTIONS, LayerBudget(drop_layers=drop_layers), fold=Method("none"))
        before, begin = read_so_far(), time.perf_counter()
        with (
            mock.patch.object(files, "sha256", counting_sha256),
            mock.patch.object(safetensors_ranges, "copy_range", counting_copy),
            mock.patch("exporter.pipeline.check_space"),
        ):
            small = exporter.compress(recipe, Path(work) / "small", RunOptions(memory=LEAST), scores=scores)
        seconds, read = time.perf_counter() - begin, read_so_far() - before
        on_disk = sum(512 * path.stat().st_blocks for path in small.rglob("*"))
        record = json.loads((small / "compression.json").read_text())
    peaks = (resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "weights": source.weights.num_bytes,
        "kept": record["measured"]["bytes"],
        "drop": record["plan"]["drop"],
        "seconds": seconds,
        "peaks": list(peaks),
        "read": read,
        "hashed": sum(hashed),
        "copied": sum(copied),
        "ranges": len(copied),
        "on_disk": on_disk,
    }


def made_up(source: Any) -> StoredScores:
    """Return scores of a checkpoint's layers as `score --save` keeps them, the last layers but one the least needed."""
    layers = source.num_layers
    values = tuple(float(abs(layers - 2 - layer)) for layer in range(layers))
    return StoredScores(
        format=FORMAT,
        source=ScoredSource(source.name, source.revision, file_hashes(source)),
        calibration=CalibrationPart(data="made up", samples=1, fingerprint="0" * 64, tokens={"visual": 1, "text": 1}),
        localizer="tis",
        protect=(),
        seed=0,
        dtype="float32",
        scores=ScoresPart("tis", values, (layers - 2,), {}),
    )


def read_so_far() -> int:
    """Return the bytes that this process has read by system calls; what a hole stands for is not among them."""
    line = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    return int(line[1]) if line else 0


def row(name: str, told: Told) -> str:
    own, verifying = told["peaks"]
    return "\n".join(
        (
            f"{name}: {told['weights'] / 1e9:,.1f} GB of weights, {told['kept'] / 1e9:,.1f} GB without "
            f"{len(told['drop'])} layers",
            f"time {told['seconds']:,.0f} s; peak memory {own / 1e9:.2f} GB, of the process that verifies "
            f"{verifying / 1e9:.2f} GB",
            f"copied {told['copied'] / 1e9:,.1f} GB in {told['ranges']} ranges; the result takes "
            f"{told['on_disk'] / 1e6:,.1f} MB of disk",
            f"read {told['read'] / 1e6:,.1f} MB: headers, small files, libraries; left out: "
            f"{told['hashed'] / 1e9:,.1f} GB for SHA-256 of what was made",
        )
    )


if __name__ == "__main__":
    main()
