"""Run one row of the compatibility matrix, in the environment whose interpreter runs this file; see matrix.py.

    ENVIRONMENT/bin/python tests/matrix_cells.py FOLDER

FOLDER/job.json says which cells are run and where things lie; FOLDER/result.json has what became of each, written after
every one, so that a process that dies still tells which cell it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
OK, REFUSED, KNOWN, FAILED = "ok", "refused", "known", "failed"
FAMILIES = ("llava", "qwen2_5_vl")  # rotary positions in one dimension, and in three
ONNX_FAMILY = "llava"
NEW_TOKENS = 12
BUDGETS: dict[str, dict[str, Any]] = {
    "off": {"preset": "off"},
    "fast": {"preset": "fast"},
    "keep_visual_tokens=7": {"keep_visual_tokens": 7},
    "keep_visual_tokens=9, keep_layers=3": {"keep_visual_tokens": 9, "keep_layers": 3},
}
PACKAGES = (
    "torch transformers tokenizers huggingface_hub safetensors accelerate numpy pillow jinja2 pyyaml matplotlib tqdm "
    "onnx onnxruntime onnxscript"
).split()
# What 0.1.0's modeling file, which lies in the folders, can't know; those folders run by this package's own.
RENAMED = (5, 24)
RENAMED_SENTENCE = (
    "release 0.1.0 put a modeling file into its folders that knows the key-value cache by a name which transformers "
    "5.24 gave up, so that transformers alone answers wrongly there; this package runs such folders by its own file, "
    "and `exporter.update_modeling_files(FOLDER)` puts that into them"
)


class Refused(Exception):  # noqa: N818 - a sentence for the user, not a failure
    """What was asked for is refused with one sentence."""


class Known(Exception):  # noqa: N818
    """What is wrong is wrong for a reason that is known and can't be mended any more."""


class Job:
    """Where this row's things lie. Everything is relative to the row's folder, FOLDER."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "job.json").read_text())
        self.folder = folder
        self.cells: list[str] = settings["cells"]
        self.sources = Path(settings["sources"])  # FAMILY/ and questions/
        self.today = Path(settings["today"])  # the folders that the row `pinned` made

    @property
    def questions(self) -> Path:
        return self.sources / "questions" / "calibration.jsonl"

    def inputs(self, folder: Path) -> Path:
        """What the row `pinned` made of the questions beside a folder, by the folder's processor."""
        return self.today / f"inputs-{folder.parent.name}-{folder.name}.pt"

    def made(self, family: str, kind: str) -> Path:
        return self.folder / f"{family}-{kind}"


def command(*arguments: object) -> str:
    """Run a subcommand of lvlm-exporter in this process and return what it prints."""
    from exporter.cli.entry import main

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    if code:
        sentence = error.getvalue().strip().removeprefix("lvlm-exporter: ")
        raise Refused(sentence) if code == 2 else AssertionError(sentence)
    return out.getvalue()


# --- the cells --------------------------------------------------------------------------------------------------------


def compress(job: Job) -> None:
    for family in FAMILIES:
        source, out = job.sources / family, job.made(family, "plain")
        command("compress", source, "--out", out, "--drop-layers", 1, "--calibration", job.questions)


def route(job: Job) -> None:
    for family in FAMILIES:
        how = ("--steps", 20, "--batch-size", 4, "--learning-rate", 2e-2, "--candidates", 2, "--drop-at", 1)
        out = job.made(family, "routed")
        command("route", job.made(family, "plain"), "--out", out, "--calibration", job.questions, *how)


def verify(job: Job) -> None:
    """One family's: `compress` and `route` verify what they make, too."""
    for kind in ("plain", "routed"):
        command("verify", job.made(FAMILIES[0], kind))


def evaluate(job: Job) -> None:
    for family in FAMILIES:
        shared = ("--task", job.questions, "--samples", 4, "--no-card", "--max-new-tokens", 8)
        command("evaluate", job.made(family, "plain"), "--reference", job.sources / family, *shared)
        command("evaluate", job.made(family, "routed"), "--preset", "off,fast", *shared)


def onnx(job: Job) -> None:
    for kind, out in (("plain", "onnx"), ("routed", "onnx-routed")):
        command("onnx", job.made(ONNX_FAMILY, kind), "--out", job.made(ONNX_FAMILY, out))
        command("verify", job.made(ONNX_FAMILY, out))


