"""Every kind of file that is read: where it lies, how it is damaged, and the cheapest commands that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from . import damages
from .damages import Damage
from .material import ROUTE

Command = tuple[str, ...]
TASK = (
    "--max-new-tokens",
    "4",
    "--batch-size",
    "4",
    "--predictions",
    "said.jsonl",
    "--no-card",
    "--json",
    "result.json",
)
DRY_RUN = ("--samples", "3", "--dry-run", "--out", "out", "--json", "result.json")
MADE = ("--samples", "3", "--fold", "none", "--out", "out", "--json", "result.json")


def evaluate(folder: str, task: str = "task/q.jsonl", *more: str) -> Command:
    return ("evaluate", folder, "--task", task, *TASK, *more, "--json", "result.json")


def dry_run(folder: str, data: str = "task/q.jsonl") -> Command:
    return ("compress", folder, "--layers", "1", "--calibration", data, *DRY_RUN)


def compress(folder: str, data: str = "task/q.jsonl") -> Command:
    return ("compress", folder, "--layers", "1", "--calibration", data, *MADE)


def of_folder(folder: str) -> tuple[Command, ...]:
    """What reads a source's files."""
    return (evaluate(folder), evaluate(folder), dry_run(folder), compress(folder))


def of_record(folder: str) -> tuple[Command, ...]:
    push = ("push", folder, "user/name", "--dry-run", "--json", "result.json")
    return (("card", folder, "--json", "result.json"), ("verify", folder, "--json", "result.json"), push)


CHECKS = ("verify", "push", "reproduce", "onnx")  # subcommands that may say that a check did not hold


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    files: str  # glob below the case's folder
    damages: Sequence[Damage]
    commands: Sequence[Command]
    needs: tuple[str, ...]  # names of the material that are copied
    share: int = 1  # how often it is drawn
    hashed: bool = False  # a record holds its hash: no change may pass `verify` or `push`


SOURCE, SHARDED, OURS, ROUTED = ("source", "task"), ("sharded", "task"), ("ours", "source", "task"), ("routed", "task")
GRAPHS = ("graphs", "ours", "source")
RESULT = ("--json", "result.json")
UNDER_BUDGET = (evaluate("routed", "task/q.jsonl", "--preset", "fast"),)
BENCH = ("bench", "graphs", "--reference", "ours", "--rounds", "2", "--new-tokens", "1", "--no-card", *RESULT)
REPRODUCE = ("reproduce", "ours", "--out", "out", *RESULT)
FROM_RECIPE = (("compress", "--recipe", "recipe.yaml", *DRY_RUN[2:]),)
RESUMED = ("evaluate", "source", "--task", "task/q.jsonl", "--max-new-tokens", "4", "--no-card", *RESULT)
CHATS, MESSAGES, TABLE = "task/chats.json", "task/messages.jsonl", "task/q.parquet"


def compare(recipe: str, out: str = "out") -> tuple[Command, ...]:
    return (("compare", recipe, "--out", out, *RESULT),)


def both(data: str) -> tuple[Command, ...]:
    """What reads questions."""
    return (dry_run("source", data), evaluate("source", data))


def cheap() -> tuple[Kind, ...]:
    """The kinds that a dry run on a source reads."""
    few = (dataclasses.replace(kind, commands=[c for c in kind.commands if "--dry-run" in c]) for kind in KINDS)
    return tuple(
        kind for kind in few if kind.commands and {*kind.needs} <= {"source", "sharded", "task", "recipe.yaml"}
    )


