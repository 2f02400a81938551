"""The shape of the code, as a test: who may import whom, and what documents promise of the command line."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.cli import parser

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "exporter"
ORDER = (
    "errors shapes files record families scores scoring card_file weights json_file weight_files hub_access "
    "config_file quantization clean_room processor_files source_view source licence remote_images images answers "
    "chats samples records tables calibration pictures divergence replay capture fidelity questions localize plan "
    "recipe moments variants held_out fold modeling trust routing rules budgets oracle relaxation router_learner "
    "router_losses router_training checkpoint verification report route_pictures model_card routed_checkpoint "
    "pipeline estimate reproduction task resumable evaluation comparison zoo_comparison route_comparison timing "
    "workload subject onnx kinds hub runtimes benchmark arguments outputs cli plugins __main__"
).split()


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their first name, and others by their top-level name."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add((node.module or "").split(".")[0])
            elif node.level > depth:  # relative to the package itself
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {f"exporter.{name.split('.')[0]}" for name in names}
    return found


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert mine in ORDER, f"{mine} has no place in the order of modules"
    used = {name.removeprefix("exporter.") for name in imports(path) if name.startswith("exporter.")}
    assert not [name for name in used - {mine} if name in ORDER and ORDER.index(name) > ORDER.index(mine)]


def test_the_clean_room_needs_nothing_of_ours():
    used = imports(PACKAGE / "clean_room.py") - set(sys.stdlib_module_names)
    assert used <= {"torch", "transformers", "PIL"}


def test_the_onnx_runner_needs_neither_torch_nor_the_rest_of_the_package():
    for path in (PACKAGE / "onnx" / "runtime").glob("*.py"):
        used = imports(path) - set(sys.stdlib_module_names)
        # without the last two as well: its clean process has no exporter, and only names of the hub need the hub
        assert used <= {"numpy", "onnxruntime", "huggingface_hub", "exporter.errors"}


def test_the_comparison_of_onnx_with_torch_needs_nothing_of_ours():
    used = imports(PACKAGE / "onnx" / "comparison.py") - set(sys.stdlib_module_names)
    assert used <= {"numpy", "onnx", "torch", "transformers", "PIL"}


def test_what_travels_with_a_checkpoint_needs_nothing_of_ours():
    for path in (PACKAGE / "modeling").glob("*.py"):
        used = imports(path) - set(sys.stdlib_module_names)
        assert used <= {"torch", "transformers", "safetensors"}  # transformers cannot do without safetensors


def test_hooks_are_in_one_file():
    with_hooks = {path.name for path in modules() if "register_forward" in path.read_text()}
    assert with_hooks == {"capture.py"}


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.3), (["compress", "--help"], 0.3)])
def test_help_is_quick(arguments, limit):
    def seconds() -> float:
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "exporter", *arguments], check=True, capture_output=True)
        return time.monotonic() - begin

    assert min(seconds() for _ in range(3)) < limit


def documented_commands() -> list[str]:
    """Every `lvlm-exporter ...` line of the documents and of the verbs' help."""
    commands = []
    for path in (ROOT / "README.md", *ROOT.glob("examples/**/*.md"), *ROOT.glob("examples/**/*.yaml")):
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if match := re.match(r"\s*(?:\$ |# )?(lvlm-exporter .*)", line):
                commands.append(match[1].split("  #")[0])
    actions = parser()._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
    commands += [verb.epilog.split("\n  ", 1)[1] for verb in actions]
    return commands


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command):
    parser().parse_args(shlex.split(command)[1:])


def test_messages_name_no_private_places():
    for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")):
        assert "/root/" not in path.read_text()
