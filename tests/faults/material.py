"""The undamaged files that the fuzzer damages copies of: tiny checkpoints, what is made of them, and questions."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUESTIONS = ("what color is the circle?", "how many dots are there?", "is there a red square?", "what is the number?")
ANSWERS = ("red", "three", "no", "seven")
SOURCE_CARD = "---\nlicense: mit\nlanguage:\n- en\nbase_model: user/base\ntags: [vision]\n---\n# A model\n\nBy hand.\n"


def prepare(offline: bool = True) -> None:
    """Set this process up: one thread, quiet."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.pop("HF_TOKEN", None)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def verify_here() -> None:
    """Have the clean process's work done in this process, without the seconds that its start takes."""
    from exporter.checkpoints import verification

    verification._in_clean_process = _in_this_process


def _in_this_process(folder: Path, device: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Do what the clean process does."""
    from exporter.clean_room.verify_checkpoint import verify

    try:
        report = verify(Path(folder).absolute(), device)
    except Exception as error:
        return (f"loading it in a clean process failed: {type(error).__name__}: {str(error)[:200]}",), {}
    return tuple(report.pop("problems")), report


def run(*arguments: object) -> int:
    from exporter.cli import main

    return main([str(argument) for argument in arguments])


def make(folder: Path, as_it_is: bool = False, whole: bool = True) -> Path:
    """Return a folder with everything that a case may need, made there unless it is complete already.

    Names in it are relative: records name each other so, and a copy elsewhere is as good.

    Args:
        as_it_is: take one that an earlier version of this package made.
        whole: else a source, its questions and recipes alone, which takes a second.
    """
    done = folder / "complete"
    if done.exists() and (as_it_is or done.read_text() == key()):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        _make_sources()
        if whole:
            _make_folders()
    finally:
        os.chdir(before)
    done.write_text(key())
    return folder


def _make_sources() -> None:
    from tiny_models import build

    build("llava", Path("source"), layers=4)
    Path("source/README.md").write_text(SOURCE_CARD)
    Path("source/LICENSE").write_text("MIT\n")
    build("smolvlm", Path("sharded"), layers=4, max_shard_size="300KB")
    _make_questions()
    _make_recipes()


def _make_folders() -> None:
    task = ("--task", "task/q.jsonl", "--max-new-tokens", 4)
    _must("compress", "source", "--out", "ours", "--layers", "1", "--fold", "none", "--calibration", "task/q.jsonl")
    _must("evaluate", "ours", "--reference", "source", *task)
    _must("bench", "ours", "--reference", "source", "--rounds", 2, "--new-tokens", 1)
    _make_routed()
    _must("evaluate", "routed", "--reference", "source", "--preset", "fast", *task)
    _must("onnx", "ours", "--out", "graphs")
    _must("evaluate", "source", *task, "--no-card", "--predictions", "answers.jsonl")
    _must("compare", "compare.yaml", "--out", "compared")


def _must(*arguments: object) -> None:
    if code := run(*arguments):
        raise SystemExit(f"the material can't be made: {' '.join(map(str, arguments))} ends with {code}")


def _make_questions() -> None:
    """One set of questions in every format."""
    import numpy
    import pyarrow
    import pyarrow.parquet
    from tiny_models import random_image

    task = Path("task")
    task.mkdir()
    numbers = numpy.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for index in range(8):
        name = f"{index}.{'jpg' if index == 1 else 'png'}"
        random_image(numbers, (48, 40)).save(task / name)
        row = {"image": name, "question": QUESTIONS[index % 4], "answer": ANSWERS[index % 4], "type": "ab"[index % 2]}
        rows.append(row)
    few = [row | {"choices": ["red", "three", "no", "seven"]} for row in rows[:4]]
    chats: Iterable[dict[str, Any]] = (
        {
            "id": str(index),
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for index, row in enumerate(few)
    )
    messages = (
        {
            "image": row["image"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
            ],
        }
        for row in few
    )
    (task / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    (task / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in messages))
    (task / "chats.json").write_text(json.dumps(list(chats)))
    with_bytes = [row | {"image": {"bytes": (task / row["image"]).read_bytes(), "path": row["image"]}} for row in few]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(with_bytes), task / "q.parquet")


class _Enough(Exception):  # noqa: N818 - no error
    """Training is broken off here."""


def _make_routed() -> None:
    """A routed checkpoint, and the state that a training leaves that was broken off in the middle."""
    from exporter.pipeline import route
    from exporter.recipe import CalibrationData, RouterRecipe, RunOptions
    from exporter.routing.training import loop

    def two_steps(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        for number, item in enumerate(items):
            if what == "train router" and number == 2:
                raise _Enough
            yield item

    recipe = RouterRecipe(CalibrationData("task/all.jsonl", samples=512), steps=4, batch_size=4)
    kept, loop.SAVE_EVERY = loop.SAVE_EVERY, 1
    try:
        route("ours", recipe, "again", RunOptions(batch_size=4), two_steps)
    except _Enough:
        pass
    finally:
        loop.SAVE_EVERY = kept
    _must(*ROUTE, "--out", "routed")


ROUTE = ("route", "ours", "--calibration", "task/all.jsonl", "--steps", "4", "--batch-size", "4")


def _make_recipes() -> None:
    Path("recipe.yaml").write_text(
        "model: source\ncalibration: {data: task/q.jsonl, samples: 3}\ndrop_layers: 1\nlocalizer: {name: tis, p: 0.5}\n"
        "fold: none\nprotect: [0]\nseed: 1\nbase_model: user/base\n"
    )
    grid = "calibration: task/q.jsonl\ntask: task/q.jsonl\nlocalizers: [first]\nfolds: [none]\ndrop_layers: [1]\n"
    Path("compare.yaml").write_text(f"model: source\n{grid}task_samples: 3\nprotect: [0]\nseed: 0\n")
    Path("zoo.yaml").write_text(f"models:\n- {{name: one, model: source}}\n{grid}")
    Path("routes.yaml").write_text(
        "model: ours\ntask: task/q.jsonl\ntask_samples: 2\nrows:\n- {name: random, rule: random}\n"
        "- {name: router, folder: routed}\nbudgets:\n- {keep_visual_tokens: 0.5}\nequal: budget\n"
    )


def copied(material: Path, names: Iterable[str], into: Path) -> None:
    """Copy parts of the material, with the times of their last change: fingerprints know files by those."""
    for name in names:
        if (material / name).is_dir():
            shutil.copytree(material / name, into / name)
        else:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(material / name, into / name)


def key() -> str:
    """Return what the material depends on: this package's source, and this file's."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "exporter").rglob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def chosen(generator: random.Random, folder: Path, pattern: str) -> Path:
    """One of the files of a pattern."""
    return generator.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