KINDS = (
    Kind("config.json", "source/config.json", damages.JSON, of_folder("source"), SOURCE, 5),
    Kind("config.json, nested", "sharded/config.json", damages.JSON, of_folder("sharded"), SHARDED, 3),
    Kind("generation_config.json", "source/generation_config.json", damages.JSON, of_folder("source"), SOURCE, 3),
    Kind("processor settings", "*/*processor_config.json", damages.JSON, of_folder("source"), SOURCE, 4),
    Kind("processor settings, tiles", "*/*processor_config.json", damages.JSON, of_folder("sharded"), SHARDED, 2),
    Kind("tokenizer", "source/tokenizer*.json", damages.JSON, of_folder("source"), SOURCE, 4),
    Kind("template in JSON", "source/chat_template.json", damages.TEMPLATE, of_folder("source"), SOURCE, 2),
    Kind("template", "sharded/chat_template.jinja", damages.TEMPLATE, of_folder("sharded"), SHARDED, 2),
    Kind("weights", "source/model.safetensors", damages.WEIGHTS, of_folder("source"), SOURCE, 5),
    Kind("shards", "sharded/*.safetensors", damages.WEIGHTS, of_folder("sharded"), SHARDED, 3),
    Kind("index", "sharded/*.index.json", damages.JSON, of_folder("sharded"), SHARDED, 3),
    Kind("card of a source", "source/README.md", damages.CARD, (compress("source"),), SOURCE, 2),
    Kind("compression.json", "ours/compression.json", damages.JSON, (*of_record("ours"), REPRODUCE), OURS, 6),
    Kind("compression.json, routed", "routed/compression.json", damages.JSON, of_record("routed"), ROUTED, 3),
    Kind("files of a checkpoint", "ours/[!Rc]*", damages.ANY, of_record("ours")[1:], OURS, 3, hashed=True),
    Kind("card", "ours/README.md", damages.CARD, of_record("ours"), OURS, 4),
    Kind("router weights", "routed/router/*", damages.WEIGHTS, UNDER_BUDGET, ROUTED, 3),
    Kind("router weights, checked", "routed/router/*", damages.WEIGHTS, of_record("routed")[1:], ROUTED, hashed=True),
    Kind("config.json, routed", "routed/config.json", damages.JSON, UNDER_BUDGET, ROUTED, 4),
    Kind("modeling files", "routed/*.py", damages.TEXT, of_record("routed")[1:], ROUTED, hashed=True),
    Kind("onnx.json", "graphs/onnx.json", damages.JSON, (*of_record("graphs") * 2, BENCH), GRAPHS, 5),
    Kind("graphs", "graphs/*.onnx*", damages.ANY, (BENCH,), GRAPHS, 2),
    Kind("files of an ONNX folder", "graphs/[!Ro]*", damages.ANY, of_record("graphs")[1:], GRAPHS, 2, hashed=True),
    Kind("card of an ONNX folder", "graphs/README.md", damages.CARD, of_record("graphs"), GRAPHS),
    Kind("questions, JSONL", "task/q.jsonl", damages.LINES, (*both("task/q.jsonl"), evaluate("source")), SOURCE, 6),
    Kind("questions, messages", MESSAGES, damages.LINES, (dry_run("source", MESSAGES),), SOURCE, 3),
    Kind("questions, JSON", CHATS, damages.JSON, both(CHATS), SOURCE, 4),
    Kind("questions, parquet", TABLE, damages.TABLE, both(TABLE), SOURCE, 3),
    Kind("images", "task/[0-3].*", damages.IMAGE, both("task/q.jsonl"), SOURCE, 5),
    Kind("folder of images", "task/[0-7].*", damages.IMAGE, (dry_run("source", "task"),), SOURCE),
    Kind("recipe", "recipe.yaml", damages.YAML, FROM_RECIPE, ("recipe.yaml", *SOURCE), 5),
    Kind("comparison", "compare.yaml", damages.YAML, compare("compare.yaml"), ("compare.yaml", *SOURCE), 4),
    Kind("comparison of models", "zoo.yaml", damages.YAML, compare("zoo.yaml"), ("zoo.yaml", *SOURCE), 2),
    Kind("comparison of routes", "routes.yaml", damages.YAML, compare("routes.yaml"),
         ("routes.yaml", "ours", *ROUTED), 3),
    Kind("answers kept", "answers.jsonl", damages.LINES, ((*RESUMED, "--predictions", "answers.jsonl"),),
         ("answers.jsonl", *SOURCE), 3),
    Kind("cells kept", "compared/cells.jsonl", damages.LINES, compare("compare.yaml", "compared"),
         ("compare.yaml", "compared/cells.jsonl", *SOURCE), 3),
    Kind("results kept", "compared/results.json", damages.JSON, compare("compare.yaml", "compared"),
         ("compare.yaml", "compared", *SOURCE), 2),
    Kind("state of a training", ".again.training", damages.STATE, ((*ROUTE, "--out", "again", *RESULT),),
         (".again.training", *OURS), 2),
)  # fmt: skip