def push(job: Job) -> None:
    """Publish a routed folder on a hub on 127.0.0.1, and load it from there by name, with transformers alone."""
    from loopback_hub import OWNER, LoopbackHub

    folder, name = job.made(FAMILIES[0], "routed"), f"{OWNER}/routed"
    loading = (
        "from transformers import AutoModelForImageTextToText as Auto; "
        f"assert Auto.from_pretrained({name!r}, trust_remote_code=True).router is not None"
    )
    with LoopbackHub() as hub:
        environment = hub.environment(job.folder / "home") | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        for arguments in (["-m", "exporter", "push", str(folder), name], ["-c", loading]):
            ran = subprocess.run(
                [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
            )
            if ran.returncode:
                lines = ran.stderr.strip().splitlines() or ["no output"]
                raise Refused(lines[-1]) if ran.returncode == 2 else AssertionError(lines[-1])


def published(job: Job) -> None:
    """Every folder of every release says what it said, run by this package."""
    from published import folders

    for folder in folders():
        compare(folder)


def own_file(job: Job) -> None:
    """The routed folders of every release, by the modeling file that lies in them and transformers alone."""
    from published import folders

    for folder in [path for path in folders() if (path / "modeling_routed.py").exists()]:
        try:
            compare(folder, trust_remote_code=True)
        except Exception as error:
            if folder.parent.name == "0.1.0" and release("transformers") >= RENAMED:
                raise Known(RENAMED_SENTENCE) from error
            raise


def updated(job: Job) -> None:
    """The same with today's modeling file put into them."""
    from published import folders

    from exporter.routing.folder import update_modeling_files

    for folder in [path for path in folders() if (path / "modeling_routed.py").exists()]:
        place = job.folder / f"updated-{folder.parent.name}"
        copied = place / folder.name
        shutil.copytree(folder, copied)
        shutil.copytree(folder.parent / "questions", place / "questions", dirs_exist_ok=True)
        shutil.copyfile(folder.parent / "expected.json", place / "expected.json")
        update_modeling_files(copied)
        compare(copied, trust_remote_code=True)


def today(job: Job) -> None:
    """What the row `pinned` made says the same here; routed folders by the modeling file that lies in them."""
    for name in json.loads((job.today / "expected.json").read_text())["folders"]:
        compare(job.today / name, trust_remote_code=name.endswith("routed") and "onnx" not in name)


def compare(folder: Path, trust_remote_code: bool = False) -> None:
    from published import answers, expected, new_tokens

    known = expected(folder)
    budgets = [entry["arguments"] for entry in known]
    made = answers(folder, budgets, new_tokens(folder), trust_remote_code=trust_remote_code)
    for entry, tokens in zip(known, made, strict=True):
        if tokens != entry["tokens"]:
            raise AssertionError(f"{folder.name} says other tokens than it did under {entry['budget']}")


# --- transformers 4: what was written is loaded, without this package -------------------------------------------------


def old_plain(job: Job) -> None:
    """Plain checkpoints of today and of every release, on inputs that the row `pinned` prepared."""
    import torch
    from published import expected, folders, new_tokens
    from transformers import AutoModelForImageTextToText

    for folder in [*plain_of(job.today), *(path for path in folders() if path.name.endswith("-plain"))]:
        inputs = torch.load(job.inputs(folder))
        inputs.pop("mm_token_type_ids", None)  # transformers 5 counts positions by it
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = model.generate(**inputs, max_new_tokens=new_tokens(folder), do_sample=False)
        if tokens[:, inputs["input_ids"].shape[1] :].tolist() != expected(folder)[0]["tokens"]:
            raise AssertionError(f"{folder.name} says other tokens than it did")


def old_processor(job: Job) -> None:
    """LLaVA's processor, as the source's files are carried over; Qwen2.5-VL's wants torchvision there."""
    import torch
    from published import ask

    from exporter.clean_room import load_processor

    folder = plain_of(job.today)[0]
    saved, made = torch.load(job.inputs(folder)), ask(load_processor(folder), job.today / "questions")
    if not torch.equal(made["input_ids"], saved["input_ids"]):
        raise AssertionError(f"the processor of {folder.name} makes other tokens")
    if (made["pixel_values"] - saved["pixel_values"]).abs().max() > 1e-5:
        raise AssertionError(f"the processor of {folder.name} makes other pixels")


def old_published_processor(job: Job) -> None:
    """That of a source whose tokenizer was saved by transformers 5."""
    from published import folders
    from transformers import AutoTokenizer

    try:
        for folder in folders():
            AutoTokenizer.from_pretrained(folder)
    except (ValueError, AttributeError) as error:
        raise Refused(first_line(error)) from error


def old_routed(job: Job) -> None:
    """A routed checkpoint is refused with one sentence."""
    from transformers import AutoModelForImageTextToText

    try:
        AutoModelForImageTextToText.from_pretrained(job.today / f"{FAMILIES[0]}-routed", trust_remote_code=True)
    except Exception as error:
        sentence = first_line(error)
        if "do not understand transformers" in str(error):  # what the modeling files say, see routed_api.unsupported
            raise Refused(sentence) from error
        raise
    raise AssertionError("it loads, which nobody has checked")


def plain_of(folder: Path) -> list[Path]:
    return [folder / f"{family}-plain" for family in FAMILIES]


# --- the last step of the row `pinned` --------------------------------------------------------------------------------


def expect(job: Job) -> None:
    """Write down what this row's folders say, for the other rows."""
    import torch
    from published import answers, ask, folders

    from exporter.clean_room import load_processor

    found: dict[str, Any] = {}
    for folder in sorted(
        path.parent for name in ("compression.json", "onnx.json") for path in job.today.glob(f"*/{name}")
    ):
        budgets = BUDGETS if folder.name.endswith("routed") else {"whole": {}}
        remote = folder.name.endswith("routed") and "onnx" not in folder.name
        made = answers(folder, list(budgets.values()), NEW_TOKENS, trust_remote_code=remote)
        found[folder.name] = [
            {"budget": name, "arguments": arguments, "tokens": tokens}
            for (name, arguments), tokens in zip(budgets.items(), made, strict=True)
        ]
    for folder in [*plain_of(job.today), *(path for path in folders() if path.name.endswith("-plain"))]:
        torch.save(ask(load_processor(folder), folder.parent / "questions"), job.inputs(folder))
    (job.today / "expected.json").write_text(json.dumps({"new_tokens": NEW_TOKENS, "folders": found}))


# Title of the column, and what is done. Those that need what another made come behind it.
CELLS: dict[str, tuple[str, Callable[[Job], None]]] = {
    "compress": ("`compress`", compress),
    "route": ("`route`", route),
    "verify": ("`verify`", verify),
    "evaluate": ("`evaluate`", evaluate),
    "onnx": ("`onnx`", onnx),
    "push": ("`push`, loaded by name", push),
    "expect": ("", expect),
    "today": ("folders made under the pinned releases", today),
    "published": ("folders that earlier releases published", published),
    "own_file": ("their routed ones by transformers alone", own_file),
    "updated": ("these after `update_modeling_files`", updated),
    "old_plain": ("plain checkpoints", old_plain),
    "old_processor": ("their processors", old_processor),
    "old_published_processor": ("processors saved by transformers 5", old_published_processor),
    "old_routed": ("routed checkpoints", old_routed),
}


# --- running them -----------------------------------------------------------------------------------------------------


def main() -> None:
    job = Job(Path(sys.argv[1]).resolve())
    result: dict[str, Any] = {"versions": versions(), "python": sys.version.split()[0], "cells": {}, "warnings": []}
    with collected(result["warnings"]):
        for name in job.cells:
            result["running"] = name
            write(job.folder / "result.json", result)
            begin = time.monotonic()
            status, detail = outcome(CELLS[name][1], job)
            seconds = round(time.monotonic() - begin, 1)
            result["cells"][name] = {"status": status, "detail": detail, "seconds": seconds}
            print(f"  {name}: {status} ({seconds:.0f} s) {detail}", flush=True)
    del result["running"]
    write(job.folder / "result.json", result)


def outcome(cell: Callable[[Job], None], job: Job) -> tuple[str, str]:
    try:
        cell(job)
    except Refused as error:
        return REFUSED, str(error)
    except Known as error:
        return KNOWN, str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return FAILED, f"{type(error).__name__}: {first_line(error)}"
    return OK, ""


@contextlib.contextmanager
def collected(into: list[str]) -> Iterator[None]:
    """Deprecations that dependencies announce while the cells run, each once: the next rename."""

    def note(message: Any, category: type[Warning], filename: str, *_: Any) -> None:
        if issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning):
            text = f"{category.__name__}: {' '.join(str(message).split())}"
            if text not in into:
                into.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = note  # type: ignore[assignment]
        yield


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def release(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(name).split(".")[:2])


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    main()
